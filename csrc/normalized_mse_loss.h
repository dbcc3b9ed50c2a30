// Squared distance of two L2-normalised rows, from their three dot products: loss and the factors of its gradient.
#pragma once
#include <cmath>

#include "host_device.h"

namespace scrl {

// With x^ = x / max(|x|, eps), t^ likewise (torch.nn.functional.normalize):
//   loss   = 2 - 2 x^.t^
//   d/dx   = across * t + from_input * x      d/dt = across * x + from_target * t
// where across = -2 / (max(|x|, eps) max(|t|, eps)) and from_input = 2 x^.t^ / |x|^2, or 0 where |x| < eps: there the
// denominator is a constant. NaN and infinity pass through.
template <class T>
struct NormalizedMse {
  T loss, across, from_input, from_target;
};

template <class T>
SCRL_HOST_DEVICE NormalizedMse<T> normalized_mse(T input_squared, T target_squared, T dot, T gradient_scale) {
  const T eps = static_cast<T>(1e-12);
  const T input_norm = std::sqrt(input_squared), target_norm = std::sqrt(target_squared);
  const bool input_small = input_norm < eps, target_small = target_norm < eps;
  const T input_inverse = T(1) / (input_small ? eps : input_norm);
  const T target_inverse = T(1) / (target_small ? eps : target_norm);
  const T across = input_inverse * target_inverse;
  const T cosine = dot * across, twice = T(2) * gradient_scale;
  return {T(2) - T(2) * cosine, -twice * across, input_small ? T(0) : twice * cosine * input_inverse * input_inverse,
          target_small ? T(0) : twice * cosine * target_inverse * target_inverse};
}

}  // namespace scrl
