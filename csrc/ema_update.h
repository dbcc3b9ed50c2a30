// target = lerp(source, target, momentum), in the form of torch.lerp, so that the bits agree with it.
#pragma once

#include "host_device.h"

namespace scrl {

// Steps from whichever end is nearer: momentum 0 gives the source exactly.
template <class A>
struct EmaFactors {
  A step;            // of (source - target)
  bool from_target;  // else from the source
  bool keep;         // momentum 1: targets stay, whatever the sources hold
};

template <class A>
SCRL_HOST_DEVICE EmaFactors<A> ema_factors(double momentum) {
  const A weight = static_cast<A>(1.0 - momentum);
  const bool from_target = weight < A(0.5);
  return {from_target ? weight : weight - A(1), from_target, weight == A(0)};
}

// V: one number or a vector of them
template <class V, class A>
SCRL_HOST_DEVICE void ema(V& target, const V& source, EmaFactors<A> factors) {
  target = (factors.from_target ? target : source) + factors.step * (source - target);
}

}  // namespace scrl
