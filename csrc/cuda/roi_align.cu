#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "check.h"
#include "cuda/launch.h"
#include "cuda/roi_align_backward.h"
#include "cuda/roi_align_tile.h"

namespace scrl::roi {
namespace {
using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

unsigned as_grid(int64_t blocks) {
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "roi_align: too much work for one launch");
  return static_cast<unsigned>(blocks);
}

int as_int(int64_t value) {
  STD_TORCH_CHECK(value < (int64_t{1} << 31), "roi_align: a dimension does not fit 31 bits");
  return static_cast<int>(value);
}

// Asked before anything is made: the device of a tensor that is not on a GPU cannot be made the current one.
void check_devices(const Tensor& map, const Tensor& pooled, const Tensor& boxes) {
  const auto device = map.get_device_index();
  STD_TORCH_CHECK(map.is_cuda() && pooled.is_cuda() && boxes.is_cuda() && pooled.get_device_index() == device &&
                      boxes.get_device_index() == device,
                  "roi_align: map, boxes and pooled gradient must be on one GPU");
}

Sizes sizes_of(const Tensor& map, const Tensor& pooled, const Tensor& boxes) {
  const ScalarType box_dtype = map.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(map.dim() == 4 && pooled.dim() == 4, "roi_align: the map must be [N, C, H, W], bins [K, C, h, w]");
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 5, "roi_align: boxes must be [K, 5]");
  STD_TORCH_CHECK(boxes.scalar_type() == box_dtype, "roi_align: boxes must be float64 for a float64 map, else float32");
  STD_TORCH_CHECK(pooled.scalar_type() == map.scalar_type(), "roi_align: dtypes of map and pooled gradient differ");
  STD_TORCH_CHECK(pooled.size(0) == boxes.size(0) && pooled.size(1) == map.size(1),
                  "roi_align: the pooled gradient must be [K, C, h, w]");
  STD_TORCH_CHECK(pooled.size(2) > 0 && pooled.size(3) > 0, "roi_align: a box must have bins");
  checked_product("roi_align: boxes and bins", kLargestInt, {boxes.size(0), pooled.size(2), pooled.size(3)});
  checked_product("roi_align: channels and bins", kLargestInt, {map.size(1), pooled.size(2), pooled.size(3)});
  return {as_int(boxes.size(0)), as_int(map.size(0)),    as_int(map.size(1)),   as_int(map.size(2)),
          as_int(map.size(3)),   as_int(pooled.size(2)), as_int(pooled.size(3))};
}

Strides strides_of(const Tensor& map) { return {map.stride(0), map.stride(1), map.stride(2), map.stride(3)}; }

constexpr int64_t kMostBytes = int64_t{1} << 50;

// One piece of memory, cut up.
class Pieces {
 public:
  int64_t reserve(const char* what, std::initializer_list<int64_t> sizes) {
    const int64_t begin = bytes_;
    bytes_ += (checked_product(what, kMostBytes, sizes) + 255) / 256 * 256;
    return begin;
  }
  // It must live until the last kernel is launched.
  Tensor make(const Tensor& like) {
    Tensor memory = torch::stable::new_empty(like, {bytes_}, ScalarType::Byte);
    begin_ = static_cast<char*>(memory.mutable_data_ptr());
    return memory;
  }
  template <class T>
  T* at(int64_t place) const {
    return reinterpret_cast<T*>(begin_ + place);
  }

 private:
  int64_t bytes_ = 0;
  char* begin_ = nullptr;
};

