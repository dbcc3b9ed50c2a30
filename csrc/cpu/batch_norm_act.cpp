#include "cpu/batch_norm_act.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

namespace {
using namespace scrl;
using namespace scrl::norm;

constexpr int64_t kBlockElements = 1 << 16;  // 256 KB of float32: the fixed unit of summation, and of a thread's work
constexpr int64_t kLongestSum = 512;         // rows added up in the dtype of accumulation; float64 merges the blocks
constexpr int64_t kPad = 16;                 // channels, a whole number of the widest vectors of any dtype

struct Rows {
  int64_t rows, channels, padded, rows_a_block, blocks;
};

// Rows of adjacent channels: [N, C], or [N, C, H, W] in channels_last, without gaps.
void check_rows(const Tensor& tensor, const char* name) {
  const int64_t dim = tensor.dim();
  STD_TORCH_CHECK(dim == 2 || dim == 4, "batch_norm_act: ", name, " must be [N, C] or [N, C, H, W]");
  if (tensor.numel() == 0) return;
  int64_t expected = 1;
  const int64_t last_to_first[4] = {1, dim - 1, dim - 2, 0};  // of [N, C, H, W]: C, W, H, N
  for (int k = 0; k < 4; ++k) {
    if (dim == 2 && (k == 1 || k == 2)) continue;
    const int64_t axis = last_to_first[k];
    STD_TORCH_CHECK(tensor.size(axis) == 1 || tensor.stride(axis) == expected, "batch_norm_act: ", name,
                    " must be dense, with channels last");
    expected *= tensor.size(axis);
  }
}

void check_like(const Tensor& tensor, const Tensor& input, const char* name) {
  check_same(tensor, input, "batch_norm_act");
  STD_TORCH_CHECK(tensor.dim() == input.dim(), "batch_norm_act: ", name, " must have the shape of input");
  for (int64_t axis = 0; axis < input.dim(); ++axis)
    STD_TORCH_CHECK(tensor.size(axis) == input.size(axis), "batch_norm_act: ", name, " must have the shape of input");
  check_rows(tensor, name);
}

ScalarType wide(const Tensor& input) {
  return input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Rows rows_of(const Tensor& input) {
  check_rows(input, "input");
  const int64_t channels = input.size(1), rows = channels ? input.numel() / channels : 0;
  const int64_t rows_a_block = std::clamp<int64_t>(kBlockElements / std::max<int64_t>(1, channels), 64, kLongestSum);
  return {rows, channels, (channels + kPad - 1) / kPad * kPad, rows_a_block, (rows + rows_a_block - 1) / rows_a_block};
}

void check_values(const Tensor& values, const Tensor& input, int64_t count, const char* name) {
  STD_TORCH_CHECK(values.scalar_type() == wide(input) && values.numel() == count && values.is_contiguous(),
                  "batch_norm_act: ", name, " must be ", count, " adjacent numbers of the accumulation dtype");
}

// Numbers of a tensor in the accumulation dtype, as doubles. Where they lie and of which dtype is asked once: each such
// question is a call into torch.
class Numbers {
 public:
  explicit Numbers(const Tensor& tensor)
      : floats_(static_cast<const float*>(tensor.const_data_ptr())),
        doubles_(tensor.scalar_type() == ScalarType::Double ? static_cast<const double*>(tensor.const_data_ptr())
                                                            : nullptr) {}
  double operator[](int64_t place) const { return doubles_ ? doubles_[place] : static_cast<double>(floats_[place]); }

 private:
  const float* floats_;
  const double* doubles_;
};

class WritableNumbers {
 public:
  explicit WritableNumbers(Tensor& tensor)
      : floats_(static_cast<float*>(tensor.mutable_data_ptr())),
        doubles_(tensor.scalar_type() == ScalarType::Double ? static_cast<double*>(tensor.mutable_data_ptr())
                                                            : nullptr) {}
  void set(int64_t place, double value) const {
    doubles_ ? doubles_[place] = value : floats_[place] = static_cast<float>(value);
  }

 private:
  float* floats_;
  double* doubles_;
};

// Values a channel in the accumulation dtype, padded with zeros; in doubles it holds them twice as far apart.
class Values {
 public:
  Values(const Rows& rows, ScalarType dtype) : wide_(dtype == ScalarType::Double) {
    wide_ ? doubles_.resize(rows.padded) : floats_.resize(rows.padded);
  }
  void set(int64_t c, double value) { wide_ ? doubles_[c] = value : floats_[c] = static_cast<float>(value); }
  const void* data() const { return wide_ ? static_cast<const void*>(doubles_.data()) : floats_.data(); }

 private:
  bool wide_;
  std::vector<float> floats_;
  std::vector<double> doubles_;
};

struct Affine {
  Values mean, scale, bias;

  Affine(const Rows& rows, const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& b,
         const Tensor& statistics, double eps)
      : mean(rows, wide(input)), scale(rows, wide(input)), bias(rows, wide(input)) {
    check_values(statistics, input, 2 * rows.channels + 1, "statistics");
    if (weight) check_values(*weight, input, rows.channels, "weight");
    if (b) check_values(*b, input, rows.channels, "bias");
    const Numbers merged(statistics), weights(weight ? *weight : statistics), biases(b ? *b : statistics);
    for (int64_t c = 0; c < rows.channels; ++c) {
      mean.set(c, merged[c]);
      scale.set(c, (weight ? weights[c] : 1.0) / std::sqrt(merged[rows.channels + c] + eps));
      bias.set(c, b ? biases[c] : 0.0);
    }
  }
};

Pass pass_of(const Rows& rows, const Tensor& input, bool relu) {
  Pass pass{};
  pass.input = input.const_data_ptr();
  pass.rows = rows.rows, pass.channels = rows.channels, pass.padded = rows.padded;
  pass.rows_a_block = rows.rows_a_block, pass.relu = relu;
  return pass;
}

void over_blocks(Run run, const Pass& pass, const Rows& rows) {
  torch::stable::parallel_for(0, rows.blocks, 1, [&](int64_t first, int64_t last) { run(pass, first, last); });
}

// Runs merge(first, last) over pieces of at most kPiece channels. Within one the blocks are taken in order, so the
// result does not depend on the number of threads.
constexpr int64_t kPiece = 64;

template <class Merge>
void over_channels(const Rows& rows, const Merge& merge) {
  const int64_t pieces = (rows.channels + kPiece - 1) / kPiece;
  torch::stable::parallel_for(0, pieces, 4, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece)
      merge(piece * kPiece, std::min(rows.channels, (piece + 1) * kPiece));
  });
}

