// RoIAlign on the GPU, maps of any size: weights of every box and axis first, then pooling; the backward pass gathers.
//
// A warp reads the cells that a bin needs, or owns cells of the gradient. No atomics anywhere, no synchronisation with
// the host. No torch here: tests/cuda_on_cpu compiles this file for the CPU and runs it.
#pragma once
#include <algorithm>
#include <limits>
#include <type_traits>

#include "cuda/chunks.h"
#include "roi_align.h"

namespace scrl::roi {
using scrl::cuda::accumulate_t;
using scrl::cuda::narrow;
using scrl::cuda::Pack;
using scrl::cuda::widen;

constexpr int kWarp = 32, kWarps = 8;  // lanes, warps a block
constexpr unsigned kAll = 0xffffffffu;
constexpr int kColumns = 8;  // of a row of the map's gradient that a warp holds in registers

template <class T>
constexpr int kPack = 16 / sizeof(T);

struct Sizes {
  int count, images, channels, height, width, pooled_height, pooled_width;
};

// Slabs of 32 x V channels.
template <int V>
SCRL_HOST_DEVICE int slabs_of(const Sizes& s) {
  return (s.channels + kWarp * V - 1) / (kWarp * V);
}

struct Strides {  // of the map or its gradient, in elements
  int64_t image, channel, row, column;
};

struct Range {
  int begin, end;
};

// What box_weights and group_by_image write: y[box, bin, row] and x[box, bin, column] with their non-zero ranges; the
// image of a box, -1 for one that cannot be sampled; order[first[n], first[n + 1]) are the boxes of image n, and those
// from first[images] on cannot be sampled.
template <class R>
struct Workspace {
  R *y, *x;                    // [count, pooled_height, height], [count, pooled_width, width]
  Range *y_range, *x_range;    // [count, pooled_height], [count, pooled_width]
  int *image, *order, *first;  // [count], [count], [images + 1]
};

// boxes [count, 5] -> w.y, w.x and their ranges, w.image. A thread a bin of an axis of a box.
template <class R>
__global__ void box_weights(const R* __restrict__ boxes, Workspace<R> w, Sizes s, R scale, int64_t sampling_ratio,
                            bool aligned) {
  const int bins = s.pooled_height + s.pooled_width;
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t k = thread / bins;
  if (k >= s.count) return;
  const R* box = boxes + 5 * k;
  Axis<R> y, x;
  const bool fine_y = make_axis(box[2], box[4], scale, s.pooled_height, sampling_ratio, aligned, y);
  const bool fine_x = make_axis(box[1], box[3], scale, s.pooled_width, sampling_ratio, aligned, x);
  const int image = fine_y && fine_x ? static_cast<int>(image_of(box[0], s.images)) : -1;

  int bin = static_cast<int>(thread % bins);
  if (bin == 0) w.image[k] = image;
  const bool vertical = bin < s.pooled_height;
  const Axis<R> axis = vertical ? y : x;
  const int size = vertical ? s.height : s.width, bins_of_axis = vertical ? s.pooled_height : s.pooled_width;
  if (!vertical) bin -= s.pooled_height;
  const int64_t row = k * bins_of_axis + bin;
  R* weights = (vertical ? w.y : w.x) + row * size;
  Range range{size, 0};
  if (image >= 0) {
    for_each_tap(axis, bin, size, [&](int64_t cell, R) {
      range.begin = min(range.begin, static_cast<int>(cell));
      range.end = max(range.end, static_cast<int>(cell) + 1);
    });
    for (int cell = range.begin; cell < range.end; ++cell) weights[cell] = R(0);
    for_each_tap(axis, bin, size, [&](int64_t cell, R weight) { weights[cell] += weight; });
  }
  (vertical ? w.y_range : w.x_range)[row] = range;
}

// w.image [count] -> w.order [count], w.first [images + 1].
// Block n finds the boxes of image n, block `images` those that cannot be sampled. Each warp walks one stretch of the
// boxes twice: counting, then placing behind what the warps before it have counted, so boxes stay in their order.
template <class R>
__global__ void group_by_image(Workspace<R> w, int images, int count) {
  static __shared__ int before[kWarps], mine[kWarps];
  const int n = blockIdx.x, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int begin = static_cast<int>(int64_t{count} * warp / kWarps);
  const int end = static_cast<int>(int64_t{count} * (warp + 1) / kWarps);
  const auto image_at = [&](int k) {
    const int image = k < end ? w.image[k] : images + 1;
    return image < 0 ? images : image;
  };
  int less = 0, equal = 0;
  for (int base = begin; base < end; base += kWarp) {
    const int image = image_at(base + lane);
    less += __popc(__ballot_sync(kAll, image < n));
    equal += __popc(__ballot_sync(kAll, image == n));
  }
  if (lane == 0) before[warp] = less, mine[warp] = equal;
  __syncthreads();
  int place = 0;
  for (int i = 0; i < kWarps; ++i) place += before[i];
  if (threadIdx.x == 0) w.first[n] = place;
  for (int i = 0; i < warp; ++i) place += mine[i];
  if (equal == 0) return;
  for (int base = begin; base < end; base += kWarp) {
    const bool is_mine = image_at(base + lane) == n;
    const unsigned all = __ballot_sync(kAll, is_mine);
    if (is_mine) w.order[place + __popc(all & ((1u << lane) - 1))] = base + lane;
    place += __popc(all);
  }
}

template <int V, class T>
__device__ __forceinline__ void add(accumulate_t<T> (&sum)[V], accumulate_t<T> weight, const Pack<T, V>& values) {
#pragma unroll
  for (int v = 0; v < V; ++v) sum[v] += weight * widen(values.values[v]);
}

// map [images, channels, height, width] by its strides -> out [count, channels, pooled_height, pooled_width], dense.
// A warp does V x 32 channels of a row of bins of a box. Columns are visited two at a time, for two loads in flight.
template <class T, int V>
__global__ void __launch_bounds__(kWarp* kWarps, 2)
    pool(const T* __restrict__ map, Strides stride, Workspace<accumulate_t<T>> w, T* __restrict__ out, Sizes s) {
  using R = accumulate_t<T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  const int slabs = slabs_of<V>(s);
  const int64_t row = warp / slabs;  // box and row of bins
  if (row >= int64_t{s.count} * s.pooled_height) return;
  const int64_t k = row / s.pooled_height, p = row % s.pooled_height;
  const int channel = (static_cast<int>(warp % slabs) * kWarp + lane) * V;
  const bool inside = channel < s.channels;  // lanes beyond read channel 0, so that all take part in the votes
  const int image = w.image[k];
  map += max(image, 0) * stride.image + (inside ? channel : 0) * stride.channel;
  out += ((k * s.channels + channel) * s.pooled_height + p) * s.pooled_width;
  const int64_t bin_stride = int64_t{s.pooled_height} * s.pooled_width;
  const R* y = w.y + row * s.height;
  const Range rows = w.y_range[row];

  for (int q = 0; q < s.pooled_width; ++q) {
    R sum[V] = {};
    const int64_t column_bin = k * s.pooled_width + q;
    const Range columns = w.x_range[column_bin];
    for (int base = columns.begin; base < columns.end; base += kWarp) {
      const R mine = base + lane < columns.end ? w.x[column_bin * s.width + base + lane] : R(0);
      const unsigned with_weight = __ballot_sync(kAll, mine != R(0));
      for (int i = rows.begin; i < rows.end; ++i) {
        const R weight = y[i];
        if (weight == R(0)) continue;
        const T* cells = map + i * stride.row + base * stride.column;
        for (unsigned left = with_weight; left != 0;) {
          const int first = __ffs(left) - 1;
          left &= left - 1;
          const bool two = left != 0;
          const int second = two ? __ffs(left) - 1 : first;
          left &= left - 1;
          const auto a = scrl::cuda::load<V>(cells + first * stride.column);
          const auto b = scrl::cuda::load<V>(cells + second * stride.column);
          add<V>(sum, weight * __shfl_sync(kAll, mine, first), a);
          const R weight_b = weight * __shfl_sync(kAll, mine, second);
          if (two) add<V>(sum, weight_b, b);
        }
      }
    }
    if (!inside) continue;
    Pack<T, V> result;
#pragma unroll
    for (int v = 0; v < V; ++v) result.values[v] = narrow<T>(image < 0 ? std::numeric_limits<R>::quiet_NaN() : sum[v]);
    if (bin_stride == 1) {
      scrl::cuda::store_global(out, result);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) out[v * bin_stride + q] = result.values[v];
    }
  }
}