// A Workspace, and the weights in it.
template <class R>
Tensor make_weights(const Tensor& boxes, const Sizes& s, double scale, int64_t sampling_ratio, bool aligned,
                    Workspace<R>& w) {
  constexpr int64_t real = sizeof(R), integer = sizeof(int), bin = sizeof(Bin);
  const char* what = "roi_align: weights";
  w.y.size = s.height, w.y.bins_a_box = s.pooled_height;
  w.x.size = s.width, w.x.bins_a_box = s.pooled_width;
  Pieces pieces;
  const int64_t at[] = {
      pieces.reserve(what, {s.count, w.y.strip_length(), real}),
      pieces.reserve(what, {s.count, w.x.strip_length(), real}),
      pieces.reserve(what, {s.count, s.pooled_height, bin}),
      pieces.reserve(what, {s.count, s.pooled_width, bin}),
      pieces.reserve(what, {s.count, integer}),
      pieces.reserve(what, {s.count, integer}),
      pieces.reserve(what, {s.images + int64_t{1}, integer}),
      pieces.reserve(what, {integer}),
  };
  STD_TORCH_CHECK(sampling_ratio <= kMostSamples, "roi_align: sampling_ratio must be at most ", kMostSamples);
  Tensor memory = pieces.make(boxes);
  w.y.strips = pieces.at<R>(at[0]), w.x.strips = pieces.at<R>(at[1]);
  w.y.bins = pieces.at<Bin>(at[2]), w.x.bins = pieces.at<Bin>(at[3]);
  w.image = pieces.at<int>(at[4]), w.order = pieces.at<int>(at[5]), w.first = pieces.at<int>(at[6]);
  w.unsorted = pieces.at<int>(at[7]);
  if (s.count > 0) {
    box_weights<R><<<as_grid(box_weights_blocks(s, 128)), 128, 0, scrl::cuda::stream_of(boxes)>>>(
        boxes.const_data_ptr<R>(), w, s, static_cast<R>(scale), sampling_ratio, aligned);
    scrl::cuda::check_launch("roi_align");
  }
  return memory;
}

template <class T>
bool in_packs(const void* data, const Sizes& s) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && s.channels % kPack<T> == 0;
}

// A pack never crosses a cell of channels side by side; planes are written one element at a time, or as one run.
template <class T>
bool in_packs(const void* data, const Sizes& s, const Strides& stride) {
  if (!in_packs<T>(data, s)) return false;
  const auto whole = [](int64_t elements) { return elements % kPack<T> == 0; };
  return whole(stride.image) && (stride.channel != 1 || (whole(stride.row) && whole(stride.column)));
}

// Calls run(V) with the channels that a lane takes: a pack of 16 bytes, or one.
template <class T, class Run>
void by_width(bool packs, const Run& run) {
  packs ? run(std::integral_constant<int, kPack<T>>{}) : run(std::integral_constant<int, 1>{});
}

template <class R>
void group(const Workspace<R>& w, const Sizes& s, cudaStream_t stream) {
  take_order<R><<<as_grid(take_order_blocks(s, 128)), 128, 0, stream>>>(w, s.images, s.count);
  if (s.count > 0) group_by_image<R><<<s.images + 1, kWarp * kWarps, 0, stream>>>(w, s.images, s.count);
  scrl::cuda::check_launch("roi_align");
}

template <class T, int V, bool planes>
void launch_pool_tile(const T* map, const Strides& stride, const Workspace<accumulate_t<T>>& w, T* out, const Sizes& s,
                      cudaStream_t stream) {
  const unsigned blocks = as_grid(pool_tile_blocks<V>(s));
  pool_tile<T, V, planes><<<blocks, kWarp * kTileWarps, tile_bytes<T, V, planes>(s), stream>>>(map, stride, w, out, s);
}

template <class T, int V>
void launch_pool(const T* map, const Strides& stride, const Workspace<accumulate_t<T>>& w, T* out, const Sizes& s,
                 cudaStream_t stream) {
  if (can_be_staged<T, V>(s)) {
    const unsigned blocks = as_grid(pool_staged_blocks<V>(s));
    pool_staged<T, V><<<blocks, kWarp * kWarps, staged_bytes<T, V>(s), stream>>>(map, stride, w, out, s);
  } else {
    const unsigned blocks = as_grid(pool_blocks<V>(s));
    pool<T, V><<<blocks, kWarp * kWarps, 0, stream>>>(map, stride, w, out, s);
  }
}