Tensor new_partials(const Rows& rows, const Tensor& input) {  // [blocks, 2, padded]
  return torch::stable::new_empty(input, {rows.blocks * 2 * rows.padded}, wide(input));
}

// input [rows, C] -> [2C + 1]: mean, biased variance and number of values a channel; zeros without rows.
Tensor statistics(Tensor input) {
  const Rows rows = rows_of(input);
  Tensor result = torch::stable::new_empty(input, {2 * rows.channels + 1}, wide(input));
  Tensor partials = new_partials(rows, input);
  Pass pass = pass_of(rows, input, false);
  pass.partials = partials.mutable_data_ptr();
  over_blocks(statistics_of(input.scalar_type()), pass, rows);
  const Numbers each(partials);
  const WritableNumbers merged(result);
  const double count = static_cast<double>(rows.rows);
  const auto rows_in = [&](int64_t block) {
    return static_cast<double>(std::min(rows.rows_a_block, rows.rows - block * rows.rows_a_block));
  };
  over_channels(rows, [&](int64_t first, int64_t last) {  // Chan et al. 1979
    double mean[kPiece] = {}, deviations[kPiece] = {};
    for (int64_t b = 0; b < rows.blocks; ++b)
      for (int64_t c = first; c < last; ++c) mean[c - first] += rows_in(b) * each[2 * b * rows.padded + c];
    for (int64_t c = first; c < last; ++c) mean[c - first] /= std::max(1.0, count);
    for (int64_t b = 0; b < rows.blocks; ++b)
      for (int64_t c = first; c < last; ++c) {
        const double apart = each[2 * b * rows.padded + c] - mean[c - first];
        deviations[c - first] += each[(2 * b + 1) * rows.padded + c] + rows_in(b) * apart * apart;
      }
    for (int64_t c = first; c < last; ++c) {
      merged.set(c, mean[c - first]);
      merged.set(rows.channels + c, deviations[c - first] / std::max(1.0, count));
    }
  });
  merged.set(2 * rows.channels, count);
  return result;
}

// act((input - mean) * weight / sqrt(var + eps) + bias + residual), rows like input
Tensor apply(Tensor input, std::optional<Tensor> residual, std::optional<Tensor> weight, std::optional<Tensor> bias,
             Tensor statistics, double eps, bool relu) {
  const Rows rows = rows_of(input);
  if (residual) check_like(*residual, input, "residual");
  const Affine affine(rows, input, weight, bias, statistics, eps);
  Tensor output = torch::stable::empty_like(input);
  check_rows(output, "output");
  Pass pass = pass_of(rows, input, relu);
  pass.mean = affine.mean.data(), pass.scale = affine.scale.data(), pass.bias = affine.bias.data();
  pass.residual = residual ? residual->const_data_ptr() : nullptr;
  pass.result = output.mutable_data_ptr();
  over_blocks(apply_of(input.scalar_type()), pass, rows);
  return output;
}

