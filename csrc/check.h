// Argument checks for kernels. Messages for users are written in Python, where argument names are known; these guard
// the raw pointers behind torch.ops against calls that bypass it.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace scrl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_same(const Tensor& a, const Tensor& b, const char* what) {
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), what, ": dtypes differ");
  STD_TORCH_CHECK(a.numel() == b.numel(), what, ": sizes differ, ", a.numel(), " and ", b.numel());
}

}  // namespace scrl
