// LARS over tables of tensors: one kernel for the sums of squares, one for everything else. No torch here:
// tests/cuda_on_cpu compiles this file for the CPU and runs it.
#pragma once
#include "cuda/chunks.h"
#include "ema_update.h"
#include "lars_step.h"

namespace scrl::lars {
using namespace scrl::cuda;

// Blocks a multiprocessor: 768 or 1,024 threads, each with up to four loads of 16 bytes in flight, and no spills. A
// pack of eight 16-bit elements needs more registers.
template <class T>
constexpr int kBlocks = sizeof(T) == 2 ? 3 : 4;

struct Item {
  void *param, *buffer, *target;  // [size] each; target: null where there is none
  const void* gradient;           // [size]
  int64_t size;
  int row;
};

struct Row {
  LarsSettings settings;
  int place;  // among the numbers that live on the GPU
};

struct Table {
  static constexpr int kRows = kArgumentBytes / 640;
  static constexpr int kCapacity = (kArgumentBytes - kRows * 64 - 256) / 52;
  Item items[kCapacity];
  Row rows[kRows];
  int first_chunk[kCapacity + 1];
  int count, row_count;
  int first_partial, first_block;  // of this table's chunks and blocks among those of all tables
};

// Between the two kernels: sums of squares of each chunk, and whether each block saw only finite gradients.
struct Workspace {
  double2* partials;  // [chunks of all tables]: (parameters, gradients)
  int* finite;        // [blocks of all tables]
  int blocks;
};

struct Numbers {
  Number lr, momentum, ema_momentum;
};
static_assert(sizeof(Table) + sizeof(Workspace) + sizeof(Numbers) + 16 <= kArgumentBytes);

// Sum over the block in a fixed order; valid in thread 0.
__device__ __forceinline__ double2 block_sum(double2 value) {
  static __shared__ double2 warps[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) {
    value.x += __shfl_down_sync(0xffffffffu, value.x, offset);
    value.y += __shfl_down_sync(0xffffffffu, value.y, offset);
  }
  __syncthreads();  // the sums of the call before have been read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kThreads / 32; ++warp) {
      value.x += warps[warp].x;
      value.y += warps[warp].y;
    }
  return value;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    squares_kernel(const __grid_constant__ Table table, const Workspace workspace) {
  const Share share = share_of_block(table.first_chunk[table.count]);
  int k = tensor_of_chunk(table.first_chunk, table.count, share.begin);
  bool finite = true;  // of thread 0
  for (int chunk = share.begin; chunk < share.end; ++chunk) {
    while (chunk >= table.first_chunk[k + 1]) ++k;
    const Item& item = table.items[k];
    const auto [begin, count] = chunk_of(chunk - table.first_chunk[k], item.size);
    const T* params = static_cast<const T*>(item.param) + begin;
    const T* gradients = static_cast<const T*>(item.gradient) + begin;
    double2 sum = {0, 0};
    for_each_pack<T>(count, all_aligned(params, gradients), [&](int i, auto width) {
      const auto param = load<width>(params + i);
      const auto gradient = load<width>(gradients + i);
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const double p = widen(param.values[j]), g = widen(gradient.values[j]);
        sum.x += p * p;
        sum.y += g * g;
      }
    });
    sum = block_sum(sum);
    if (threadIdx.x == 0) workspace.partials[table.first_partial + chunk] = sum;
    finite = finite && isfinite(sum.y);
  }
  if (threadIdx.x == 0) workspace.finite[table.first_block + blockIdx.x] = finite;
}

template <class T>
__device__ __forceinline__ LarsFactors<accumulate_t<T>> factors_of(const Table& table, int k,
                                                                   const Workspace& workspace, const Numbers& numbers) {
  using A = accumulate_t<T>;
  static __shared__ LarsFactors<A> shared;
  double2 sum = {0, 0};
  for (int chunk = table.first_chunk[k] + threadIdx.x; chunk < table.first_chunk[k + 1]; chunk += kThreads) {
    const double2 partial = workspace.partials[table.first_partial + chunk];
    sum.x += partial.x;
    sum.y += partial.y;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    const Row& row = table.rows[table.items[k].row];
    LarsSettings settings = row.settings;
    settings.lr *= numbers.lr.at(row.place);
    settings.momentum *= numbers.momentum.at(row.place);
    shared = lars_factors<A>(settings, sum.x, sum.y);
  }
  __syncthreads();
  return shared;
}

template <class T, bool with_target>
__device__ __forceinline__ void update_chunk(const Item& item, Chunk chunk, const LarsFactors<accumulate_t<T>>& factors,
                                             const EmaFactors<accumulate_t<T>>& toward) {
  T* params = static_cast<T*>(item.param) + chunk.begin;
  T* buffers = static_cast<T*>(item.buffer) + chunk.begin;
  T* targets = with_target ? static_cast<T*>(item.target) + chunk.begin : nullptr;
  const T* gradients = static_cast<const T*>(item.gradient) + chunk.begin;
  for_each_pack<T>(chunk.count, all_aligned(params, buffers, targets, gradients), [&](int i, auto width) {
    auto param = load<width>(params + i), buffer = load<width>(buffers + i);
    const auto gradient = load<width>(gradients + i);
    Pack<T, width> target;
    if constexpr (with_target) target = load<width>(targets + i);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      auto p = widen(param.values[j]), b = widen(buffer.values[j]);
      lars_update(p, widen(gradient.values[j]), b, factors);
      param.values[j] = narrow<T>(p);
      buffer.values[j] = narrow<T>(b);
      if constexpr (with_target) {
        auto t = widen(target.values[j]);
        ema(t, widen(param.values[j]), toward);  // the parameter as it was rounded
        target.values[j] = narrow<T>(t);
      }
    }
    store(params + i, param);
    store(buffers + i, buffer);
    if constexpr (with_target) store(targets + i, target);
  });
}

// counter [1]: int32 or int64, or null where steps are never skipped.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    update_kernel(const __grid_constant__ Table table, const Workspace workspace,
                  const __grid_constant__ Numbers numbers, void* counter, bool wide_counter) {
  if (counter) {
    bool bad = false;
    for (int block = threadIdx.x; block < workspace.blocks; block += kThreads) bad |= !workspace.finite[block];
    if (__syncthreads_or(bad)) {
      if (table.first_block == 0 && blockIdx.x == 0 && threadIdx.x == 0) {
        if (wide_counter)
          ++*static_cast<int64_t*>(counter);
        else
          ++*static_cast<int32_t*>(counter);
      }
      return;
    }
  }
  const auto toward = ema_factors<accumulate_t<T>>(numbers.ema_momentum.at(0));
  const Share share = share_of_block(table.first_chunk[table.count]);
  int k = table.count;
  LarsFactors<accumulate_t<T>> factors;
  // Backwards: what the first kernel read last is still in the second-level cache, 50 MB on an H100.
  for (int chunk = share.end - 1; chunk >= share.begin; --chunk) {
    if (k == table.count || chunk < table.first_chunk[k]) {
      k = tensor_of_chunk(table.first_chunk, table.count, chunk);
      factors = factors_of<T>(table, k, workspace, numbers);
    }
    const Item& item = table.items[k];
    const Chunk part = chunk_of(chunk - table.first_chunk[k], item.size);
    if (item.target && !toward.keep)
      update_chunk<T, true>(item, part, factors, toward);
    else
      update_chunk<T, false>(item, part, factors, toward);
  }
}

}  // namespace scrl::lars
