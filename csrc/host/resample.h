// Separable filtering of pictures: Pillow's antialiased bicubic resize, the resize blur and the Gaussian blur are all an
// Axis (which pixels, with which weights) applied along the rows, rounded to levels, and then down the columns.
//
// Along a row neighbouring results share no vector lane, so sixteen rows are transposed first and each lane holds one of
// them: both passes are then plain multiply-adds on contiguous floats.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/vectorize.h"

namespace scrl_fast::host {

constexpr int kLanes = 16;

constexpr int round_up(int value, int step) { return (value + step - 1) / step * step; }

// Result i is the sum over t < count[i] of weight[i * taps + t] * source[first[i] + t].
struct Axis {
  int taps = 0;
  std::vector<int> first, count;
  std::vector<float> weight;

  void reset(int size, int most_taps) {
    taps = most_taps;
    first.assign(size, 0);
    count.assign(size, 0);
    weight.assign(static_cast<size_t>(size) * most_taps, 0.0f);
  }
  int size() const { return static_cast<int>(first.size()); }
};

inline double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  if (x < 2.0) return ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a;
  return 0.0;
}

// Pillow's rule: the filter widens with the reduction, taps stop at the edges, weights sum to one.
inline void bicubic_axis(int from, int to, Axis& axis) {
  const double scale = static_cast<double>(from) / to, stretch = std::max(scale, 1.0), support = 2.0 * stretch;
  axis.reset(to, 2 * static_cast<int>(std::ceil(support)) + 1);
  for (int i = 0; i < to; ++i) {
    const double centre = (i + 0.5) * scale;
    const int low = std::max(static_cast<int>(centre - support + 0.5), 0);
    const int high = std::min(static_cast<int>(centre + support + 0.5), from);
    float* weight = &axis.weight[static_cast<size_t>(i) * axis.taps];
    double sum = 0.0;
    for (int t = low; t < high; ++t) sum += bicubic((t - centre + 0.5) / stretch);
    for (int t = low; t < high; ++t) {
      weight[t - low] = static_cast<float>(bicubic((t - centre + 0.5) / stretch) / sum);
    }
    axis.first[i] = low;
    axis.count[i] = high - low;
  }
}

// Normalised Gaussian of `taps` (odd) weights, the picture reflected at its edges (the edge pixel is not repeated).
inline void gaussian_axis(int size, int taps, double sigma, Axis& axis) {
  const int half = taps / 2;
  std::vector<double> kernel(half + 1);
  double sum = 0.0;
  for (int k = 0; k <= half; ++k) {
    kernel[k] = std::exp(-0.5 * (k / sigma) * (k / sigma));
    sum += k == 0 ? kernel[k] : 2.0 * kernel[k];
  }
  int reach = half;  // weights below 1e-6 move no pixel of 255 levels
  while (reach > 0 && kernel[reach] < 1e-6 * sum) --reach;
  axis.reset(size, 2 * reach + 1);
  for (int i = 0; i < size; ++i) {
    const int low = std::max(i - reach, 0), high = std::min(i + reach, size - 1);
    axis.first[i] = low;
    axis.count[i] = high - low + 1;
    float* weight = &axis.weight[static_cast<size_t>(i) * axis.taps];
    for (int k = -reach; k <= reach; ++k) {
      int at = std::abs(i + k);
      if (at >= size) at = 2 * (size - 1) - at;
      // a reflected pixel lies within `reach` of i as well, except in pictures narrower than the kernel
      at = std::clamp(at, low, high);
      weight[at - low] += static_cast<float>(kernel[std::abs(k)] / sum);
    }
  }
}

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

// To the nearest level 0..255, as Pillow rounds.
SCRL_INLINE Vec to_level(Vec value) {
  const Vec low = {}, high = low + 255.0f;
  value += 0.5f;
  value = value > low ? value : low;
  value = value < high ? value : high;
  return __builtin_convertvector(__builtin_convertvector(value, IntVec), Vec);
}

