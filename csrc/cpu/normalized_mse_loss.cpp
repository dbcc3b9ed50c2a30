#include "normalized_mse_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/simd.h"

namespace {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace scrl;

// Rows of one block are read twice, for their dot products and for the gradient: 8 float32 rows of 256 with their
// targets are 16 KB and stay in the first cache. Blocks are also the fixed unit of summation, so that the sum does not
// depend on the number of threads.
constexpr int64_t kBlock = 8;

struct Rows {
  const void *input, *target;      // [rows, columns]; row i of input pairs with row (i + shift) % rows of target
  void *grad_input, *grad_target;  // [rows, columns], dense; null where unwanted
  void* losses;                    // [rows], or null
  double* partial_sums;            // [blocks], or null
  int64_t rows, columns, input_stride, target_stride, shift;
  double gradient_scale;
};

template <class Storage>
struct Dots {
  accumulate_t<Storage> input[kBlock], target[kBlock], cross[kBlock];
};

template <class Storage>
SCRL_INLINE void row_dots(const Storage* x, const Storage* t, int64_t columns, Dots<Storage>& dots, int64_t row) {
  using Lanes = FixedSimd<Storage>;
  constexpr int64_t L = Lanes::lanes;
  typename Lanes::Vector xx[2] = {}, tt[2] = {}, xt[2] = {};  // two chains of additions each, or latency is what counts
  auto add = [&](int k, typename Lanes::Vector a, typename Lanes::Vector b) {
    xx[k] += a * a;
    tt[k] += b * b;
    xt[k] += a * b;
  };
  int64_t i = 0;
  for (; i + 2 * L <= columns; i += 2 * L) {
    add(0, Lanes::load(x + i), Lanes::load(t + i));
    add(1, Lanes::load(x + i + L), Lanes::load(t + i + L));
  }
  if (i + L <= columns) add(0, Lanes::load(x + i), Lanes::load(t + i)), i += L;
  if (i < columns) add(1, Lanes::load_tail(x + i, columns - i), Lanes::load_tail(t + i, columns - i));
  dots.input[row] = horizontal_sum(xx[0] + xx[1]);
  dots.target[row] = horizontal_sum(tt[0] + tt[1]);
  dots.cross[row] = horizontal_sum(xt[0] + xt[1]);
}

// out = p * a + q * b
template <class Storage>
SCRL_INLINE void combine(Storage* SCRL_RESTRICT out, const Storage* a, const Storage* b, int64_t columns,
                         accumulate_t<Storage> p, accumulate_t<Storage> q) {
  using Lanes = FixedSimd<Storage>;
  constexpr int64_t L = Lanes::lanes;
  int64_t i = 0;
  for (; i + L <= columns; i += L) Lanes::store(out + i, p * Lanes::load(a + i) + q * Lanes::load(b + i));
  const int64_t rest = columns - i;
  if (rest) Lanes::store_tail(out + i, p * Lanes::load_tail(a + i, rest) + q * Lanes::load_tail(b + i, rest), rest);
}

template <class Storage>
SCRL_INLINE void block_loss(const Rows& w, int64_t block) {
  using A = accumulate_t<Storage>;
  const int64_t first = block * kBlock, count = std::min(kBlock, w.rows - first);
  auto input = [&](int64_t row) { return static_cast<const Storage*>(w.input) + (first + row) * w.input_stride; };
  auto partner = [&](int64_t row) { return (first + row + w.shift) % w.rows; };
  auto target = [&](int64_t row) { return static_cast<const Storage*>(w.target) + partner(row) * w.target_stride; };

  Dots<Storage> dots = {};
  for (int64_t row = 0; row < count; ++row) row_dots(input(row), target(row), w.columns, dots, row);
  NormalizedMse<A> terms[kBlock];
  for (int64_t row = 0; row < kBlock; ++row)
    terms[row] = normalized_mse(dots.input[row], dots.target[row], dots.cross[row], static_cast<A>(w.gradient_scale));
  if (w.losses)
    for (int64_t row = 0; row < count; ++row) static_cast<A*>(w.losses)[first + row] = terms[row].loss;
  if (w.partial_sums) {
    double sum = 0;
    for (int64_t row = 0; row < count; ++row) sum += terms[row].loss;
    w.partial_sums[block] = sum;
  }
  if (w.grad_input)
    for (int64_t row = 0; row < count; ++row)
      combine(static_cast<Storage*>(w.grad_input) + (first + row) * w.columns, target(row), input(row), w.columns,
              terms[row].across, terms[row].from_input);
  if (w.grad_target)
    for (int64_t row = 0; row < count; ++row)
      combine(static_cast<Storage*>(w.grad_target) + partner(row) * w.columns, input(row), target(row), w.columns,
              terms[row].across, terms[row].from_target);
}

SCRL_MULTIVERSION void blocks_f32(const Rows& w, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) block_loss<float>(w, block);
}
SCRL_MULTIVERSION void blocks_f64(const Rows& w, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) block_loss<double>(w, block);
}
SCRL_MULTIVERSION void blocks_bf16(const Rows& w, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) block_loss<bf16>(w, block);
}
SCRL_MULTIVERSION void blocks_f16(const Rows& w, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) block_loss<f16>(w, block);
}