// -> sums [2, C] of dy and of dy * xhat, where dy is the gradient before the ReLU; and dy itself where output is given
// (it is the residual's gradient), else [0].
std::tuple<Tensor, Tensor> backward_sums(Tensor grad, Tensor input, std::optional<Tensor> output,
                                         std::optional<Tensor> weight, std::optional<Tensor> bias, Tensor statistics,
                                         double eps, bool relu) {
  const Rows rows = rows_of(input);
  check_like(grad, input, "grad");
  STD_TORCH_CHECK(relu || !output, "batch_norm_act: output tells the ReLU's mask; there is none");
  if (output) check_like(*output, input, "output");
  const Affine affine(rows, input, weight, bias, statistics, eps);
  Tensor sums = torch::stable::new_empty(input, {2, rows.channels}, wide(input));
  Tensor masked = output ? torch::stable::empty_like(input) : torch::stable::new_empty(input, {0});
  if (output) check_rows(masked, "output");
  Tensor partials = new_partials(rows, input);
  Pass pass = pass_of(rows, input, relu);
  pass.grad = grad.const_data_ptr();
  pass.mean = affine.mean.data(), pass.scale = affine.scale.data(), pass.bias = affine.bias.data();
  pass.output = output ? output->const_data_ptr() : nullptr;
  pass.result = output ? masked.mutable_data_ptr() : nullptr;
  pass.partials = partials.mutable_data_ptr();
  if (rows.rows && rows.channels) over_blocks(backward_sums_of(input.scalar_type()), pass, rows);
  const Numbers each(partials), merged(statistics);
  const WritableNumbers total(sums);
  over_channels(rows, [&](int64_t first, int64_t last) {
    double sum[kPiece] = {}, cross[kPiece] = {};
    for (int64_t b = 0; b < rows.blocks; ++b)
      for (int64_t c = first; c < last; ++c) {
        sum[c - first] += each[2 * b * rows.padded + c];
        cross[c - first] += each[(2 * b + 1) * rows.padded + c];
      }
    for (int64_t c = first; c < last; ++c) {
      total.set(c, sum[c - first]);
      total.set(rows.channels + c, cross[c - first] / std::sqrt(merged[rows.channels + c] + eps));
    }
  });
  return {sums, masked};
}

// Gradient of the input. sums [2, C]: those of all rows that the statistics are of. With a count of 0 the statistics
// are constants (eval mode). relu: whether grad still has to be masked.
Tensor backward(Tensor grad, Tensor input, std::optional<Tensor> weight, std::optional<Tensor> bias, Tensor statistics,
                Tensor sums, double eps, bool relu) {
  const Rows rows = rows_of(input);
  check_like(grad, input, "grad");
  const Affine affine(rows, input, weight, bias, statistics, eps);
  check_values(sums, input, 2 * rows.channels, "sums");
  Values slope(rows, wide(input)), offset(rows, wide(input));
  const Numbers merged(statistics), total(sums), weights(weight ? *weight : statistics);
  const double count = merged[2 * rows.channels];
  for (int64_t c = 0; c < rows.channels && count > 0; ++c) {
    const double invstd = 1 / std::sqrt(merged[rows.channels + c] + eps);
    const double scale = (weight ? weights[c] : 1.0) * invstd;
    slope.set(c, scale * invstd * total[rows.channels + c] / count);
    offset.set(c, scale * total[c] / count);
  }
  Tensor result = torch::stable::empty_like(input);
  check_rows(result, "the gradient");
  Pass pass = pass_of(rows, input, relu);
  pass.grad = grad.const_data_ptr();
  pass.mean = affine.mean.data(), pass.scale = affine.scale.data(), pass.bias = affine.bias.data();
  pass.slope = slope.data(), pass.offset = offset.data();
  pass.result = result.mutable_data_ptr();
  over_blocks(backward_of(input.scalar_type()), pass, rows);
  return result;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scrl_fast, CPU, m) {
  m.impl("batch_norm_statistics", TORCH_BOX(&statistics));
  m.impl("batch_norm_act", TORCH_BOX(&apply));
  m.impl("batch_norm_act_backward_sums", TORCH_BOX(&backward_sums));
  m.impl("batch_norm_act_backward", TORCH_BOX(&backward));
}