// The same shapes. A thread does one bin of one channel: neighbouring lanes read neighbouring cells where planes are
// dense.
template <class T>
__global__ void __launch_bounds__(kWarp* kWarps)
    pool_planes(const T* __restrict__ map, Strides stride, Workspace<accumulate_t<T>> w, T* __restrict__ out, Sizes s) {
  using R = accumulate_t<T>;
  const int bins = s.pooled_height * s.pooled_width, blocks = (s.channels * bins - 1) / (kWarp * kWarps) + 1;
  const int64_t k = blockIdx.x / blocks;
  const int element = static_cast<int>(blockIdx.x % blocks) * kWarp * kWarps + static_cast<int>(threadIdx.x);
  if (element >= s.channels * bins) return;
  const int channel = element / bins, q = element % s.pooled_width;
  const int64_t row = k * s.pooled_height + element % bins / s.pooled_width, column_bin = k * s.pooled_width + q;
  const int image = w.image[k];
  R sum = image < 0 ? std::numeric_limits<R>::quiet_NaN() : R(0);
  const Range rows = w.y_range[row], columns = w.x_range[column_bin];  // empty where there is no image
  map += max(image, 0) * stride.image + channel * stride.channel;
  for (int i = rows.begin; i < rows.end; ++i) {
    const R weight = w.y[row * s.height + i];
    if (weight == R(0)) continue;
    const T* cells = map + i * stride.row;
    R of_row = 0;
    for (int j = columns.begin; j < columns.end; ++j) {
      const R weight_x = w.x[column_bin * s.width + j];
      if (weight_x != R(0)) of_row += weight_x * widen(cells[j * stride.column]);
    }
    sum += weight * of_row;
  }
  out[k * s.channels * bins + element] = narrow<T>(sum);
}

