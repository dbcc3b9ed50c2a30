// RoIAlign on the GPU, small maps: a block holds 32 packs of neighbouring channels of one image, read or written once,
// side by side, and serves all boxes of the image.
#pragma once
#include "cuda/roi_align_kernels.h"

namespace scrl::roi {

constexpr int kTileWarps = 4;   // a block; 25 KB for 7 x 7 cells: eight of them on an H100
constexpr int kTileCells = 95;  // at most 48 KB a block

extern __shared__ uint4 tile_memory[];  // dynamic, 16 bytes aligned

// One image after the other, without gaps between its channels.
inline bool dense_planes(const Sizes& s, const Strides& stride) {
  return stride.column == 1 && stride.row == s.width && stride.channel == int64_t{s.height} * s.width;
}

inline bool fits_a_tile(const Sizes& s, const Strides& stride) {
  return int64_t{s.height} * s.width <= kTileCells && (stride.channel == 1 || dense_planes(s, stride));
}

template <class T, int V, bool planes>
int tile_bytes(const Sizes& s) {
  return kWarp * V * static_cast<int>(sizeof(T)) * ((s.height * s.width) | (planes ? 1 : 0));
}

template <int V>
int64_t pool_tile_blocks(const Sizes& s) {
  return (s.images + int64_t{1}) * slabs_of<V>(s);
}

template <int V>
int64_t pool_tile_backward_blocks(const Sizes& s) {
  return int64_t{s.images} * slabs_of<V>(s);
}

// 32 x V channels of a map of few cells in shared memory. Channels that lie side by side keep that order. Of dense
// planes each channel takes an odd number of elements, so that lanes on neighbouring channels meet different banks.
template <class T, int V, bool planes>
struct Tile {
  static constexpr int kChannels = kWarp * V, kStep = kWarp * kTileWarps;
  T* memory;
  int channels, cells, pitch;  // channels of the map that this tile holds

  __device__ Tile(const Sizes& s, int channel)
      : memory(reinterpret_cast<T*>(tile_memory)),
        channels(min(kChannels, s.channels - channel)),
        cells(s.height * s.width),
        pitch(cells | 1) {}

  __device__ __forceinline__ T* at(int channel, int cell) const {
    return memory + (planes ? channel * pitch + cell : cell * kChannels + channel);
  }

