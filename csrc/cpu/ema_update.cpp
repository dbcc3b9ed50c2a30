#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "check.h"
#include "cpu/vectorize.h"

namespace {
using torch::stable::Tensor;

SCRL_MULTIVERSION void lerp_range(float* SCRL_RESTRICT t, const float* SCRL_RESTRICT s, float m, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) t[i] = s[i] + m * (t[i] - s[i]);
}

void ema_update_(std::vector<Tensor> targets, std::vector<Tensor> sources, double momentum) {
  for (size_t k = 0; k < targets.size(); ++k) {
    scrl::check_same(targets[k], sources[k], "ema_update_");
    float* t = targets[k].mutable_data_ptr<float>();
    const float* s = sources[k].const_data_ptr<float>();
    torch::stable::parallel_for(0, targets[k].numel(), 1 << 14, [&](int64_t b, int64_t e) { lerp_range(t, s, static_cast<float>(momentum), b, e); });
  }
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scrl_fast, CPU, m) { m.impl("ema_update_", TORCH_BOX(&ema_update_)); }
