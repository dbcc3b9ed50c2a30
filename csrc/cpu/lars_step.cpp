#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu/chunks.h"
#include "cpu/simd.h"
#include "ema_update.h"
#include "lars_lists.h"

namespace {
using namespace scrl;

using Floats = FixedSimd<float>::Vector;
using Doubles = FixedSimd<double>::Vector;

constexpr int64_t kGroup = 1 << 17;  // elements of a thread in a group: 1 MB of parameters and gradients in float32

struct Squares {
  double param = 0, gradient = 0;
};

// One tensor of each list: memory, and what the update needs to know.
struct Item {
  void *param, *buffer, *target;  // [count] each; target: null where there is none
  const void* gradient;           // [count]
  ScalarType dtype;
  int64_t count;
  const LarsSettings* settings;
  Squares squares;
};

// The products of two float32 are exact in float64: sums agree to the bit on every instruction set.
SCRL_INLINE void add_squares(Doubles (&sum)[2], Floats value) {
  using f32x8 = float __attribute__((vector_size(32)));
  f32x8 half[2];
  std::memcpy(half, &value, sizeof(value));
  for (int k = 0; k < 2; ++k) {
    const Doubles wide = __builtin_convertvector(half[k], Doubles);
    sum[k] += wide * wide;
  }
}
SCRL_INLINE void add_squares(Doubles (&sum)[2], Doubles value) { sum[0] += value * value; }

template <class Storage>
SCRL_INLINE Squares squares_of_chunk(const Item& item, int64_t begin, int64_t count) {
  using Lanes = FixedSimd<Storage>;
  constexpr int64_t L = Lanes::lanes;
  const Storage* p = static_cast<const Storage*>(item.param) + begin;
  const Storage* g = static_cast<const Storage*>(item.gradient) + begin;
  Doubles params[2] = {}, gradients[2] = {};
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    prefetch_page_ahead(p + i);
    prefetch_page_ahead(g + i);
    add_squares(params, Lanes::load(p + i));
    add_squares(gradients, Lanes::load(g + i));
  }
  if (i < count) {
    add_squares(params, Lanes::load_tail(p + i, count - i));
    add_squares(gradients, Lanes::load_tail(g + i, count - i));
  }
  return {horizontal_sum(params[0] + params[1]), horizontal_sum(gradients[0] + gradients[1])};
}

template <class Storage, bool with_target>
SCRL_INLINE void update_chunk(const Item& item, int64_t begin, int64_t count, double ema_momentum) {
  using Lanes = FixedSimd<Storage>;
  constexpr int64_t L = Lanes::lanes;
  using A = accumulate_t<Storage>;
  const auto factors = lars_factors<A>(*item.settings, item.squares.param, item.squares.gradient);
  const auto toward = ema_factors<A>(ema_momentum);
  Storage* p = static_cast<Storage*>(item.param) + begin;
  Storage* b = static_cast<Storage*>(item.buffer) + begin;
  Storage* t = static_cast<Storage*>(item.target) + (with_target ? begin : 0);
  const Storage* g = static_cast<const Storage*>(item.gradient) + begin;
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    prefetch_page_ahead(p + i);
    prefetch_page_ahead(g + i);
    prefetch_page_ahead(b + i);
    if constexpr (with_target) prefetch_page_ahead(t + i);
    auto param = Lanes::load(p + i), buffer = Lanes::load(b + i);
    lars_update(param, Lanes::load(g + i), buffer, factors);
    Lanes::store(b + i, buffer);
    Lanes::store(p + i, param);
    if constexpr (with_target) {
      auto target = Lanes::load(t + i);
      ema(target, Lanes::load(p + i), toward);  // the parameter as it was rounded
      Lanes::store(t + i, target);
    }
  }
  if (const int64_t rest = count - i; rest) {
    auto param = Lanes::load_tail(p + i, rest), buffer = Lanes::load_tail(b + i, rest);
    lars_update(param, Lanes::load_tail(g + i, rest), buffer, factors);
    Lanes::store_tail(b + i, buffer, rest);
    Lanes::store_tail(p + i, param, rest);
    if constexpr (with_target) {
      auto target = Lanes::load_tail(t + i, rest);
      ema(target, Lanes::load_tail(p + i, rest), toward);
      Lanes::store_tail(t + i, target, rest);
    }
  }
}

template <class Storage>
SCRL_INLINE void update_chunk(const Item& item, int64_t begin, int64_t count, double ema_momentum) {
  if (item.target)
    update_chunk<Storage, true>(item, begin, count, ema_momentum);
  else
    update_chunk<Storage, false>(item, begin, count, ema_momentum);
}

SCRL_MULTIVERSION Squares squares_any(const Item& item, int64_t begin, int64_t count) {
  if (item.dtype == ScalarType::Float) return squares_of_chunk<float>(item, begin, count);
  if (item.dtype == ScalarType::Double) return squares_of_chunk<double>(item, begin, count);
  if (item.dtype == ScalarType::BFloat16) return squares_of_chunk<bf16>(item, begin, count);
  return squares_of_chunk<f16>(item, begin, count);
}