using Blocks = void (*)(const Rows&, int64_t, int64_t);

Blocks blocks_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return blocks_f32;
    case ScalarType::Double:
      return blocks_f64;
    case ScalarType::BFloat16:
      return blocks_bf16;
    case ScalarType::Half:
      return blocks_f16;
    default:
      STD_TORCH_CHECK(false, "normalized_mse_loss: dtype must be float32, float64, bfloat16 or float16");
  }
}

void check_rows(const Tensor& input, const Tensor& target, bool two_views, int64_t reduction) {
  check_same(input, target, "normalized_mse_loss");
  STD_TORCH_CHECK(input.dim() == 2 && target.dim() == 2 && input.size(0) == target.size(0),
                  "normalized_mse_loss: input and target must be [rows, columns]");
  STD_TORCH_CHECK(input.numel() == 0 || input.size(1) < 2 || (input.stride(1) == 1 && target.stride(1) == 1),
                  "normalized_mse_loss: elements of a row must be adjacent");
  STD_TORCH_CHECK(!two_views || input.size(0) % 2 == 0, "normalized_mse_loss: two views need an even number of rows");
  STD_TORCH_CHECK(reduction >= 0 && reduction <= 2, "normalized_mse_loss: reduction out of range, got ", reduction);
}

// input, target [rows, columns] -> loss [] or [rows], gradients [rows, columns] or [0] where unwanted.
// two_views: row i of input meets row (i + rows / 2) % rows of target, and a mean is over rows / 2 pairs.
// reduction: 0 the loss of every row, 1 their sum, 2 their mean, of no rows 0; the gradient of that sum to input and
// target where wanted. float16 gradients leave the mean's division to backward: it would make them subnormal.
std::tuple<Tensor, Tensor, Tensor> normalized_mse_loss(Tensor input, Tensor target, bool two_views, int64_t reduction,
                                                       bool grad_input, bool grad_target) {
  check_rows(input, target, two_views, reduction);
  const int64_t rows = input.size(0), columns = input.size(1);
  const bool reduce = reduction != 0;
  const int64_t shift = two_views ? rows / 2 : 0;
  const double scale = reduction == 2 ? 1.0 / std::max<int64_t>(1, rows - shift) : 1.0;
  const bool wide = input.scalar_type() == ScalarType::Double;
  const auto loss_dtype = wide ? ScalarType::Double : ScalarType::Float;
  std::vector<int64_t> loss_shape, dense = {rows, columns}, none = {0};
  if (!reduce) loss_shape.push_back(rows);
  Tensor loss = torch::stable::new_empty(input, loss_shape, loss_dtype);
  Tensor for_input = torch::stable::new_empty(input, grad_input ? dense : none);
  Tensor for_target = torch::stable::new_empty(input, grad_target ? dense : none);

  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  std::vector<double> partial_sums(reduce ? blocks : 0);
  const Rows work{input.const_data_ptr(),
                  target.const_data_ptr(),
                  grad_input ? for_input.mutable_data_ptr() : nullptr,
                  grad_target ? for_target.mutable_data_ptr() : nullptr,
                  reduce ? nullptr : loss.mutable_data_ptr(),
                  reduce ? partial_sums.data() : nullptr,
                  rows,
                  columns,
                  input.stride(0),
                  target.stride(0),
                  shift,
                  input.scalar_type() == ScalarType::Half ? 1.0 : scale};
  const Blocks run = blocks_of(input.scalar_type());
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / kBlock / std::max<int64_t>(1, columns));  // 32 k elements
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) { run(work, begin, end); });
  if (reduce) {
    double sum = 0;
    for (double partial : partial_sums) sum += partial;
    if (wide)
      *loss.mutable_data_ptr<double>() = sum * scale;
    else
      *loss.mutable_data_ptr<float>() = static_cast<float>(sum * scale);
  }
  return {loss, for_input, for_target};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scrl_fast, CPU, m) { m.impl("normalized_mse_loss", TORCH_BOX(&normalized_mse_loss)); }