  // Calls move(element of the tile, offset in the map from its first channel, width) for all that this thread moves.
  template <class Move>
  __device__ __forceinline__ void for_each(const Strides& stride, int width, const Move& move) const {
    const int thread = threadIdx.x;
    if constexpr (!planes) {
      const int channel = thread % kWarp * V;
      if (channel >= channels) return;
#pragma unroll 4
      for (int cell = thread / kWarp; cell < cells; cell += kTileWarps)
        move(at(channel, cell), cell / width * stride.row + cell % width * stride.column + channel,
             std::integral_constant<int, V>{});
    } else if (V > 1 && pitch == cells) {
#pragma unroll 4
      for (int k = thread * V; k < channels * cells; k += kStep * V)
        move(memory + k, int64_t{k}, std::integral_constant<int, V>{});
    } else {
      int channel = thread / cells, cell = thread % cells;
#pragma unroll 4
      for (int k = thread; k < channels * cells; k += kStep) {
        move(at(channel, cell), int64_t{k}, std::integral_constant<int, 1>{});
        channel += kStep / cells, cell += kStep % cells;
        if (cell >= cells) ++channel, cell -= cells;
      }
    }
  }
};

// map [images, channels, height, width] by its strides -> out [count, channels, pooled_height, pooled_width], dense.
// A block pools all boxes of an image from 32 x V channels of its map; the blocks behind write NaN for boxes of none.
template <class T, int V, bool planes>
__global__ void __launch_bounds__(kWarp* kTileWarps, 6)
    pool_tile(const T* __restrict__ map, Strides stride, Workspace<accumulate_t<T>> w, T* __restrict__ out, Sizes s) {
  using R = accumulate_t<T>;
  const int slabs = slabs_of<V>(s);
  const int n = static_cast<int>(blockIdx.x) / slabs, first_channel = static_cast<int>(blockIdx.x) % slabs * kWarp * V;
  const int first = w.first[n], bins = s.pooled_height * s.pooled_width;
  const int pairs = ((n < s.images ? w.first[n + 1] : s.count) - first) * bins;  // of a box and a bin
  if (pairs == 0) return;
  const Tile<T, V, planes> tile(s, first_channel);
  if (n < s.images) {
    map += n * stride.image + first_channel * stride.channel;
    tile.for_each(stride, s.width, [&](T* to, int64_t offset, auto width) {
      scrl::cuda::store(to, scrl::cuda::load_read_only<width>(map + offset));
    });
    __syncthreads();
  }

  const int lane = threadIdx.x % kWarp;
  const auto channel_of = [&](int v) { return planes ? lane + v * kWarp : lane * V + v; };
  for (int pair = static_cast<int>(threadIdx.x) / kWarp; pair < pairs; pair += kTileWarps) {
    const int64_t k = w.order[first + pair / bins];
    const int bin = pair % bins, p = bin / s.pooled_width, q = bin % s.pooled_width;
    const Range rows = w.y_range[k * s.pooled_height + p], columns = w.x_range[k * s.pooled_width + q];
    const R *y = w.y + (k * s.pooled_height + p) * s.height, *x = w.x + (k * s.pooled_width + q) * s.width;
    R sum[V] = {};
    for (int i = rows.begin; i < rows.end; ++i) {
      for (int j = columns.begin; j < columns.end; ++j) {
        const R weight = y[i] * x[j];
        if (weight == R(0)) continue;
        const int cell = i * s.width + j;
        if constexpr (planes) {
#pragma unroll
          for (int v = 0; v < V; ++v) sum[v] += weight * widen(*tile.at(channel_of(v), cell));
        } else {
          add<V>(sum, weight, scrl::cuda::load<V>(tile.at(lane * V, cell)));
        }
      }
    }
    T* to = out + (k * s.channels + first_channel) * bins + bin;
    Pack<T, V> result;
#pragma unroll
    for (int v = 0; v < V; ++v)
      result.values[v] = narrow<T>(n < s.images ? sum[v] : std::numeric_limits<R>::quiet_NaN());
    if (!planes && bins == 1) {
      if (lane * V < tile.channels) scrl::cuda::store(to + lane * V, result);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (channel_of(v) < tile.channels) to[channel_of(v) * bins] = result.values[v];
    }
  }
}

// grad [count, pooled_height, pooled_width, channels] -> out [images, channels, height, width] by its strides.
// A block writes 32 x V channels of an image's gradient. A warp takes one cell after the other: its lanes look up the
// weights of 32 bins at once, then all of them visit the bins that read the cell, in order. Where channels lie side by
// side a cell goes straight to memory.
template <class T, int V, bool planes>
__global__ void __launch_bounds__(kWarp* kTileWarps, 6)
    pool_tile_backward(const T* __restrict__ grad, Workspace<accumulate_t<T>> w, T* __restrict__ out, Strides stride,
                       Sizes s) {
  using R = accumulate_t<T>;
  const int slabs = slabs_of<V>(s);
  const int n = static_cast<int>(blockIdx.x) / slabs, first_channel = static_cast<int>(blockIdx.x) % slabs * kWarp * V;
  const Tile<T, V, planes> tile(s, first_channel);
  const int lane = threadIdx.x % kWarp, channel = lane * V;
  const bool inside = channel < tile.channels;  // lanes beyond read channel 0, so that all take part in the votes
  const int first = w.first[n], bins = s.pooled_height * s.pooled_width;
  const int pairs = (w.first[n + 1] - first) * bins;
  grad += inside ? first_channel + channel : 0;
  out += n * stride.image + first_channel * stride.channel;

  for (int cell = threadIdx.x / kWarp; cell < tile.cells; cell += kTileWarps) {
    const int i = cell / s.width, j = cell % s.width;
    R sum[V] = {};
    for (int base = 0; base < pairs; base += kWarp) {
      int row = 0;  // of grad: box and bin
      R weight = 0;
      if (const int pair = base + lane; pair < pairs) {
        const int k = w.order[first + pair / bins], bin = pair % bins;
        const int p = k * s.pooled_height + bin / s.pooled_width, q = k * s.pooled_width + bin % s.pooled_width;
        const Range rows = w.y_range[p], columns = w.x_range[q];
        row = k * bins + bin;
        if (i >= rows.begin && i < rows.end && j >= columns.begin && j < columns.end)
          weight = w.y[int64_t{p} * s.height + i] * w.x[int64_t{q} * s.width + j];
      }
      for (unsigned left = __ballot_sync(kAll, weight != R(0)); left != 0; left &= left - 1) {
        const int source = __ffs(left) - 1;
        const int64_t from = int64_t{__shfl_sync(kAll, row, source)} * s.channels;
        add<V>(sum, __shfl_sync(kAll, weight, source), scrl::cuda::load<V>(grad + from));
      }
    }
    if (!inside) continue;
    Pack<T, V> result;
#pragma unroll
    for (int v = 0; v < V; ++v) result.values[v] = narrow<T>(sum[v]);
    if constexpr (planes) {
#pragma unroll
      for (int v = 0; v < V; ++v) *tile.at(channel + v, cell) = result.values[v];
    } else {
      scrl::cuda::store(out + i * stride.row + j * stride.column + channel, result);
    }
  }
  if constexpr (planes) {
    __syncthreads();
    tile.for_each(stride, s.width, [&](const T* from, int64_t offset, auto width) {
      scrl::cuda::store(out + offset, scrl::cuda::load<width>(from));
    });
  }
}

}  // namespace scrl::roi
