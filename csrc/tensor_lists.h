// What operations over lists of tensors share: flat memory, and numbers that may be tensors.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "check.h"

namespace scrl {

// What is asked of every tensor of every list in every call: read once each, through the plainest functions there are.
// (Tensor::scalar_type() compares with one dtype after the other, each a call into PyTorch.)
struct Facts {
  int32_t dtype, device;
  int64_t dim, count;
  const int64_t *sizes, *strides;
};

inline Facts facts_of(AtenTensorHandle tensor) {
  Facts facts;
  int64_t *sizes, *strides;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &facts.dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor, &facts.device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &facts.dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(tensor, &facts.count));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
  facts.sizes = sizes;
  facts.strides = strides;
  return facts;
}

// The floating dtype behind PyTorch's number for it; Undefined for any other.
inline ScalarType floating_dtype(int32_t dtype) {
  static const int32_t f32 = aoti_torch_dtype_float32(), f64 = aoti_torch_dtype_float64(),
                       bf16 = aoti_torch_dtype_bfloat16(), f16 = aoti_torch_dtype_float16();
  if (dtype == f32) return ScalarType::Float;
  if (dtype == f64) return ScalarType::Double;
  if (dtype == bf16) return ScalarType::BFloat16;
  return dtype == f16 ? ScalarType::Half : ScalarType::Undefined;
}

inline int64_t floating_bytes(int32_t dtype) {
  const ScalarType type = floating_dtype(dtype);
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

inline ScalarType floating_dtype(const Tensor& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return floating_dtype(dtype);
}

// Elements fill their memory without gap or overlap, in whatever order.
inline bool is_dense(const Facts& tensor) {
  if (tensor.count == 0) return true;
  int64_t contiguous = 1, axis = tensor.dim;
  while (axis > 0 && (tensor.sizes[axis - 1] == 1 || tensor.strides[axis - 1] == contiguous))
    contiguous *= tensor.sizes[--axis];
  if (axis == 0) return true;
  std::vector<std::pair<int64_t, int64_t>> axes;  // (stride, size), innermost first
  for (int64_t i = 0; i < tensor.dim; ++i)
    if (tensor.sizes[i] != 1) axes.emplace_back(tensor.strides[i], tensor.sizes[i]);
  std::sort(axes.begin(), axes.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : axes) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Element i of the one's memory belongs to element i of the other's.
inline bool lie_alike(const Facts& a, const Facts& b) {
  if (a.dtype != b.dtype || a.device != b.device || a.dim != b.dim) return false;
  for (int64_t i = 0; i < a.dim; ++i)
    if (a.sizes[i] != b.sizes[i] || (a.count > 1 && a.sizes[i] > 1 && a.strides[i] != b.strides[i])) return false;
  return true;
}

// A list that is handed over, with its tensors. As std::vector<Tensor> each of them would be counted in a block of its
// own, whose allocation alone took as long as all that is asked of the tensor.
class TensorList {
 public:
  explicit TensorList(StableListHandle list) noexcept : list_(list) { torch_list_size(list, &size_); }
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;
  ~TensorList() {
    for (size_t i = 0; i < size_; ++i) aoti_torch_delete_tensor_object(i < tensors_.size() ? tensors_[i] : in_list(i));
    torch_delete_list(list_);
  }

  // To be called before tensors are asked for, and when every list has an owner: this may throw.
  void take() {
    tensors_.reserve(size_);
    for (size_t i = 0; i < size_; ++i) tensors_.push_back(in_list(i));
  }
  size_t size() const { return size_; }
  AtenTensorHandle operator[](size_t i) const { return tensors_[i]; }

 private:
  AtenTensorHandle in_list(size_t i) const {
    StableIValue item = 0;
    torch_list_get_item(list_, i, &item);  // fails beyond the list only
    return torch::stable::detail::to<AtenTensorHandle>(item);
  }

  StableListHandle list_;
  size_t size_ = 0;
  std::vector<AtenTensorHandle> tensors_;
};

inline AtenTensorHandle handle_at(const TensorList& list, size_t i) { return list[i]; }
inline AtenTensorHandle handle_at(const std::vector<Tensor>& list, size_t i) { return list[i].get(); }

inline void* mutable_data(AtenTensorHandle tensor) {
  void* data;
  TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(tensor, &data));
  return data;
}

inline const void* const_data(AtenTensorHandle tensor) {
  const void* data;
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor, &data));
  return data;
}

