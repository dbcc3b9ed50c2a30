// What operations over lists of tensors share: flat memory, chunks, and numbers that may be tensors.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "check.h"

namespace scrl {

// Elements fill their memory without gap or overlap, in whatever order.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<std::pair<int64_t, int64_t>> axes;  // (stride, size), innermost first
  for (size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] != 1) axes.emplace_back(strides[i], sizes[i]);
  std::sort(axes.begin(), axes.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : axes) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Element i of the one's memory belongs to element i of the other's.
inline bool lie_alike(const Tensor& a, const Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.get_device_index() != b.get_device_index()) return false;
  const auto sizes = a.sizes(), other_sizes = b.sizes(), strides = a.strides(), other_strides = b.strides();
  if (sizes.size() != other_sizes.size()) return false;
  for (size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] != other_sizes[i] || (sizes[i] > 1 && strides[i] != other_strides[i])) return false;
  return true;
}

// Python knows the lists' names and says what is wrong (call_on_flat in scrl_fast/ops/_tensor_lists.py).
inline void check_flat(const std::vector<Tensor>& leaders, const char* what) {
  for (const Tensor& tensor : leaders) {
    const ScalarType dtype = tensor.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
                        dtype == ScalarType::Half,
                    what, ": a tensor is not floating");
    STD_TORCH_CHECK(is_dense(tensor), what, ": a tensor has gaps");
    STD_TORCH_CHECK(tensor.get_device_index() == leaders[0].get_device_index(), what, ": several devices");
  }
}

inline void check_alike(const std::vector<Tensor>& leaders, const std::vector<Tensor>& others, const char* what) {
  STD_TORCH_CHECK(leaders.size() == others.size(), what, ": lists of different length");
  for (size_t i = 0; i < leaders.size(); ++i)
    STD_TORCH_CHECK(lie_alike(leaders[i], others[i]), what, ": tensors at ", i, " differ in dtype, device or layout");
}

// The lists of lars_step_; ema_targets[k] belongs to params[ema_places[k]].
inline void check_lars_lists(const std::vector<Tensor>& params, const std::vector<Tensor>& momentum_buffers,
                             const std::vector<Tensor>& ema_targets, const std::vector<Tensor>& grads,
                             const std::vector<int64_t>& ema_places, const std::vector<double>& settings,
                             const std::vector<int64_t>& setting_of) {
  const char* what = "lars_step_";
  check_flat(params, what);
  check_alike(params, momentum_buffers, what);
  check_alike(params, grads, what);
  STD_TORCH_CHECK(ema_places.size() == ema_targets.size(), what, ": a place for each of ema_targets is needed");
  const auto count = static_cast<int64_t>(params.size()), rows = static_cast<int64_t>(settings.size()) / 7;
  for (size_t k = 0; k < ema_targets.size(); ++k) {
    STD_TORCH_CHECK(ema_places[k] >= 0 && ema_places[k] < count, what, ": no parameter at ", ema_places[k]);
    STD_TORCH_CHECK(lie_alike(params[ema_places[k]], ema_targets[k]), what, ": EMA target ", k, " lies differently");
  }
  STD_TORCH_CHECK(setting_of.size() == params.size(), what, ": settings for each parameter are needed");
  for (int64_t row : setting_of) STD_TORCH_CHECK(row >= 0 && row < rows, what, ": no settings at ", row);
}

// Numbers given as factors of a float32 or float64 tensor, if there is one: it has one element for all or one for each.
inline void check_numbers(const std::optional<Tensor>& tensor, int64_t count, const char* what) {
  if (!tensor) return;
  STD_TORCH_CHECK(tensor->numel() == 1 || tensor->numel() == count, what, ": one number or ", count, " are needed");
  STD_TORCH_CHECK(tensor->is_contiguous(), what, ": numbers must be contiguous");
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float || tensor->scalar_type() == ScalarType::Double, what,
                  ": numbers must be float32 or float64");
}

inline double number_on_host(const std::optional<Tensor>& tensor, int64_t place) {
  if (!tensor) return 1;
  if (tensor->numel() == 1) place = 0;
  if (tensor->scalar_type() == ScalarType::Float) return tensor->const_data_ptr<float>()[place];
  return tensor->const_data_ptr<double>()[place];
}

}  // namespace scrl
