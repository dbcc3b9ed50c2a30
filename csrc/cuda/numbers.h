// Numbers given as tensors: read on the host where they live there, by the kernel where they live on the GPU.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <optional>

#include "cuda/chunks.h"
#include "tensor_lists.h"

namespace scrl::cuda {

inline bool on_gpu(const Tensor& tensor) {
  int32_t type = 0;
  STD_TORCH_CHECK(aoti_torch_get_device_type(tensor.get(), &type) == 0, "tensor without device");
  return type == aoti_torch_device_type_cuda();
}

inline int device_of(const Tensor& tensor) { return static_cast<int>(tensor.get_device_index()); }

// Of a list of `places` numbers; a tensor on the host is read for place `place`, one on GPU `device` by the kernel.
inline Number number_of(double factor, const std::optional<Tensor>& tensor, int64_t places, int64_t place, int device,
                        const char* what) {
  check_numbers(tensor, places, what);
  if (!tensor || !on_gpu(*tensor)) return {factor * number_on_host(tensor, place)};
  STD_TORCH_CHECK(device_of(*tensor) == device, what, ": numbers are on GPU ", device_of(*tensor), ", tensors on GPU ",
                  device);
  return {factor, tensor->const_data_ptr(), tensor->scalar_type() == ScalarType::Double, tensor->numel() > 1};
}

inline void check_on_gpu(const std::vector<Tensor>& tensors, const char* what) {
  for (const Tensor& tensor : tensors) STD_TORCH_CHECK(on_gpu(tensor), what, ": a tensor is not on the GPU");
}

}  // namespace scrl::cuda