// The memory of the dense tensors of a call. A tensor that is written shares none of it with any other: threads go
// through the lists in no order. Python finds out which two they are (check_memory in scrl_fast/ops/_tensor_lists.py).
class Memory {
 public:
  explicit Memory(size_t tensors) { ranges_.reserve(tensors); }

  void add(const void* data, int64_t bytes, bool written) {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    if (bytes > 0) ranges_.push_back({begin, begin + static_cast<uintptr_t>(bytes), written});
  }
  void add(const std::optional<Tensor>& tensor, bool written) {
    if (tensor) add(tensor->const_data_ptr(), tensor->numel() * static_cast<int64_t>(tensor->element_size()), written);
  }

  void check(const char* what) {
    std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    uintptr_t written_end = 0, any_end = 0;
    for (const Range& range : ranges_) {
      STD_TORCH_CHECK(range.begin >= (range.written ? any_end : written_end), what,
                      ": a tensor that is written shares memory with another");
      any_end = std::max(any_end, range.end);
      if (range.written) written_end = std::max(written_end, range.end);
    }
  }

 private:
  struct Range {
    uintptr_t begin, end;
    bool written;
  };

  std::vector<Range> ranges_;
};

// Tensors of each list lie like the leader at their place, which is floating and dense, on the first one's device:
// visit(facts of the leader, leader, others...) for each place in turn, up to the first that does not fit.
// Python knows the lists' names and says what is wrong (call_on_flat in scrl_fast/ops/_tensor_lists.py).
template <class Visit, class Leaders, class... Others>
void visit_alike(const char* what, const Visit& visit, const Leaders& leaders, const Others&... others) {
  STD_TORCH_CHECK(((others.size() == leaders.size()) && ...), what, ": lists of different length");
  int32_t device = 0;
  const auto check = [&](size_t i, AtenTensorHandle leader, const auto... rest) {
    const Facts facts = facts_of(leader);
    if (i == 0) device = facts.device;
    STD_TORCH_CHECK(floating_dtype(facts.dtype) != ScalarType::Undefined, what, ": a tensor is not floating");
    STD_TORCH_CHECK(is_dense(facts), what, ": a tensor has gaps");
    STD_TORCH_CHECK(facts.device == device, what, ": several devices");
    STD_TORCH_CHECK((lie_alike(facts, facts_of(rest)) && ...), what, ": tensors at ", i,
                    " differ in dtype, device or layout");
    visit(facts, leader, rest...);
  };
  for (size_t i = 0; i < leaders.size(); ++i) check(i, handle_at(leaders, i), handle_at(others, i)...);
}

// The lists of ema_update_: targets, sources [P]; a source may be its own target. visit(facts, target, source) for
// each.
template <class List, class Visit>
void visit_ema_lists(const List& targets, const List& sources, const std::optional<Tensor>& momentum,
                     const Visit& visit) {
  Memory memory(2 * targets.size() + 1);
  memory.add(momentum, false);
  visit_alike(
      "ema_update_",
      [&](const Facts& facts, AtenTensorHandle target, AtenTensorHandle source) {
        const void *written = const_data(target), *read = const_data(source);
        const int64_t bytes = facts.count * floating_bytes(facts.dtype);
        memory.add(written, bytes, true);
        if (read != written) memory.add(read, bytes, false);
        visit(facts, target, source);
      },
      targets, sources);
  memory.check("ema_update_");
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
