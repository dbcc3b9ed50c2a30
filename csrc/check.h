// Argument checks for kernels. Messages for users are written in Python, where argument names are known; these guard
// the raw pointers behind torch.ops against calls that bypass it.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>

namespace scrl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLargestInt = (int64_t{1} << 31) - 1;

// The product of sizes, refused beyond `most`. Sizes of an empty tensor may be any: nothing bounds their product.
inline int64_t checked_product(const char* what, int64_t most, std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (int64_t size : sizes)
    STD_TORCH_CHECK(size >= 0 && !__builtin_mul_overflow(product, size, &product) && product <= most, what,
                    ": sizes whose product exceeds ", most);
  return product;
}

inline void check_same(const Tensor& a, const Tensor& b, const char* what) {
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), what, ": dtypes differ");
  STD_TORCH_CHECK(a.numel() == b.numel(), what, ": sizes differ, ", a.numel(), " and ", b.numel());
}

}  // namespace scrl
