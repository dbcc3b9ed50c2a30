#include "roi_align.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>
#include <vector>

#include "check.h"

namespace {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Problem {
  const void* boxes;
  int64_t count, images, channels, height, width, pooled_height, pooled_width, sampling_ratio;
  int64_t stride[4];  // of the map
  double scale;
  bool aligned;
};

// Dense weights [bins, size] of one axis.
template <class T>
void dense(const scrl::roi::Axis<T>& axis, int64_t bins, int64_t size, std::vector<T>& weights) {
  weights.assign(bins * size, T(0));
  for (int64_t bin = 0; bin < bins; ++bin)
    scrl::roi::for_each_tap(axis, bin, size, [&](int64_t cell, T weight) { weights[bin * size + cell] += weight; });
}

template <class T>
bool weights_of(const Problem& p, int64_t k, std::vector<T>& wy, std::vector<T>& wx) {
  const T* box = static_cast<const T*>(p.boxes) + 5 * k;
  scrl::roi::Axis<T> y, x;
  bool fine = scrl::roi::make_axis(box[2], box[4], T(p.scale), p.pooled_height, p.sampling_ratio, p.aligned, y);
  fine = scrl::roi::make_axis(box[1], box[3], T(p.scale), p.pooled_width, p.sampling_ratio, p.aligned, x) && fine;
  if (!fine) return false;
  dense(y, p.pooled_height, p.height, wy);
  dense(x, p.pooled_width, p.width, wx);
  return true;
}

template <class T, class Visit>  // visit(output bin, map cell offset, weight)
void visit_box(const Problem& p, const std::vector<T>& wy, const std::vector<T>& wx, const Visit& visit) {
  for (int64_t a = 0; a < p.pooled_height; ++a)
    for (int64_t b = 0; b < p.pooled_width; ++b)
      for (int64_t i = 0; i < p.height; ++i)
        for (int64_t j = 0; j < p.width && wy[a * p.height + i] != 0; ++j)
          if (wx[b * p.width + j] != 0)
            visit(a * p.pooled_width + b, i * p.stride[2] + j * p.stride[3], wy[a * p.height + i] * wx[b * p.width + j]);
}

template <class S>
void forward(const Problem& p, const void* input, void* output) {
  using T = std::conditional_t<std::is_same_v<S, double>, double, float>;
  const int64_t bins = p.pooled_height * p.pooled_width;
  torch::stable::parallel_for(0, p.count, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> wy, wx, sum(bins);
    for (int64_t k = begin; k < end; ++k) {
      const bool fine = weights_of(p, k, wy, wx);
      const S* map = static_cast<const S*>(input) + static_cast<int64_t>(static_cast<const T*>(p.boxes)[5 * k]) * p.stride[0];
      for (int64_t c = 0; c < p.channels; ++c) {
        sum.assign(bins, fine ? T(0) : std::numeric_limits<T>::quiet_NaN());
        if (fine)
          visit_box(p, wy, wx, [&](int64_t bin, int64_t at, T w) { sum[bin] += w * static_cast<T>(map[c * p.stride[1] + at]); });
        for (int64_t bin = 0; bin < bins; ++bin)
          static_cast<S*>(output)[(k * p.channels + c) * bins + bin] = static_cast<S>(sum[bin]);
      }
    }
  });
}

