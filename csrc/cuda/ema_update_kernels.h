// The moving average over tables of tensors, in one launch a table. No torch here: tests/cuda_on_cpu compiles this file
// for the CPU and runs it.
#pragma once
#include "cuda/chunks.h"
#include "ema_update.h"

namespace scrl::ema_lists {
using namespace scrl::cuda;

// Blocks a multiprocessor: 1,280 threads, each with two loads of 16 bytes in flight; 48 registers, no spills.
constexpr int kBlocks = 5;

struct Item {
  void* target;        // [size]
  const void* source;  // [size]
  int64_t size;
};

struct Table {
  static constexpr int kCapacity = kArgumentBytes / 32;  // 28 bytes a tensor, and the rest
  Item items[kCapacity];
  int first_chunk[kCapacity + 1];
  int count;
};
static_assert(sizeof(Table) + sizeof(Number) <= kArgumentBytes);

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    ema_kernel(const __grid_constant__ Table table, const __grid_constant__ Number momentum) {
  const auto factors = ema_factors<accumulate_t<T>>(momentum.at(0));
  if (factors.keep) return;
  const Share share = share_of_block(table.first_chunk[table.count]);
  int k = tensor_of_chunk(table.first_chunk, table.count, share.begin);
  for (int chunk = share.begin; chunk < share.end; ++chunk) {
    while (chunk >= table.first_chunk[k + 1]) ++k;
    const Item& item = table.items[k];
    const auto [begin, count] = chunk_of(chunk - table.first_chunk[k], item.size);
    T* targets = static_cast<T*>(item.target) + begin;
    const T* sources = static_cast<const T*>(item.source) + begin;
    for_each_pack<T>(count, all_aligned(targets, sources), [&](int i, auto width) {
      auto target = load<width>(targets + i);
      const auto source = load<width>(sources + i);
#pragma unroll
      for (int j = 0; j < width; ++j) {
        auto value = widen(target.values[j]);
        ema(value, widen(source.values[j]), factors);
        target.values[j] = narrow<T>(value);
      }
      store(targets + i, target);
    });
  }
}

}  // namespace scrl::ema_lists
