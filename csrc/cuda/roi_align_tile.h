// RoIAlign on the GPU, small maps: a block holds 32 packs of neighbouring channels of one image, read or written once,
// side by side, and serves all boxes of the image.
#pragma once
#include "cuda/roi_align_kernels.h"

namespace scrl::roi {

constexpr int kTileWarps = 4;   // a block; 25 KB for 7 x 7 cells: eight of them on an H100
constexpr int kTileCells = 95;  // at most 48 KB a block

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
__global__ void __launch_bounds__(kWarp* kTileWarps, sizeof(T) == 8 ? 5 : 6)  // a sixth block would spill doubles
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
    const BinWeights<R> y = w.y.of(k, p), x = w.x.of(k, q);
    R sum[V] = {};
    for (int i = y.begin; i < y.end; ++i) {
      for (int j = x.begin; j < x.end; ++j) {
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
    const auto result = narrowed<T, V>(sum, n < s.images);
    if (!planes && bins == 1) {
      if (lane * V < tile.channels) scrl::cuda::store_global(to + lane * V, result);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (channel_of(v) < tile.channels) to[channel_of(v) * bins] = result.values[v];
    }
  }
}

// The weights of an image's first bins on both axes, and where their gradient lies: weights[row of the map, then
// column][bin]. At most 64 bins, whole warps of them, as shared memory has room beside a tile.
template <class R>
struct BinTable {
  R* weights;
  int* grad_rows;
  int capacity;

  static int bytes_of_bin(const Sizes& s) {
    return (s.height + s.width) * static_cast<int>(sizeof(R)) + static_cast<int>(sizeof(int));
  }
  static int fitting(const Sizes& s, int bytes_taken) {
    return std::min(64, (48 * 1024 - bytes_taken) / bytes_of_bin(s) / kWarp * kWarp);
  }
  __device__ BinTable(const Sizes& s, char* memory, int bins)
      : weights(reinterpret_cast<R*>(memory)),
        grad_rows(reinterpret_cast<int*>(weights + (s.height + s.width) * bins)),
        capacity(bins) {}
};

template <class T, int V, bool planes>
int tile_bytes_backward(const Sizes& s) {  // channels side by side need no tile: cells go straight to memory
  return planes ? tile_bytes<T, V, planes>(s) : 0;
}

template <class T, int V, bool planes>
int bins_in_table(const Sizes& s) {
  return BinTable<accumulate_t<T>>::fitting(s, tile_bytes_backward<T, V, planes>(s));
}

// grad [count, pooled_height, pooled_width, channels] -> out [images, channels, height, width] by its strides.
// A block writes 32 x V channels of an image's gradient. A warp takes one cell after the other: its lanes look up the
// weights of 32 bins at once, those of the first ones in shared memory; then all of them visit the bins that read the
// cell, in order, two at a time, for two loads in flight.
template <class T, int V, bool planes>
__global__ void __launch_bounds__(kWarp* kTileWarps, 6)
    pool_tile_backward(const T* __restrict__ grad, Workspace<accumulate_t<T>> w, T* __restrict__ out, Strides stride,
                       Sizes s, int table_capacity) {
  using R = accumulate_t<T>;
  const int slabs = slabs_of<V>(s);
  const int n = static_cast<int>(blockIdx.x) / slabs, first_channel = static_cast<int>(blockIdx.x) % slabs * kWarp * V;
  const Tile<T, V, planes> tile(s, first_channel);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, channel = lane * V;
  const bool inside = channel < tile.channels;  // lanes beyond read channel 0, so that all take part in the votes
  const int first = w.first[n], bins = s.pooled_height * s.pooled_width;
  const int pairs = (w.first[n + 1] - first) * bins, in_table = min(pairs, table_capacity);  // of a box and a bin
  grad += inside ? first_channel + channel : 0;
  out += n * stride.image + first_channel * stride.channel;

  const auto box_of = [&](int pair) { return w.order[first + pair / bins]; };
  const auto y_of = [&](int k, int bin) { return w.y.of(k, bin / s.pooled_width); };
  const auto x_of = [&](int k, int bin) { return w.x.of(k, bin % s.pooled_width); };
  const int tile_end = planes ? kWarp * V * static_cast<int>(sizeof(T)) * tile.pitch : 0;
  const BinTable<R> table(s, reinterpret_cast<char*>(tile_memory) + tile_end, table_capacity);
  for (int base = 0; base < in_table; base += kWarp) {
    const int pair = base + lane;
    int k = 0;
    BinWeights<R> y{nullptr, 0, 0}, x{nullptr, 0, 0};  // of pairs beyond the last one too: no weight
    if (pair < pairs) k = box_of(pair), y = y_of(k, pair % bins), x = x_of(k, pair % bins);
    if (warp == 0) table.grad_rows[pair] = k * bins + pair % bins;
    for (int a = warp; a < s.height + s.width; a += kTileWarps)
      table.weights[a * table_capacity + pair] = a < s.height ? y.at(a) : x.at(a - s.height);
  }
  __syncthreads();

  for (int cell = warp; cell < tile.cells; cell += kTileWarps) {
    const int i = cell / s.width, j = cell % s.width;
    R sum[V] = {};
    for (int base = 0; base < pairs; base += kWarp) {
      const int pair = base + lane;
      int row = 0;  // of grad: box and bin
      R weight = 0;
      if (base < in_table) {
        const R* of_pair = table.weights + pair;
        weight = of_pair[i * table_capacity] * of_pair[(s.height + j) * table_capacity];
        row = table.grad_rows[pair];
      } else if (pair < pairs) {
        const int k = box_of(pair);
        row = k * bins + pair % bins;
        weight = y_of(k, pair % bins).at(i) * x_of(k, pair % bins).at(j);
      }
      const auto values_of = [&](int source) {
        return scrl::cuda::load_read_only<V>(grad + int64_t{__shfl_sync(kAll, row, source)} * s.channels);
      };
      for (unsigned left = __ballot_sync(kAll, weight != R(0)); left != 0;) {
        const int one = __ffs(left) - 1;
        left &= left - 1;
        const bool two = left != 0;
        const int other = two ? __ffs(left) - 1 : one;
        left &= left - 1;
        const auto a = values_of(one), b = values_of(other);
        add<V>(sum, __shfl_sync(kAll, weight, one), a);
        const R weight_b = __shfl_sync(kAll, weight, other);
        if (two) add<V>(sum, weight_b, b);
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
      scrl::cuda::store_global(out + i * stride.row + j * stride.column + channel, result);
    }
  }
  if constexpr (planes) {
    __syncthreads();
    tile.for_each(stride, s.width, [&](const T* from, int64_t offset, auto width) {
      scrl::cuda::store_global(out + offset, scrl::cuda::load<width>(from));
    });
  }
}

}  // namespace scrl::roi
