// LARS with SGD momentum for one tensor, once its norms are known: factors, then the update of each element.
#pragma once
#include <cmath>

#include "host_device.h"

namespace scrl {

// A row of `settings`, as scrl_fast/ops/lars_step.py writes it.
struct LarsSettings {
  double lr, momentum, weight_decay, trust_coefficient, eps, grad_scale, mode;
};
constexpr int kLarsSettings = 7;
constexpr double kAdapt = 1, kPlainByLr = 2;  // modes; 0: the gradient is scaled by grad_scale

template <class A>
struct LarsFactors {
  A gradient, decay, momentum, lr;
};

template <class A>
SCRL_HOST_DEVICE LarsFactors<A> lars_factors(const LarsSettings& s, double param_squared, double gradient_squared) {
  double gradient = s.grad_scale, decay = s.weight_decay;
  if (s.mode == kAdapt) {
    const double param_norm = std::sqrt(param_squared), gradient_norm = std::sqrt(gradient_squared);
    const bool no_direction = param_norm == 0 || gradient_norm == 0;
    gradient =
        no_direction ? 1.0 : s.trust_coefficient * param_norm / (gradient_norm + s.weight_decay * param_norm + s.eps);
    decay *= gradient;
  } else if (s.mode == kPlainByLr) {
    gradient = s.lr;
  }
  return {static_cast<A>(gradient), static_cast<A>(decay), static_cast<A>(s.momentum), static_cast<A>(s.lr)};
}

// V: one number or a vector of them
template <class V, class A>
SCRL_HOST_DEVICE void lars_update(V& param, const V& gradient, V& buffer, LarsFactors<A> f) {
  buffer = f.momentum * buffer + (f.gradient * gradient + f.decay * param);
  param = param - f.lr * buffer;
}

}  // namespace scrl