SCRL_MULTIVERSION void update_any(const Item& item, int64_t begin, int64_t count, double ema_momentum) {
  if (item.dtype == ScalarType::Float) return update_chunk<float>(item, begin, count, ema_momentum);
  if (item.dtype == ScalarType::Double) return update_chunk<double>(item, begin, count, ema_momentum);
  if (item.dtype == ScalarType::BFloat16) return update_chunk<bf16>(item, begin, count, ema_momentum);
  return update_chunk<f16>(item, begin, count, ema_momentum);
}

// Where the group of tensors ends that begins with chunk `first`: parameters and gradients that are measured together
// stay in the cores' own caches (1 MB a core) until they are updated. At least one tensor, whatever its size.
int64_t group_end(const std::vector<Chunk>& chunks, int64_t first) {
  const int64_t most = kGroup * torch::stable::get_num_threads(), count = chunks.size();
  int64_t end = first, elements = 0;
  for (int64_t c = first; c < count; end = c) {
    for (const int32_t tensor = chunks[c].tensor; c < count && chunks[c].tensor == tensor; ++c)
      elements += chunks[c].count;
    if (end > first && elements > most) break;
  }
  return end;
}

// Sums of squares of the tensors of chunks [first, last): chunk by chunk, then over a tensor's chunks in their order.
void measure(std::vector<Item>& items, const std::vector<Chunk>& chunks, int64_t first, int64_t last) {
  std::vector<Squares> squares(last - first);
  for_each_chunk(chunks, first, last, false, [&](int64_t c) {
    squares[c - first] = squares_any(items[chunks[c].tensor], chunks[c].begin, chunks[c].count);
  });
  for (int64_t c = first; c < last; ++c) {
    Squares& sum = items[chunks[c].tensor].squares;
    sum.param += squares[c - first].param;
    sum.gradient += squares[c - first].gradient;
  }
}

bool gradients_finite(const std::vector<Item>& items) {
  return std::all_of(items.begin(), items.end(), [](const Item& i) { return std::isfinite(i.squares.gradient); });
}

void count_skip(const Tensor& counter) {
  if (counter.scalar_type() == ScalarType::Int)
    ++*counter.mutable_data_ptr<int32_t>();
  else
    ++*counter.mutable_data_ptr<int64_t>();
}

void lars_step_(StableListHandle param_list, StableListHandle buffer_list, StableListHandle target_list,
                StableListHandle gradient_list, std::vector<int64_t> ema_places, std::vector<double> settings,
                std::vector<int64_t> setting_of, double ema_momentum, std::optional<Tensor> lr,
                std::optional<Tensor> momentum, std::optional<Tensor> ema_momentum_tensor,
                std::optional<Tensor> skip_counter) {
  TensorList params(param_list), momentum_buffers(buffer_list), ema_targets(target_list), grads(gradient_list);
  for (TensorList* list : {&params, &momentum_buffers, &ema_targets, &grads}) list->take();
  const auto* given = reinterpret_cast<const LarsSettings*>(settings.data());
  const auto row_count = static_cast<int64_t>(settings.size()) / kLarsSettings;
  std::vector<LarsSettings> rows(given, given + row_count);
  std::vector<Item> items;
  items.reserve(params.size());
  const auto add = [&](const Facts& facts, AtenTensorHandle param, AtenTensorHandle buffer, AtenTensorHandle gradient) {
    const LarsSettings* row = &rows[setting_of[items.size()]];
    items.push_back({mutable_data(param),
                     mutable_data(buffer),
                     nullptr,
                     const_data(gradient),
                     floating_dtype(facts.dtype),
                     facts.count,
                     row,
                     {}});
  };
  const auto add_target = [&](int64_t place, AtenTensorHandle target) { items[place].target = mutable_data(target); };
  visit_lars_lists(params, momentum_buffers, ema_targets, grads, ema_places, settings, setting_of,
                   {lr, momentum, ema_momentum_tensor, skip_counter}, add, add_target);
  check_numbers(lr, row_count, "lars_step_");
  check_numbers(momentum, row_count, "lars_step_");
  check_numbers(ema_momentum_tensor, 1, "lars_step_");
  for (int64_t row = 0; row < row_count; ++row) {
    rows[row].lr *= number_on_host(lr, row);
    rows[row].momentum *= number_on_host(momentum, row);
  }
  ema_momentum *= number_on_host(ema_momentum_tensor, 0);
  if (ema_momentum == 1)
    for (Item& item : items) item.target = nullptr;

  const std::vector<Chunk> chunks = chunks_of(items);
  const auto count = static_cast<int64_t>(chunks.size());
  for (int64_t first = 0, last; first < count; first = last) {
    last = skip_counter ? count : group_end(chunks, first);  // all gradients are seen before anything changes
    measure(items, chunks, first, last);
    if (skip_counter && !gradients_finite(items)) return count_skip(*skip_counter);
    // backwards: what was measured last is still in the cache
    for_each_chunk(chunks, first, last, true, [&](int64_t c) {
      update_any(items[chunks[c].tensor], chunks[c].begin, chunks[c].count, ema_momentum);
    });
  }
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scrl_fast, CPU, m) { m.impl("lars_step_", TORCH_BOX(&lars_step_)); }
