// Which pixels make which result along one axis, with which weights: Pillow's bicubic resize, torchvision's Gaussian
// blur.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "host/view.h"

namespace scrl_fast::host {

// Result i is the sum over t < taps of weight[t * pitch + i] * source[first[i] + t], for i < size. What fills up to
// pitch has no weight.
struct Axis {
  int size = 0, taps = 0, pitch = 0;
  std::vector<int> first;
  Buffer<float> weight, offset, sum;

  void reset(int results, int most_taps) {
    size = results, taps = most_taps, pitch = round_up(results, kGroup);
    first.assign(pitch, 0);
    weight.assign(static_cast<size_t>(pitch) * taps, 0.0f);
  }

  // The results in reverse order.
  void mirror() {
    std::reverse(first.begin(), first.begin() + size);
    for (int t = 0; t < taps; ++t) std::reverse(&weight[t * pitch], &weight[t * pitch] + size);
    pad();
  }

  void pad() { std::fill(first.begin() + size, first.end(), first[size - 1]); }
};

SCRL_INLINE float bicubic(float x) {  // a = -0.5; x >= 0
  const float inner = (1.5f * x - 2.5f) * x * x + 1.0f, outer = ((-0.5f * x + 2.5f) * x - 4.0f) * x + 2.0f;
  return x < 1.0f ? inner : (x < 2.0f ? outer : 0.0f);
}

// Pillow's rule: the filter widens with the reduction, taps stop at the edges, weights sum to one.
SCRL_INLINE void bicubic_axis(int from, int to, Axis& axis) {
  const double scale = static_cast<double>(from) / to, stretch = std::max(scale, 1.0), support = 2.0 * stretch;
  axis.reset(to, static_cast<int>(std::min<double>(from, std::ceil(2.0 * support))));
  axis.offset.resize(axis.pitch);
  axis.sum.assign(axis.pitch, 0.0f);
  float* SCRL_RESTRICT offset = axis.offset.data();  // from the centre of the filter to that of the first pixel
  float* SCRL_RESTRICT sum = axis.sum.data();
  for (int i = 0; i < to; ++i) {
    const double centre = (i + 0.5) * scale;
    const int low = static_cast<int>(std::floor(centre - support + 0.5));
    axis.first[i] = std::clamp(low, 0, from - axis.taps);
    offset[i] = static_cast<float>(axis.first[i] + 0.5 - centre);
  }
  const auto shrink = static_cast<float>(1.0 / stretch);
  for (int t = 0; t < axis.taps; ++t) {
    float* SCRL_RESTRICT weight = &axis.weight[static_cast<size_t>(t) * axis.pitch];
    for (int i = 0; i < to; ++i) {
      weight[i] = bicubic(std::fabs((offset[i] + static_cast<float>(t)) * shrink));
      sum[i] += weight[i];
    }
  }
  for (int t = 0; t < axis.taps; ++t) {
    float* SCRL_RESTRICT weight = &axis.weight[static_cast<size_t>(t) * axis.pitch];
    for (int i = 0; i < to; ++i) weight[i] /= sum[i];
  }
  axis.pad();
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
  axis.reset(size, std::min(size, 2 * reach + 1));
  for (int i = 0; i < size; ++i) {
    const int first = axis.first[i] = std::clamp(i - reach, 0, size - axis.taps);
    for (int k = -reach; k <= reach; ++k) {
      int at = std::abs(i + k);
      if (at >= size) at = 2 * (size - 1) - at;
      // a reflected pixel lies within `reach` of i as well
      axis.weight[static_cast<size_t>(at - first) * axis.pitch + i] += static_cast<float>(kernel[std::abs(k)] / sum);
    }
  }
  axis.pad();
}

}  // namespace scrl_fast::host
