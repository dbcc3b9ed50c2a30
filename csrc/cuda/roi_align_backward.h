// RoIAlign on the GPU, maps of any size: the backward pass gathers. A warp owns cells of the gradient, without atomics.
#pragma once
#include "cuda/roi_align_kernels.h"

namespace scrl::roi {

constexpr int kColumns = 8;  // of a row of the map's gradient that a warp holds in registers

// Which pairs of a box and a row of its bins reach a row of the map, and which boxes reach kColumns of its columns: a
// bit a pair, the pairs of an image in their order. Without it each warp of pool_backward would ask all boxes of its
// image.
struct Reach {
  unsigned *rows, *columns;  // [height, words], [column tiles, words]
  int64_t words;             // of 32 pairs; an image begins a new one

  static int64_t words_of(const Sizes& s) { return int64_t{s.count} * s.pooled_height / kWarp + s.images + 1; }
  static int tiles_of(const Sizes& s) { return (s.width + kColumns - 1) / kColumns; }
  SCRL_HOST_DEVICE static int64_t first_word(int first_box, int64_t image, const Sizes& s) {
    return int64_t{first_box} * s.pooled_height / kWarp + image;
  }
};

constexpr int kReachBlocks = 16;  // an image

// w -> reach. A warp makes the bits of 32 pairs after those of 32 others.
template <class R>
__global__ void __launch_bounds__(kWarp* kWarps) mark_reach(Workspace<R> w, Reach reach, Sizes s) {
  const int n = blockIdx.x / kReachBlocks, lane = threadIdx.x % kWarp;
  const int first = w.first[n], pairs = (w.first[n + 1] - first) * s.pooled_height;
  const int tiles = (s.width + kColumns - 1) / kColumns;
  const auto mark = [&](unsigned* bits, int count, int begin, int end) {  // of each unit in [0, count)
    for (int base = 0; base < count; base += kWarp) {
      unsigned mine = 0;
      for (int j = 0; j < kWarp; ++j) {
        const unsigned all = __ballot_sync(kAll, base + j >= begin && base + j < end);
        if (lane == j) mine = all;
      }
      if (base + lane < count) bits[(base + lane) * reach.words] = mine;
    }
  };
  const int warp = static_cast<int>(blockIdx.x % kReachBlocks) * kWarps + static_cast<int>(threadIdx.x) / kWarp;
  for (int base = warp * kWarp; base < pairs; base += kReachBlocks * kWarps * kWarp) {
    const int pair = base + lane;
    Bin rows{0, 0, 0}, columns{s.width, 0, 0};
    if (pair < pairs) {
      const int64_t k = w.order[first + pair / s.pooled_height];
      rows = w.y.bins[k * s.pooled_height + pair % s.pooled_height];
      for (int q = 0; q < s.pooled_width; ++q) {
        const Bin bin = w.x.bins[k * s.pooled_width + q];
        columns.begin = min(columns.begin, bin.begin), columns.end = max(columns.end, bin.end);
      }
    }
    const int64_t word = Reach::first_word(first, n, s) + base / kWarp;
    mark(reach.rows + word, s.height, rows.begin, rows.end);
    mark(reach.columns + word, tiles, columns.begin / kColumns, (columns.end + kColumns - 1) / kColumns);
  }
}

// grad [count, pooled_height, pooled_width, channels] -> out [images, channels, height, width] by its strides.
// A warp does V x 32 channels of kColumns cells of a row of the map's gradient. It visits the (box, row of bins) pairs
// that reach them, in order: lanes look up the weights of 32 at once, then the bins of one.
template <class T, int V>
__global__ void __launch_bounds__(kWarp* kWarps, 2)
    pool_backward(const T* __restrict__ grad, Workspace<accumulate_t<T>> w, Reach reach, T* __restrict__ out,
                  Strides stride, Sizes s) {
  using R = accumulate_t<T>;
  const int lane = threadIdx.x % kWarp;
  int64_t rest = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  const int tiles = (s.width + kColumns - 1) / kColumns, slabs = slabs_of<V>(s);
  const int tile = static_cast<int>(rest % tiles), column = tile * kColumns;
  rest /= tiles;
  const int i = static_cast<int>(rest % s.height);
  rest /= s.height;
  const int channel = (static_cast<int>(rest % slabs) * kWarp + lane) * V;
  const int64_t n = rest / slabs;
  if (n >= s.images) return;
  const bool inside = channel < s.channels;
  grad += inside ? channel : 0;

  R sum[kColumns][V] = {};
  const auto visit = [&](int k, int p, R weight) {
    for (int base = 0; base < s.pooled_width; base += kWarp) {
      Bin mine{0, 0, 0};
      if (base + lane < s.pooled_width) mine = w.x.bins[int64_t{k} * s.pooled_width + base + lane];
      unsigned left = __ballot_sync(kAll, mine.begin < column + kColumns && mine.end > column);
      for (; left != 0; left &= left - 1) {
        const int source = __ffs(left) - 1;
        const int begin = __shfl_sync(kAll, mine.begin, source), end = __shfl_sync(kAll, mine.end, source);
        const R* strip = w.x.strips + k * w.x.strip_length() + __shfl_sync(kAll, mine.shift, source);
        R weight_x = 0;
        if (lane < kColumns && column + lane >= begin && column + lane < end) weight_x = strip[column + lane];
        const int64_t bin = (int64_t{k} * s.pooled_height + p) * s.pooled_width + base + source;
        const auto values = scrl::cuda::load<V>(grad + bin * s.channels);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const R both = weight * __shfl_sync(kAll, weight_x, j);
          if (both != R(0)) add<V>(sum[j], both, values);
        }
      }
    }
  };
  const int first = w.first[n], words = ((w.first[n + 1] - first) * s.pooled_height + kWarp - 1) / kWarp;
  const int64_t first_word = Reach::first_word(first, n, s);
  const unsigned* of_row = reach.rows + i * reach.words + first_word;
  const unsigned* of_tile = reach.columns + tile * reach.words + first_word;
  for (int base = 0; base < words; base += kWarp) {
    const unsigned mine = base + lane < words ? of_row[base + lane] & of_tile[base + lane] : 0;
    for (unsigned some = __ballot_sync(kAll, mine != 0); some != 0; some &= some - 1) {
      const int source = __ffs(some) - 1, pair = (base + source) * kWarp + lane;
      int k = 0, p = 0;
      R weight_y = 0;
      if (__shfl_sync(kAll, mine, source) >> lane & 1) {
        k = w.order[first + pair / s.pooled_height], p = pair % s.pooled_height;
        weight_y = w.y.of(k, p)[i];
      }
      for (unsigned left = __ballot_sync(kAll, weight_y != R(0)); left != 0; left &= left - 1) {
        const int one = __ffs(left) - 1;
        visit(__shfl_sync(kAll, k, one), __shfl_sync(kAll, p, one), __shfl_sync(kAll, weight_y, one));
      }
    }
  }
  if (!inside) return;
  out += n * stride.image + i * stride.row + channel * stride.channel;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    if (column + j >= s.width) break;
    Pack<T, V> result;
#pragma unroll
    for (int v = 0; v < V; ++v) result.values[v] = narrow<T>(sum[j][v]);
    T* to = out + (column + j) * stride.column;
    if (V > 1 && stride.channel == 1) {
      scrl::cuda::store_global(to, result);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) to[v * stride.channel] = result.values[v];
    }
  }
}

// ---- blocks of a launch ----

inline int64_t mark_reach_blocks(const Sizes& s) { return int64_t{s.images} * kReachBlocks; }
template <int V>
int64_t pool_backward_blocks(const Sizes& s) {
  return in_blocks(int64_t{s.images} * slabs_of<V>(s) * s.height * in_blocks(s.width, kColumns), kWarps);
}

}  // namespace scrl::roi