// grad [count, pooled_height, pooled_width, channels] -> out [images, channels, height, width] by its strides.
// A warp does V x 32 channels of kColumns cells of a row of the map's gradient. Lanes look up the weights of 32 (box,
// row of bins) pairs at once; the warp then visits those that reach its row, in order.
template <class T, int V>
__global__ void __launch_bounds__(kWarp* kWarps, 2)
    pool_backward(const T* __restrict__ grad, Workspace<accumulate_t<T>> w, T* __restrict__ out, Strides stride,
                  Sizes s) {
  using R = accumulate_t<T>;
  const int lane = threadIdx.x % kWarp;
  int64_t rest = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  const int tiles = (s.width + kColumns - 1) / kColumns, slabs = slabs_of<V>(s);
  const int column = static_cast<int>(rest % tiles) * kColumns;
  rest /= tiles;
  const int i = static_cast<int>(rest % s.height);
  rest /= s.height;
  const int channel = (static_cast<int>(rest % slabs) * kWarp + lane) * V;
  const int64_t n = rest / slabs;
  if (n >= s.images) return;
  const bool inside = channel < s.channels;
  grad += inside ? channel : 0;

  R sum[kColumns][V] = {};
  const int first = w.first[n], pairs = (w.first[n + 1] - first) * s.pooled_height;
  for (int base = 0; base < pairs; base += kWarp) {
    const int pair = base + lane;
    int row = 0;  // box and row of bins
    R weight_y = 0;
    if (pair < pairs) {
      row = w.order[first + pair / s.pooled_height] * s.pooled_height + pair % s.pooled_height;
      const Range rows = w.y_range[row];
      if (i >= rows.begin && i < rows.end) weight_y = w.y[int64_t{row} * s.height + i];
    }
    for (unsigned left = __ballot_sync(kAll, weight_y != R(0)); left != 0; left &= left - 1) {
      const int source = __ffs(left) - 1;
      const int bins = __shfl_sync(kAll, row, source);
      const R weight = __shfl_sync(kAll, weight_y, source);
      for (int q = 0; q < s.pooled_width; ++q) {
        const int column_bin = bins / s.pooled_height * s.pooled_width + q;
        const Range columns = w.x_range[column_bin];
        if (columns.end <= column || columns.begin >= column + kColumns) continue;
        R weight_x = 0;
        if (lane < kColumns && column + lane >= columns.begin && column + lane < columns.end)
          weight_x = w.x[int64_t{column_bin} * s.width + column + lane];
        const auto values = scrl::cuda::load<V>(grad + int64_t{bins * s.pooled_width + q} * s.channels);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const R both = weight * __shfl_sync(kAll, weight_x, j);
          if (both != R(0)) add<V>(sum[j], both, values);
        }
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

inline int64_t in_blocks(int64_t work, int64_t a_block) { return (work + a_block - 1) / a_block; }

inline int64_t box_weights_blocks(const Sizes& s, int threads) {
  return in_blocks(int64_t{s.count} * (s.pooled_height + s.pooled_width), threads);
}
template <int V>
int64_t pool_blocks(const Sizes& s) {
  return in_blocks(int64_t{s.count} * s.pooled_height * slabs_of<V>(s), kWarps);
}
inline int64_t pool_planes_blocks(const Sizes& s) {
  return s.count * in_blocks(int64_t{s.channels} * s.pooled_height * s.pooled_width, kWarp * kWarps);
}
template <int V>
int64_t pool_backward_blocks(const Sizes& s) {
  return in_blocks(int64_t{s.images} * slabs_of<V>(s) * s.height * in_blocks(s.width, kColumns), kWarps);
}

}  // namespace scrl::roi
