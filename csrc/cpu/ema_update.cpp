#include "ema_update.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "cpu/chunks.h"
#include "cpu/simd.h"

namespace {
using namespace scrl;

// One tensor of each list.
struct Item {
  void* target;        // [count]
  const void* source;  // [count]
  ScalarType dtype;
  int64_t count;
};

template <class Storage>
SCRL_INLINE void ema_chunk(void* targets, const void* sources, int64_t begin, int64_t count, double momentum) {
  using Lanes = FixedSimd<Storage>;
  constexpr int64_t L = Lanes::lanes;
  const auto factors = ema_factors<accumulate_t<Storage>>(momentum);
  Storage* t = static_cast<Storage*>(targets) + begin;
  const Storage* s = static_cast<const Storage*>(sources) + begin;
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    prefetch_page_ahead(t + i);
    prefetch_page_ahead(s + i);
    auto target = Lanes::load(t + i);
    ema(target, Lanes::load(s + i), factors);
    Lanes::store(t + i, target);
  }
  if (const int64_t rest = count - i; rest) {
    auto target = Lanes::load_tail(t + i, rest);
    ema(target, Lanes::load_tail(s + i, rest), factors);
    Lanes::store_tail(t + i, target, rest);
  }
}

SCRL_MULTIVERSION void ema_any(ScalarType dtype, void* t, const void* s, int64_t begin, int64_t count,
                               double momentum) {
  if (dtype == ScalarType::Float) ema_chunk<float>(t, s, begin, count, momentum);
  if (dtype == ScalarType::Double) ema_chunk<double>(t, s, begin, count, momentum);
  if (dtype == ScalarType::BFloat16) ema_chunk<bf16>(t, s, begin, count, momentum);
  if (dtype == ScalarType::Half) ema_chunk<f16>(t, s, begin, count, momentum);
}

void ema_update_(StableListHandle target_list, StableListHandle source_list, double momentum,
                 std::optional<Tensor> momentum_tensor) {
  TensorList targets(target_list), sources(source_list);
  targets.take();
  sources.take();
  std::vector<Item> items;
  items.reserve(targets.size());
  const auto add = [&](const Facts& facts, AtenTensorHandle target, AtenTensorHandle source) {
    items.push_back({mutable_data(target), const_data(source), floating_dtype(facts.dtype), facts.count});
  };
  visit_ema_lists(targets, sources, momentum_tensor, add);
  check_numbers(momentum_tensor, 1, "ema_update_");
  momentum *= number_on_host(momentum_tensor, 0);
  if (momentum == 1) return;
  const std::vector<Chunk> chunks = chunks_of(items);
  for_each_chunk(chunks, 0, chunks.size(), false, [&](int64_t c) {
    const Item& item = items[chunks[c].tensor];
    ema_any(item.dtype, item.target, item.source, chunks[c].begin, chunks[c].count, momentum);
  });
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scrl_fast, CPU, m) { m.impl("ema_update_", TORCH_BOX(&ema_update_)); }