template <class T>
void launch_pool_planes(const T* map, const Strides& stride, const Workspace<accumulate_t<T>>& w, T* out,
                        const Sizes& s, cudaStream_t stream) {
  const unsigned blocks = as_grid(pool_planes_blocks(s));
  pool_planes<T><<<blocks, kWarp * kWarps, 0, stream>>>(map, stride, w, out, s);
}

template <class T>
void forward(const Tensor& map, const Tensor& boxes, double scale, int64_t sampling_ratio, bool aligned, Tensor& out) {
  using R = accumulate_t<T>;
  const Sizes s = sizes_of(map, out, boxes);
  if (out.numel() == 0) return;
  STD_TORCH_CHECK(s.height > 0 && s.width > 0, "roi_align: the map has no cells");
  Workspace<R> w;
  const Tensor memory = make_weights<R>(boxes, s, scale, sampling_ratio, aligned, w);
  const Strides stride = strides_of(map);
  const T* from = static_cast<const T*>(map.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  const cudaStream_t stream = scrl::cuda::stream_of(map);
  const bool packs = in_packs<T>(from, s, stride) && in_packs<T>(to, s);
  if (fits_a_tile(s, stride) && s.count >= s.images) {  // fewer boxes do not read all of the map
    group(w, s, stream);
    by_width<T>(packs, [&](auto v) {
      stride.channel == 1 ? launch_pool_tile<T, v, false>(from, stride, w, to, s, stream)
                          : launch_pool_tile<T, v, true>(from, stride, w, to, s, stream);
    });
  } else if (stride.channel == 1) {
    by_width<T>(packs, [&](auto v) { launch_pool<T, v>(from, stride, w, to, s, stream); });
  } else {
    launch_pool_planes<T>(from, stride, w, to, s, stream);
  }
  scrl::cuda::check_launch("roi_align");
}

template <class T, int V, bool planes>
void launch_tile_backward(const T* grad, const Workspace<accumulate_t<T>>& w, T* out, const Strides& stride,
                          const Sizes& s, cudaStream_t stream) {
  const int table = bins_in_table<T, V, planes>(s);
  const int bytes = tile_bytes_backward<T, V, planes>(s) + table * BinTable<accumulate_t<T>>::bytes_of_bin(s);
  const unsigned blocks = as_grid(pool_tile_backward_blocks<V>(s));
  pool_tile_backward<T, V, planes><<<blocks, kWarp * kTileWarps, bytes, stream>>>(grad, w, out, stride, s, table);
}

template <class R>
Tensor make_reach(const Tensor& boxes, const Workspace<R>& w, const Sizes& s, cudaStream_t stream, Reach& reach) {
  constexpr int64_t word = sizeof(unsigned);
  reach.words = Reach::words_of(s);
  Pieces pieces;
  const int64_t rows = pieces.reserve("roi_align: rows of boxes", {s.height, reach.words, word});
  const int64_t columns = pieces.reserve("roi_align: columns of boxes", {Reach::tiles_of(s), reach.words, word});
  Tensor memory = pieces.make(boxes);
  reach.rows = pieces.at<unsigned>(rows), reach.columns = pieces.at<unsigned>(columns);
  mark_reach<R><<<as_grid(mark_reach_blocks(s)), kWarp * kWarps, 0, stream>>>(w, reach, s);
  scrl::cuda::check_launch("roi_align_backward");
  return memory;
}

template <class T, int V>
void launch_backward(const T* grad, const Workspace<accumulate_t<T>>& w, T* out, const Strides& stride, const Sizes& s,
                     const Tensor& boxes, cudaStream_t stream) {
  Reach reach;
  const Tensor memory = make_reach(boxes, w, s, stream, reach);
  const unsigned blocks = as_grid(pool_backward_blocks<V>(s));
  pool_backward<T, V><<<blocks, kWarp * kWarps, 0, stream>>>(grad, w, reach, out, stride, s);
}

// grad: [K, C, h, w] with the channels of a bin side by side.
template <class T>
void backward(const Tensor& grad, const Tensor& boxes, double scale, int64_t sampling_ratio, bool aligned,
              Tensor& out) {
  using R = accumulate_t<T>;
  const Sizes s = sizes_of(out, grad, boxes);
  if (out.numel() == 0) return;
  Workspace<R> w;
  const Tensor memory = make_weights<R>(boxes, s, scale, sampling_ratio, aligned, w);
  const cudaStream_t stream = scrl::cuda::stream_of(out);
  group(w, s, stream);
  const Strides stride = strides_of(out);
  const T* from = static_cast<const T*>(grad.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  by_width<T>(in_packs<T>(from, s) && in_packs<T>(to, s, stride), [&](auto v) {
    if (!fits_a_tile(s, stride))
      launch_backward<T, v>(from, w, to, stride, s, boxes, stream);
    else if (stride.channel == 1)
      launch_tile_backward<T, v, false>(from, w, to, stride, s, stream);
    else
      launch_tile_backward<T, v, true>(from, w, to, stride, s, stream);
  });
  scrl::cuda::check_launch("roi_align_backward");
}

template <class Run>
void dispatch(ScalarType dtype, const Run& run) {
  switch (dtype) {
    case ScalarType::Float:
      return run(float{});
    case ScalarType::Double:
      return run(double{});
    case ScalarType::BFloat16:
      return run(__nv_bfloat16{});
    case ScalarType::Half:
      return run(__half{});
    default:
      STD_TORCH_CHECK(false, "roi_align: dtype must be float32, float64, bfloat16 or float16");
  }
}

// input [N, C, H, W], boxes [K, 5] -> [K, C, pooled_height, pooled_width]
Tensor roi_align(const Tensor& input, const Tensor& boxes, double scale, int64_t pooled_height, int64_t pooled_width,
                 int64_t sampling_ratio, bool aligned) {
  check_devices(input, input, boxes);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const Tensor rows = torch::stable::contiguous(boxes);
  Tensor out = torch::stable::new_empty(input, {rows.size(0), input.size(1), pooled_height, pooled_width});
  dispatch(input.scalar_type(),
           [&](auto t) { forward<decltype(t)>(input, rows, scale, sampling_ratio, aligned, out); });
  return out;
}

// One bin a box lies this way already; of several, the channels are brought together by a copy.
Tensor with_channels_side_by_side(const Tensor& grad) {
  if (grad.size(2) * grad.size(3) == 1) return torch::stable::contiguous(grad);
  Tensor copy = torch::stable::empty(grad.sizes(), grad.scalar_type(), std::nullopt, grad.device(), std::nullopt,
                                     MemoryFormat::ChannelsLast);
  torch::stable::copy_(copy, grad);
  return copy;
}

// grad [K, C, h, w], boxes [K, 5] -> out [N, C, H, W], every element of which is written
void roi_align_backward_out(const Tensor& grad, const Tensor& boxes, double scale, int64_t sampling_ratio, bool aligned,
                            Tensor out) {
  check_devices(out, grad, boxes);
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  const Tensor rows = torch::stable::contiguous(boxes), bins = with_channels_side_by_side(grad);
  dispatch(out.scalar_type(), [&](auto t) { backward<decltype(t)>(bins, rows, scale, sampling_ratio, aligned, out); });
}

Tensor roi_align_backward(const Tensor& grad, const Tensor& boxes, double scale, int64_t sampling_ratio, bool aligned,
                          std::vector<int64_t> size, bool channels_last) {
  Tensor out = torch::stable::empty(size, grad.scalar_type(), std::nullopt, grad.device(), std::nullopt,
                                    channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  roi_align_backward_out(grad, boxes, scale, sampling_ratio, aligned, out);
  return out;
}
}  // namespace
}  // namespace scrl::roi

STABLE_TORCH_LIBRARY_IMPL(scrl_fast, CUDA, m) {
  m.impl("roi_align", TORCH_BOX(&scrl::roi::roi_align));
  m.impl("roi_align_backward", TORCH_BOX(&scrl::roi::roi_align_backward));
  m.impl("roi_align_backward_out", TORCH_BOX(&scrl::roi::roi_align_backward_out));
}