template <class S>
void backward(const Problem& p, const void* grad, void* out) {
  using T = std::conditional_t<std::is_same_v<S, double>, double, float>;
  const int64_t bins = p.pooled_height * p.pooled_width, cells = p.height * p.width;
  torch::stable::parallel_for(0, p.images, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> wy, wx, slab(p.channels * cells);
    for (int64_t n = begin; n < end; ++n) {
      slab.assign(p.channels * cells, T(0));
      for (int64_t k = 0; k < p.count; ++k) {
        if (static_cast<int64_t>(static_cast<const T*>(p.boxes)[5 * k]) != n || !weights_of(p, k, wy, wx)) continue;
        Problem dense_map = p;
        dense_map.stride[2] = p.width, dense_map.stride[3] = 1;
        const S* g = static_cast<const S*>(grad) + k * p.channels * bins;
        for (int64_t c = 0; c < p.channels; ++c)
          visit_box(dense_map, wy, wx, [&](int64_t bin, int64_t at, T w) { slab[c * cells + at] += w * static_cast<T>(g[c * bins + bin]); });
      }
      for (int64_t c = 0; c < p.channels; ++c)
        for (int64_t i = 0; i < p.height; ++i)
          for (int64_t j = 0; j < p.width; ++j)
            static_cast<S*>(out)[n * p.stride[0] + c * p.stride[1] + i * p.stride[2] + j * p.stride[3]] =
                static_cast<S>(slab[c * cells + i * p.width + j]);
    }
  });
}

template <class T>
void check_index(const Problem& p) {
  for (int64_t k = 0; k < p.count; ++k) {
    const T index = static_cast<const T*>(p.boxes)[5 * k];
    STD_TORCH_CHECK(scrl::roi::image_of(index, p.images) >= 0, "boxes: row ", k, " has image index ", index, ", outside 0..",
                    p.images - 1);
  }
}

Problem problem_of(const Tensor& map, const Tensor& boxes, double scale, int64_t sampling_ratio, bool aligned) {
  Problem p{};
  p.boxes = boxes.const_data_ptr();
  p.count = boxes.size(0);
  p.images = map.size(0), p.channels = map.size(1), p.height = map.size(2), p.width = map.size(3);
  for (int d = 0; d < 4; ++d) p.stride[d] = map.stride(d);
  p.scale = scale, p.sampling_ratio = sampling_ratio, p.aligned = aligned;
  map.scalar_type() == ScalarType::Double ? check_index<double>(p) : check_index<float>(p);
  return p;
}

template <class F>
void dispatch(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(c10::BFloat16{});
    case ScalarType::Half: return f(c10::Half{});
    default: STD_TORCH_CHECK(false, "roi_align: dtype not supported");
  }
}

Tensor roi_align(const Tensor& input, const Tensor& boxes_in, double scale, int64_t pooled_height, int64_t pooled_width,
                 int64_t sampling_ratio, bool aligned) {
  Tensor boxes = torch::stable::contiguous(boxes_in);
  Problem p = problem_of(input, boxes, scale, sampling_ratio, aligned);
  p.pooled_height = pooled_height, p.pooled_width = pooled_width;
  Tensor output = torch::stable::new_empty(input, {p.count, p.channels, pooled_height, pooled_width});
  dispatch(input.scalar_type(), [&](auto s) { forward<decltype(s)>(p, input.const_data_ptr(), output.mutable_data_ptr()); });
  return output;
}

void roi_align_backward_out(const Tensor& grad_in, const Tensor& boxes_in, double scale, int64_t sampling_ratio,
                            bool aligned, Tensor out) {
  Tensor boxes = torch::stable::contiguous(boxes_in), grad = torch::stable::contiguous(grad_in);
  Problem p = problem_of(out, boxes, scale, sampling_ratio, aligned);
  p.pooled_height = grad.size(2), p.pooled_width = grad.size(3);
  dispatch(out.scalar_type(), [&](auto s) { backward<decltype(s)>(p, grad.const_data_ptr(), out.mutable_data_ptr()); });
}

Tensor roi_align_backward(const Tensor& grad, const Tensor& boxes, double scale, int64_t sampling_ratio, bool aligned,
                          std::vector<int64_t> size, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  Tensor out = torch::stable::empty(size, grad.scalar_type(), std::nullopt, grad.device(), std::nullopt,
                                    channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  roi_align_backward_out(grad, boxes, scale, sampling_ratio, aligned, out);
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scrl_fast, CPU, m) {
  m.impl("roi_align", TORCH_BOX(&roi_align));
  m.impl("roi_align_backward", TORCH_BOX(&roi_align_backward));
  m.impl("roi_align_backward_out", TORCH_BOX(&roi_align_backward_out));
}
