// RoIAlign on the GPU, maps of any size: pooling. A warp reads the cells that a bin needs. No atomics anywhere, no
// synchronisation with the host.
#pragma once
#include "cuda/roi_align_weights.h"

namespace scrl::roi {

template <int V, class T>
__device__ __forceinline__ void add(accumulate_t<T> (&sum)[V], accumulate_t<T> weight, const Pack<T, V>& values) {
#pragma unroll
  for (int v = 0; v < V; ++v) sum[v] += weight * widen(values.values[v]);
}

// V x 32 channels of a bin, into the lanes' sums. map: the lane's first channel of the image. Columns are visited two
// at a time, for two loads in flight.
template <int V, class T, class R>
__device__ __forceinline__ void pool_bin(R (&sum)[V], const T* __restrict__ map, const Strides& stride,
                                         const BinWeights<R>& y, const BinWeights<R>& x) {
  const int lane = threadIdx.x % kWarp;
  for (int base = x.begin; base < x.end; base += kWarp) {
    const R mine = x.at(base + lane);
    const unsigned with_weight = __ballot_sync(kAll, mine != R(0));
    for (int i = y.begin; i < y.end; ++i) {
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
}

template <class T, int V>
__device__ __forceinline__ Pack<T, V> narrowed(const accumulate_t<T> (&sum)[V], bool known) {
  Pack<T, V> result;
#pragma unroll
  for (int v = 0; v < V; ++v)
    result.values[v] = narrow<T>(known ? sum[v] : std::numeric_limits<accumulate_t<T>>::quiet_NaN());
  return result;
}

// map [images, channels, height, width] by its strides -> out [count, channels, pooled_height, pooled_width], dense.
// A warp does V x 32 channels of a row of bins of a box.
template <class T, int V>
__global__ void __launch_bounds__(kWarp* kWarps, 2)
    pool(const T* __restrict__ map, Strides stride, Workspace<accumulate_t<T>> w, T* __restrict__ out, Sizes s) {
  using R = accumulate_t<T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  const int slabs = slabs_of<V>(s);
  const int64_t row = warp / slabs;  // box and row of bins
  if (row >= int64_t{s.count} * s.pooled_height) return;
  const int64_t k = row / s.pooled_height;
  const int p = static_cast<int>(row % s.pooled_height);
  const int channel = (static_cast<int>(warp % slabs) * kWarp + lane) * V;
  const bool inside = channel < s.channels;  // lanes beyond read channel 0, so that all take part in the votes
  const int image = w.image[k];
  map += max(image, 0) * stride.image + (inside ? channel : 0) * stride.channel;
  out += ((k * s.channels + channel) * s.pooled_height + p) * s.pooled_width;
  const int64_t bin_stride = int64_t{s.pooled_height} * s.pooled_width;
  const BinWeights<R> y = w.y.of(k, p);

  for (int q = 0; q < s.pooled_width; ++q) {
    R sum[V] = {};
    pool_bin<V>(sum, map, stride, y, w.x.of(k, q));
    if (!inside) continue;
    const auto result = narrowed<T, V>(sum, image >= 0);
    if (bin_stride == 1) {
      scrl::cuda::store_global(out, result);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) out[v * bin_stride + q] = result.values[v];
    }
  }
}

extern __shared__ uint4 tile_memory[];  // dynamic, 16 bytes aligned

template <class T, int V>
int64_t staged_bytes(const Sizes& s) {
  return int64_t{s.pooled_height} * s.pooled_width * kWarp * V * static_cast<int64_t>(sizeof(T));
}
template <class T, int V>
bool can_be_staged(const Sizes& s) {
  return s.pooled_height * s.pooled_width > 1 && staged_bytes<T, V>(s) <= 48 * 1024;
}

// The same shapes, several bins a box. A block does V x 32 channels of all bins of a box, which lie in one piece of the
// result: they are put together in shared memory and written side by side. Written by `pool`, one number at a time,
// each would take a sector of 32 bytes for itself.
template <class T, int V>
__global__ void __launch_bounds__(kWarp* kWarps, 2)
    pool_staged(const T* __restrict__ map, Strides stride, Workspace<accumulate_t<T>> w, T* __restrict__ out, Sizes s) {
  using R = accumulate_t<T>;
  const int lane = threadIdx.x % kWarp, slabs = slabs_of<V>(s), bins = s.pooled_height * s.pooled_width;
  const int64_t k = blockIdx.x / slabs;
  const int first_channel = static_cast<int>(blockIdx.x % slabs) * kWarp * V;
  const int channels = min(kWarp * V, s.channels - first_channel), channel = lane * V;
  const bool inside = channel < channels;
  const int image = w.image[k];
  map += max(image, 0) * stride.image + (first_channel + (inside ? channel : 0)) * stride.channel;
  T* const staged = reinterpret_cast<T*>(tile_memory);  // [channels][bins]
  for (int bin = static_cast<int>(threadIdx.x) / kWarp; bin < bins; bin += kWarps) {
    R sum[V] = {};
    pool_bin<V>(sum, map, stride, w.y.of(k, bin / s.pooled_width), w.x.of(k, bin % s.pooled_width));
    if (!inside) continue;
    const auto result = narrowed<T, V>(sum, image >= 0);
#pragma unroll
    for (int v = 0; v < V; ++v) staged[(channel + v) * bins + bin] = result.values[v];
  }
  __syncthreads();
  out += (k * s.channels + first_channel) * bins;
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x) * V; i < channels * bins; i += kWarp * kWarps * V)
    scrl::cuda::store_global(out + i, scrl::cuda::load<V>(staged + i));
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
  const int channel = element / bins;
  const int image = w.image[k];
  R sum = image < 0 ? std::numeric_limits<R>::quiet_NaN() : R(0);
  const BinWeights<R> y = w.y.of(k, element % bins / s.pooled_width);  // empty where there is no image
  const BinWeights<R> x = w.x.of(k, element % s.pooled_width);
  map += max(image, 0) * stride.image + channel * stride.channel;
  for (int i = y.begin; i < y.end; ++i) {
    const R weight = y[i];
    if (weight == R(0)) continue;
    const T* cells = map + i * stride.row;
    R of_row = 0;
    for (int j = x.begin; j < x.end; ++j) {
      const R weight_x = x[j];
      if (weight_x != R(0)) of_row += weight_x * widen(cells[j * stride.column]);
    }
    sum += weight * of_row;
  }
  out[k * s.channels * bins + element] = narrow<T>(sum);
}

// ---- blocks of a launch ----

template <int V>
int64_t pool_blocks(const Sizes& s) {
  return in_blocks(int64_t{s.count} * s.pooled_height * slabs_of<V>(s), kWarps);
}
template <int V>
int64_t pool_staged_blocks(const Sizes& s) {
  return int64_t{s.count} * slabs_of<V>(s);
}
inline int64_t pool_planes_blocks(const Sizes& s) {
  return s.count * in_blocks(int64_t{s.channels} * s.pooled_height * s.pooled_width, kWarp * kWarps);
}

}  // namespace scrl::roi
