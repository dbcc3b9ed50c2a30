// RoIAlign's geometry: which cells of the map a bin reads, and with what weight, one axis at a time.
//
// The operation is linear and separable: out[bin_y, bin_x] = sum_ij wy[bin_y, i] wx[bin_x, j] map[i, j]. This header
// yields wy and wx; forward and backward, on CPU and GPU, differ only in which side of the sum they walk.
// Semantics and order of operations are torchvision's, so that rounding a bin's size up gives the same sample count.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "host_device.h"

namespace scrl::roi {

// A product that is rounded before it is added to anything: a fused multiply-add would move samples by one rounding,
// and the GPU's boxes away from the CPU's.
SCRL_HOST_DEVICE float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
SCRL_HOST_DEVICE double multiply(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// A bin and axis; more refines nothing, and a box that lies on one spot would be walked for hours.
constexpr int64_t kMostSamples = 4096;

template <class T>
SCRL_HOST_DEVICE bool is_finite(T value) {
  return std::fabs(value) <= std::numeric_limits<T>::max();  // false for NaN
}

// Where one axis of a box lies on the map, in cells. samples is a count, kept as T: it may exceed any integer.
template <class T>
struct Axis {
  T start, bin, samples;
};

// Returns false for a box that cannot be sampled: an edge or the extent is NaN or infinite.
template <class T>
SCRL_HOST_DEVICE bool make_axis(T low, T high, T scale, int64_t bins, int64_t sampling_ratio, bool aligned,
                                Axis<T>& axis) {
  const T offset = aligned ? T(0.5) : T(0);
  const T start = multiply(low, scale) - offset;
  T extent = (multiply(high, scale) - offset) - start;
  const bool finite = is_finite(start) && is_finite(extent);
  if (!aligned && extent < T(1)) extent = T(1);  // -inf included: asked before
  axis.start = start;
  axis.bin = extent / static_cast<T>(bins);
  axis.samples = sampling_ratio > 0 ? static_cast<T>(sampling_ratio) : std::ceil(axis.bin);
  return finite;
}

// Calls emit(cell, weight) for every cell in [0, size) that the bin reads; a cell may come more than once.
template <class T, class Emit>
SCRL_HOST_DEVICE void for_each_tap(const Axis<T>& axis, int64_t bin, int64_t size, const Emit& emit) {
  if (!(axis.samples >= T(1) && axis.samples <= T(2147483648.0))) return;  // empty; or a share of the map below 1e-9
  const T first = axis.start + multiply(static_cast<T>(bin), axis.bin);
  int64_t begin = 0, end = static_cast<int64_t>(axis.samples);
  if (end > 64 && axis.bin > T(0)) {  // a huge box: walk only the samples near the map, whatever its size
    const T per_cell = axis.samples / axis.bin, slack = T(3) + axis.samples * std::numeric_limits<T>::epsilon() * T(8);
    const T below = (T(-1) - first) * per_cell - slack, above = (static_cast<T>(size) - first) * per_cell + slack;
    if (!(below < axis.samples && above > T(0))) return;
    if (below > T(0)) begin = static_cast<int64_t>(below);
    if (above < axis.samples) end = static_cast<int64_t>(above);
  }
  const T share = T(1) / axis.samples;
  for (int64_t i = begin; i < end; ++i) {
    T position = first + multiply(static_cast<T>(i) + T(0.5), axis.bin) / axis.samples;
    if (!(position >= T(-1) && position <= static_cast<T>(size))) continue;
    if (position < T(0)) position = T(0);
    const int64_t cell = static_cast<int64_t>(position);
    if (cell >= size - 1) {
      emit(size - 1, share);
      continue;
    }
    const T fraction = position - static_cast<T>(cell);
    emit(cell, (T(1) - fraction) * share);
    if (fraction > T(0)) emit(cell + 1, fraction * share);
  }
}

// The image a box belongs to, or -1 when it is none of [0, images).
template <class T>
SCRL_HOST_DEVICE int64_t image_of(T index, int64_t images) {
  return index >= T(0) && index < static_cast<T>(images) ? static_cast<int64_t>(index) : -1;
}

}  // namespace scrl::roi
