#include "roi_align.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/pages.h"
#include "cpu/roi_align_boxes.h"

namespace scrl::roi {
namespace {
using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

constexpr int64_t kGroup = 32;             // boxes whose weights are held at once in the forward pass
constexpr int64_t kChannelsAtOnce = 64;    // channel ranges are multiples of it
constexpr int64_t kStreamBytes = 8 << 20;  // results from this size on are written past the caches

// Counting sort by image. Refuses an index outside the batch before anything else looks at it.
template <class T>
void group_by_image(Problem& p) {
  const T* boxes = static_cast<const T*>(p.boxes);
  for (int64_t k = 0; k < p.count; ++k)
    STD_TORCH_CHECK(image_of(boxes[5 * k], p.images) >= 0, "roi_align: boxes row ", k, " has image index ",
                    boxes[5 * k], ", outside 0..", p.images - 1);
  if (p.nothing()) return;  // without channels there may be more images than memory could list
  p.first.assign(p.images + 1, 0);
  p.order.resize(p.count);
  for (int64_t k = 0; k < p.count; ++k) ++p.first[static_cast<int64_t>(boxes[5 * k])];
  int32_t total = 0;
  for (int32_t& first : p.first) total += first, first = total;
  for (int64_t k = p.count - 1; k >= 0; --k)
    p.order[--p.first[static_cast<int64_t>(boxes[5 * k])]] = static_cast<int32_t>(k);
}

Problem make_problem(const Tensor& map, const Tensor& pooled, const Tensor& boxes, double scale, int64_t sampling_ratio,
                     bool aligned) {
  const ScalarType box_dtype = map.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(map.dim() == 4 && pooled.dim() == 4, "roi_align: the map must be [N, C, H, W], bins [K, C, h, w]");
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 5, "roi_align: boxes must be [K, 5]");
  STD_TORCH_CHECK(map.is_cpu() && pooled.is_cpu(), "roi_align: map, boxes and pooled gradient must be on the CPU");
  STD_TORCH_CHECK(sampling_ratio <= kMostSamples, "roi_align: sampling_ratio must be at most ", kMostSamples);
  STD_TORCH_CHECK(boxes.is_cpu() && boxes.scalar_type() == box_dtype,
                  "roi_align: boxes must be float64 for a float64 map, else float32, on the CPU");
  STD_TORCH_CHECK(pooled.scalar_type() == map.scalar_type(), "roi_align: dtypes of map and pooled gradient differ");
  STD_TORCH_CHECK(pooled.size(0) == boxes.size(0) && pooled.size(1) == map.size(1),
                  "roi_align: the pooled gradient must be [K, C, h, w]");
  Problem p{};
  p.boxes = boxes.const_data_ptr();
  p.count = boxes.size(0);
  p.images = map.size(0), p.channels = map.size(1), p.height = map.size(2), p.width = map.size(3);
  p.pooled_height = pooled.size(2), p.pooled_width = pooled.size(3);
  p.scale = scale, p.sampling_ratio = sampling_ratio, p.aligned = aligned;
  p.image_stride = map.stride(0), p.channel_stride = map.stride(1), p.row_stride = map.stride(2),
  p.column_stride = map.stride(3);
  for (int64_t size : {p.count, p.images, p.channels, p.height, p.width})
    STD_TORCH_CHECK(size < kLargestInt, "roi_align: too many boxes, images, channels or cells");
  STD_TORCH_CHECK(p.pooled_height > 0 && p.pooled_width > 0, "roi_align: a box must have bins");
  checked_product("roi_align: bins of a box", kLargestInt, {p.pooled_height, p.pooled_width});
  STD_TORCH_CHECK(p.count == 0 || p.cells() > 0, "roi_align: the map has no cells");
  box_dtype == ScalarType::Double ? group_by_image<double>(p) : group_by_image<float>(p);
  return p;
}

// Enough pieces of similar size for every thread to take several, cut along channels only where there are few.
template <class Run>
void run_pieces(const Problem& p, int64_t pieces, const Run& run) {
  if (pieces == 0) return;
  const int64_t wanted = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t blocks = (p.channels + kChannelsAtOnce - 1) / kChannelsAtOnce;
  const int64_t ranges = std::clamp<int64_t>((wanted + pieces - 1) / pieces, 1, blocks);
  Work work{};
  work.channels_a_range = (blocks + ranges - 1) / ranges * kChannelsAtOnce;
  work.channel_ranges = (p.channels + work.channels_a_range - 1) / work.channels_a_range;
  work.pieces = pieces * work.channel_ranges;
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(0, work.pieces, 1, [&](int64_t, int64_t) {
    try {
      run(p, work);
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  });
  STD_TORCH_CHECK(!failed, "roi_align: out of memory");
}

using Run = void (*)(const Problem&, Work&);
Run choose(ScalarType dtype, Run f32, Run f64, Run bf16, Run f16) {
  switch (dtype) {
    case ScalarType::Float:
      return f32;
    case ScalarType::Double:
      return f64;
    case ScalarType::BFloat16:
      return bf16;
    case ScalarType::Half:
      return f16;
    default:
      STD_TORCH_CHECK(false, "roi_align: dtype must be float32, float64, bfloat16 or float16");
  }
}

// A call through the dispatcher less where there is nothing to do.
Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

// input [N, C, H, W], boxes [K, 5] -> [K, C, pooled_height, pooled_width]
Tensor roi_align(const Tensor& input, const Tensor& boxes_in, double scale, int64_t pooled_height, int64_t pooled_width,
                 int64_t sampling_ratio, bool aligned) {
  const Tensor boxes = dense(boxes_in);
  const bool in_place = input.stride(1) == 1 || input.stride(3) == 1;
  const Tensor map = in_place ? input : dense(input);
  Tensor pooled = torch::stable::new_empty(input, {boxes.size(0), input.size(1), pooled_height, pooled_width});
  Problem p = make_problem(map, pooled, boxes, scale, sampling_ratio, aligned);
  if (pooled.numel() == 0) return pooled;
  p.source = map.const_data_ptr(), p.result = pooled.mutable_data_ptr();
  scrl::advise_large_pages(p.result, pooled.numel() * pooled.element_size());
  for (int32_t image = 0; image < p.images; ++image)
    for (int32_t begin = p.first[image]; begin < p.first[image + 1]; begin += kGroup)
      p.groups.push_back({image, begin, std::min<int32_t>(begin + kGroup, p.first[image + 1])});
  run_pieces(p, p.groups.size(), choose(map.scalar_type(), forward_float, forward_double, forward_bf16, forward_f16));
  return pooled;
}

// Elements lie apart. Says no of some tensors of which that is true, none of which PyTorch makes by itself.
bool without_overlap(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> axes;  // (stride, size), innermost first
  for (int64_t i = 0; i < tensor.dim(); ++i)
    if (tensor.size(i) > 1) axes.emplace_back(tensor.stride(i), tensor.size(i));
  std::sort(axes.begin(), axes.end());
  int64_t extent = 1;
  for (const auto& [stride, size] : axes) {
    if (stride < extent) return false;
    extent += (size - 1) * stride;
  }
  return true;
}

// grad [K, C, h, w], boxes [K, 5] -> out [N, C, H, W], every element of which is written
void roi_align_backward_out(const Tensor& grad_in, const Tensor& boxes_in, double scale, int64_t sampling_ratio,
                            bool aligned, Tensor out) {
  STD_TORCH_CHECK(out.dim() == 4 && (out.numel() == 0 || without_overlap(out)),
                  "roi_align: out must be [N, C, H, W], without overlap");
  const Tensor boxes = dense(boxes_in), grad = dense(grad_in);
  const bool side_by_side = out.stride(1) == 1;
  const bool planes = out.stride(3) == 1 && out.stride(2) == out.size(3);
  Tensor map = side_by_side || planes ? out : torch::stable::new_empty(out, out.sizes());
  Problem p = make_problem(map, grad, boxes, scale, sampling_ratio, aligned);
  if (p.nothing()) return;
  p.source = grad.const_data_ptr(), p.result = map.mutable_data_ptr();
  const auto on_lines = [&](int64_t stride) { return stride * out.element_size() % 64 == 0; };
  p.stream = out.numel() * static_cast<int64_t>(out.element_size()) >= kStreamBytes &&
             reinterpret_cast<uintptr_t>(p.result) % 64 == 0 && on_lines(p.image_stride) &&
             (side_by_side ? on_lines(p.row_stride) && on_lines(p.column_stride)
                           : p.channel_stride == p.cells() && on_lines(kChannelsAtOnce * p.cells()));
  run_pieces(p, p.images, choose(out.scalar_type(), backward_float, backward_double, backward_bf16, backward_f16));
  if (!side_by_side && !planes) torch::stable::copy_(out, map);
}

Tensor roi_align_backward(const Tensor& grad, const Tensor& boxes, double scale, int64_t sampling_ratio, bool aligned,
                          std::vector<int64_t> size, bool channels_last) {
  Tensor out = torch::stable::empty(size, grad.scalar_type(), std::nullopt, grad.device(), std::nullopt,
                                    channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  scrl::advise_large_pages(out.mutable_data_ptr(), out.numel() * out.element_size());
  roi_align_backward_out(grad, boxes, scale, sampling_ratio, aligned, out);
  return out;
}
}  // namespace
}  // namespace scrl::roi

STABLE_TORCH_LIBRARY_IMPL(scrl_fast, CPU, m) {
  m.impl("roi_align", TORCH_BOX(&scrl::roi::roi_align));
  m.impl("roi_align_backward", TORCH_BOX(&scrl::roi::roi_align_backward));
  m.impl("roi_align_backward_out", TORCH_BOX(&scrl::roi::roi_align_backward_out));
}