// One row of the result, down the columns: level of the sum over t of weight[t] * source[t * stride + j], for j < n, n a
// multiple of sixteen. Four vectors of sums stay in registers over all taps.
SCRL_INLINE void filter_columns(const float* SCRL_RESTRICT source, int64_t stride, const float* SCRL_RESTRICT weight,
                                int count, int n, float* SCRL_RESTRICT out) {
  int j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes) {
    Vec a = {}, b = {}, c = {}, d = {};
    for (int t = 0; t < count; ++t) {
      const Vec* s = reinterpret_cast<const Vec*>(source + t * stride + j);
      a += weight[t] * s[0], b += weight[t] * s[1], c += weight[t] * s[2], d += weight[t] * s[3];
    }
    Vec* o = reinterpret_cast<Vec*>(out + j);
    o[0] = to_level(a), o[1] = to_level(b), o[2] = to_level(c), o[3] = to_level(d);
  }
  for (; j < n; j += kLanes) {
    Vec a = {};
    for (int t = 0; t < count; ++t) a += weight[t] * *reinterpret_cast<const Vec*>(source + t * stride + j);
    *reinterpret_cast<Vec*>(out + j) = to_level(a);
  }
}

// out[j][i] = in[i][j] for 8 x 8 floats: eight lanes, since wider shuffles fall apart into scalars below AVX-512.
SCRL_INLINE void transpose8(const float* SCRL_RESTRICT in, int64_t in_stride, float* SCRL_RESTRICT out,
                            int64_t out_stride) {
  typedef float Half __attribute__((vector_size(32), aligned(4), may_alias));
  Half a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = *reinterpret_cast<const Half*>(in + i * in_stride);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 2
  for (int h = 0; h < 8; h += 4) {
    a[h] = __builtin_shufflevector(b[h], b[h + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    a[h + 1] = __builtin_shufflevector(b[h], b[h + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    a[h + 2] = __builtin_shufflevector(b[h + 1], b[h + 3], 0, 1, 8, 9, 4, 5, 12, 13);
    a[h + 3] = __builtin_shufflevector(b[h + 1], b[h + 3], 2, 3, 10, 11, 6, 7, 14, 15);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    b[i + 4] = __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) *reinterpret_cast<Half*>(out + i * out_stride) = b[i];
}

// Sixteen rows of n floats (n a multiple of eight) become n groups of sixteen lanes.
SCRL_INLINE void rows_to_lanes(const float* SCRL_RESTRICT rows, int64_t stride, int n, float* SCRL_RESTRICT lanes) {
  for (int j = 0; j < n; j += 8) {
    transpose8(rows + j, stride, lanes + j * kLanes, kLanes);
    transpose8(rows + 8 * stride + j, stride, lanes + j * kLanes + 8, kLanes);
  }
}

// The way back, for the first `count` of the sixteen rows only when the picture ends inside the block.
SCRL_INLINE void lanes_to_rows(const float* SCRL_RESTRICT lanes, int n, float* SCRL_RESTRICT rows, int64_t stride) {
  for (int j = 0; j < n; j += 8) {
    transpose8(lanes + j * kLanes, kLanes, rows + j, stride);
    transpose8(lanes + j * kLanes + 8, kLanes, rows + 8 * stride + j, stride);
  }
}

// Along the rows, in lanes: group i of the result from groups (first[i] + t) * step of the source. `mirror` writes the
// result from right to left.
SCRL_INLINE void filter_lanes(const float* SCRL_RESTRICT source, int step, const Axis& axis, bool mirror,
                              float* SCRL_RESTRICT out) {
  const int n = axis.size();
  const int64_t hop = static_cast<int64_t>(step) * kLanes;
  for (int i = 0; i < n; ++i) {
    const float* weight = &axis.weight[static_cast<size_t>(i) * axis.taps];
    const float* s = source + axis.first[i] * hop;
    const int count = axis.count[i];
    Vec even = {}, odd = {};  // two sums hide the latency of one
    int t = 0;
    for (; t + 2 <= count; t += 2) {
      even += weight[t] * *reinterpret_cast<const Vec*>(s + t * hop);
      odd += weight[t + 1] * *reinterpret_cast<const Vec*>(s + (t + 1) * hop);
    }
    if (t < count) even += weight[t] * *reinterpret_cast<const Vec*>(s + t * hop);
    *reinterpret_cast<Vec*>(out + static_cast<int64_t>(mirror ? n - 1 - i : i) * kLanes) = to_level(even + odd);
  }
}

}  // namespace scrl_fast::host
