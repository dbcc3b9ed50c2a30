// Matched boxes in the overlap of two crops (SCRL, arXiv 2103.06122): counter-based random numbers, so each image is
// drawn by whichever thread comes to it, and the result is the same for any number of threads.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <vector>

#include "box_geometry.h"
#include "parallel.h"
#include "philox.h"

namespace py = pybind11;

namespace scrl_fast::host {
namespace {

using Crops = py::array_t<int64_t, py::array::c_style>;
using Boxes = py::array_t<float>;

constexpr uint32_t kPurpose = 0x626F7873;
constexpr int kLanes = 16;               // boxes whose first try is drawn together
constexpr int64_t kBoxesPerPiece = 320;  // about 20 us: enough to pay for waking a thread

struct Stream {
  uint32_t key0, key1, image0, image1, step;

  SCRL_INLINE Words words(uint32_t box, uint32_t attempt, uint32_t block) const {
    return philox4x32({{box << 8 | attempt << 2 | block, image0, image1, step}}, key0, key1);
  }
};

// The eight words of one try, in order.
struct Counted {
  Words first, second;
  int used = 0;

  SCRL_INLINE int32_t operator()(int32_t count) {
    const uint32_t word = used < 4 ? first.value[used] : second.value[used - 4];
    ++used;
    return static_cast<int32_t>(static_cast<uint64_t>(word) * static_cast<uint32_t>(count) >> 32);
  }
};

template <bool kGrid>
SCRL_INLINE Draw try_box(const Overlap& overlap, const BoxOptions& o, const Stream& stream, uint32_t box,
                         uint32_t attempt) {
  Counted numbers{stream.words(box, attempt, 0), kGrid ? stream.words(box, attempt, 1) : Words{}};
  return draw_box<kGrid>(overlap, static_cast<int32_t>(o.min_size), numbers);
}

struct Lanes {
  double x[kLanes], y[kLanes], width[kLanes], height[kLanes];
};

template <bool kGrid>
SCRL_INLINE void first_tries_loop(const Overlap& overlap, const BoxOptions& o, const Stream& stream, uint32_t box,
                                  Lanes& out) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const Draw draw = try_box<kGrid>(overlap, o, stream, box + static_cast<uint32_t>(lane), 0);
    out.x[lane] = draw.x;
    out.y[lane] = draw.y;
    out.width[lane] = draw.width;
    out.height[lane] = draw.height;
  }
}

SCRL_MULTIVERSION void first_tries(const Overlap& overlap, const BoxOptions& o, const Stream& stream, uint32_t box,
                                   Lanes& out) {
  o.grid ? first_tries_loop<true>(overlap, o, stream, box, out) : first_tries_loop<false>(overlap, o, stream, box, out);
}

bool too_close(const Box& box, const std::vector<Box>& accepted, double threshold) {
  for (const Box& other : accepted)
    if (!(intersection_over_union(box, other) < threshold)) return true;
  return false;
}

// All boxes of one image: boxes_per_image rows in each of rows1 and rows2. accepted: scratch.
void sample_image(const Overlap& overlap, const BoxOptions& o, const Stream& stream, int64_t image, int64_t images,
                  std::vector<Box>& accepted, float* rows1, float* rows2) {
  const auto size = static_cast<double>(o.view_size);
  const double low = 1.0 - o.jitter, span = (1.0 + o.jitter) - low;
  Lanes lanes;
  accepted.clear();
  for (int64_t i = 0; i < o.boxes_per_image; ++i) {
    const auto index = static_cast<uint32_t>(i);
    const int lane = static_cast<int>(i % kLanes);
    if (lane == 0) first_tries(overlap, o, stream, index, lanes);
    Draw draw{lanes.x[lane], lanes.y[lane], lanes.width[lane], lanes.height[lane]};
    Box box1 = clip(to_view(overlap, overlap.view[0], draw, size), size);
    uint32_t attempt = 0;
    while (o.iou_threshold < 1.0 && attempt + 1 < kTries && too_close(box1, accepted, o.iou_threshold)) {
      ++attempt;
      draw = o.grid ? try_box<true>(overlap, o, stream, index, attempt)
                    : try_box<false>(overlap, o, stream, index, attempt);
      box1 = clip(to_view(overlap, overlap.view[0], draw, size), size);
    }
    accepted.push_back(box1);
    Box box2 = to_view(overlap, overlap.view[1], draw, size);
    if (o.jitter > 0.0) {
      const Words words = stream.words(index, attempt, 2);
      double factors[4];
      for (int j = 0; j < 4; ++j) factors[j] = low + span * (words.value[j] * 0x1p-32);
      box2 = jittered(box2, factors);
    }
    write_row(rows1 + i * kBoxFields, image, box1);
    write_row(rows2 + i * kBoxFields, image + images, clip(box2, size));
  }
}

// None where a crop is out of range; the caller says which.
std::optional<std::pair<Boxes, Boxes>> sample_box_pairs(const Crops& crops1, const Crops& crops2,
                                                        const std::optional<Crops>& keys, int64_t view_size,
                                                        int64_t boxes_per_image, int64_t min_size, double iou_threshold,
                                                        bool grid, double jitter, uint64_t seed, uint32_t step,
                                                        int threads) {
  const BoxOptions options{view_size, boxes_per_image, min_size, iou_threshold, grid, jitter};
  const int64_t images = crops1.shape(0);
  const int64_t *a = crops1.data(), *b = crops2.data(), *names = keys ? keys->data() : nullptr;
  std::vector<int64_t> yielding;
  yielding.reserve(static_cast<size_t>(images));
  for (int64_t i = 0; i < images; ++i) {
    const int64_t *first = a + i * kCropFields, *second = b + i * kCropFields;
    if (!crop_in_range(first) || !crop_in_range(second)) return std::nullopt;
    if (yields_boxes(first, second, options)) yielding.push_back(i);
  }
  const auto found = static_cast<int64_t>(yielding.size()), stride = boxes_per_image * kBoxFields;
  const std::vector<py::ssize_t> shape{found * boxes_per_image, kBoxFields};
  std::pair<Boxes, Boxes> boxes{Boxes(shape), Boxes(shape)};
  float *rows1 = boxes.first.mutable_data(), *rows2 = boxes.second.mutable_data();
  {
    py::gil_scoped_release release;
    parallel_for(
        found, std::max<int64_t>(kBoxesPerPiece / boxes_per_image, 1), threads, [&](int64_t begin, int64_t end) {
          std::vector<Box> accepted;
          accepted.reserve(static_cast<size_t>(boxes_per_image));
          for (int64_t n = begin; n < end; ++n) {
            const int64_t image = yielding[static_cast<size_t>(n)];
            const auto name = static_cast<uint64_t>(names ? names[image] : image);
            const Stream stream{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32) ^ kPurpose,
                                static_cast<uint32_t>(name), static_cast<uint32_t>(name >> 32), step};
            const Overlap overlap = overlap_of(a + image * kCropFields, b + image * kCropFields, options);
            sample_image(overlap, options, stream, image, images, accepted, rows1 + n * stride, rows2 + n * stride);
          }
        });
  }
  return boxes;
}

}  // namespace

void bind_sample_box_pairs(py::module_& m) {
  m.def("sample_box_pairs", &sample_box_pairs,
        "Arguments as checked by scrl_fast.ops.sample_box_pairs; None where a crop is out of range.");
}

}  // namespace scrl_fast::host
