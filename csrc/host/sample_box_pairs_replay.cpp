// The published sampler's boxes to the bit: the same geometry, drawn from NumPy's own generator in the published order.
// One number depends on the one before, so one thread draws them all.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "box_geometry.h"

namespace py = pybind11;

namespace scrl_fast::host {
namespace {

using Crops = py::array_t<int64_t, py::array::c_style>;
using Boxes = py::array_t<float>;

constexpr int64_t kLanes = 8;

// NumPy's C interface to a bit generator, as numpy/random/bitgen.h declares it.
struct BitGenerator {
  void* state;
  uint64_t (*next_uint64)(void*);
  uint32_t (*next_uint32)(void*);
  double (*next_double)(void*);
  uint64_t (*next_raw)(void*);
};

// numpy.random.RandomState.randint(0, count): the lowest bits that can hold count - 1, again until they do not exceed
// it. A single choice draws nothing.
struct LegacyIntegers {
  const BitGenerator& generator;

  double operator()(double count) const {
    const auto last = static_cast<uint32_t>(count) - 1;
    if (last == 0) return 0.0;
    const uint32_t mask = ~uint32_t{0} >> __builtin_clz(last);
    uint32_t drawn;
    do drawn = generator.next_uint32(generator.state) & mask;
    while (drawn > last);
    return drawn;
  }
};

// Accepted boxes, eight to a vector; what was not filled has no area and overlaps nothing.
struct alignas(64) Accepted {
  double x0[kLanes], y0[kLanes], x1[kLanes], y1[kLanes];
};

// The published loop compares the box before it is clipped with those that were clipped. The division stays: at equal
// distance from the threshold its rounding decides.
SCRL_MULTIVERSION bool too_close(const Box<double>& box, const Accepted* accepted, int64_t count, double threshold) {
  const double own = area(box);
  double most = 0;
  for (int64_t g = 0; g * kLanes < count; ++g) {
    const Accepted& a = accepted[g];
    double overlap[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      const Box<double> other{a.x0[i], a.y0[i], a.x1[i], a.y1[i]};
      const double shared = shared_area(box, other);
      overlap[i] = shared / (own + area(other) - shared);
    }
    for (int64_t i = 0; i < kLanes; ++i) most = larger(most, overlap[i]);
  }
  return most >= threshold;
}

// Clips as published: the near edges to 0, the far edges to the size.
Box<double> clip_as_published(const Box<double>& b, double size) {
  return {larger(b.x0, 0.0), larger(b.y0, 0.0), smaller(b.x1, size), smaller(b.y1, size)};
}

void write_row(float* row, int64_t image, const Box<double>& box) {
  row[0] = static_cast<float>(image), row[1] = static_cast<float>(box.x0), row[2] = static_cast<float>(box.y0);
  row[3] = static_cast<float>(box.x1), row[4] = static_cast<float>(box.y1);
}

template <bool kGrid>
void replay_image(const Overlap& overlap, const BoxOptions& o, const BitGenerator& generator, int64_t image,
                  int64_t images, std::vector<Accepted>& accepted, float* rows1, float* rows2) {
  const auto size = static_cast<double>(o.view_size), least = static_cast<double>(o.min_size);
  const double low = 1.0 - o.jitter, span = (1.0 + o.jitter) - low;
  std::fill(accepted.begin(), accepted.end(), Accepted{});
  for (int64_t i = 0; i < o.boxes_per_image; ++i) {
    Box<double> box1, box2;
    for (int attempt = 0; attempt < kTries; ++attempt) {
      const Draw<double> draw = draw_box<kGrid, double>(overlap, least, LegacyIntegers{generator});
      box1 = to_view(overlap, overlap.view[0], draw, size);
      box2 = to_view(overlap, overlap.view[1], draw, size);
      if (o.jitter > 0.0) {
        double factors[4];
        for (double& factor : factors) factor = low + span * generator.next_double(generator.state);
        box2 = jittered(box2, factors);
      }
      if (i == 0 || o.iou_threshold == 1.0 || !too_close(box1, accepted.data(), i, o.iou_threshold)) break;
    }
    box1 = clip_as_published(box1, size);
    Accepted& group = accepted[static_cast<size_t>(i / kLanes)];
    const int64_t lane = i % kLanes;
    group.x0[lane] = box1.x0, group.y0[lane] = box1.y0, group.x1[lane] = box1.x1, group.y1[lane] = box1.y1;
    write_row(rows1 + i * kBoxFields, image, box1);
    write_row(rows2 + i * kBoxFields, image + images, clip_as_published(box2, size));
  }
}

// None where a crop is out of range; the caller says which. capsule: a bit generator's, its lock held by the caller.
std::optional<std::pair<Boxes, Boxes>> sample_box_pairs_replay(const Crops& crops1, const Crops& crops2,
                                                               int64_t view_size, int64_t boxes_per_image,
                                                               int64_t min_size, double iou_threshold, bool grid,
                                                               double jitter, const py::capsule& capsule) {
  const BoxOptions options{view_size, boxes_per_image, min_size, iou_threshold, grid, jitter};
  const BitGenerator& generator = *capsule.get_pointer<BitGenerator>();
  const auto yielding = images_with_boxes(crops1.data(), crops2.data(), crops1.shape(0), options);
  if (!yielding) return std::nullopt;
  const int64_t stride = boxes_per_image * kBoxFields;
  const std::vector<py::ssize_t> shape{static_cast<int64_t>(yielding->size()) * boxes_per_image, kBoxFields};
  std::pair<Boxes, Boxes> boxes{Boxes(shape), Boxes(shape)};
  float *rows1 = boxes.first.mutable_data(), *rows2 = boxes.second.mutable_data();
  const int64_t *a = crops1.data(), *b = crops2.data(), images = crops1.shape(0);
  py::gil_scoped_release release;
  std::vector<Accepted> accepted(static_cast<size_t>((boxes_per_image + kLanes - 1) / kLanes));
  for (const int64_t image : *yielding) {
    const Overlap overlap = overlap_of(a + image * kCropFields, b + image * kCropFields, options);
    grid ? replay_image<true>(overlap, options, generator, image, images, accepted, rows1, rows2)
         : replay_image<false>(overlap, options, generator, image, images, accepted, rows1, rows2);
    rows1 += stride, rows2 += stride;
  }
  return boxes;
}

}  // namespace

void bind_sample_box_pairs_replay(py::module_& m) {
  m.def("sample_box_pairs_replay", &sample_box_pairs_replay,
        "Arguments as checked by scrl_fast.ops.sample_box_pairs_replay; None where a crop is out of range.");
}

}  // namespace scrl_fast::host
