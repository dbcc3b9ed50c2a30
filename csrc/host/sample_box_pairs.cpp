// Matched boxes in the overlap of two crops (SCRL, arXiv 2103.06122): counter-based random numbers, so each image is
// drawn by whichever thread comes to it, and the result is the same for any number of threads.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <limits>
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
// A counter's first word holds the box in 24 bits, the attempt in 6 and the block in 2.
static_assert(kLimit + 8 <= int64_t{1} << 24 && kTries <= 64, "boxes or attempts would share random numbers");
constexpr int64_t kLanes = 8;            // float64 numbers in the widest register
constexpr int64_t kBoxesPerPiece = 320;  // about 10 us: enough to pay for waking a thread

constexpr Doubles kLaneNumbers{0, 1, 2, 3, 4, 5, 6, 7};
constexpr double kNever = std::numeric_limits<double>::infinity();

const PhiloxEight philox_eight_fastest = philox_eight_here();

struct Stream {
  uint32_t key0, key1, image0, image1, step;

  Words words(uint32_t box, uint32_t attempt, uint32_t block) const {
    return philox4x32({{box << 8 | attempt << 2 | block, image0, image1, step}}, key0, key1);
  }

  // The same for eight boxes from `box` on.
  void words(uint32_t box, const uint32_t (&attempt)[kLanes], uint32_t block, WideWords& out) const {
    uint32_t first[kLanes];
    for (uint32_t lane = 0; lane < kLanes; ++lane) first[lane] = (box + lane) << 8 | attempt[lane] << 2 | block;
    philox_eight_fastest(first, {{0, image0, image1, step}}, key0, key1, out);
  }
};

SCRL_INLINE double number(uint32_t word) { return word; }

SCRL_INLINE Doubles number(const uint64_t (&words)[kLanes]) {
  using Bits = uint64_t __attribute__((vector_size(8 * kLanes)));
  Bits bits;
  std::memcpy(&bits, words, sizeof bits);
  bits = (bits & 0xFFFFFFFF) | 0x4330000000000000;  // 2^52 + word
  Doubles sum;
  std::memcpy(&sum, &bits, sizeof sum);
  return sum - 0x1p52;
}

// Random words in the order in which they are used; word * count < 2^52, so the product is exact.
template <class Number, class Word>
struct Numbers {
  const Word* next;
  SCRL_INLINE Number operator()(Number count) { return whole(number(*next++) * count * 0x1p-32); }
};

// Eight boxes of one image; what is beyond the last box is drawn too, and ignored. The alignment is said because GCC
// otherwise takes that of the baseline (16), while the AVX-512 clone relies on 64.
struct alignas(64) Group {
  Draw<Doubles> draw;
  Box<Doubles> box;  // in view 1
  Doubles area;
  uint32_t attempt[kLanes];
};

template <bool kGrid>
SCRL_INLINE void draw_first(const Overlap& overlap, const BoxOptions& o, const Stream& stream, uint32_t begin,
                            Group& group) {
  for (uint32_t& attempt : group.attempt) attempt = 0;
  WideWords words[2];
  stream.words(begin, group.attempt, 0, words[0]);
  if (kGrid) stream.words(begin, group.attempt, 1, words[1]);
  const auto size = static_cast<double>(o.view_size);
  Numbers<Doubles, uint64_t[kLanes]> numbers{words[0].value};
  group.draw = draw_box<kGrid, Doubles>(overlap, static_cast<double>(o.min_size), numbers);
  group.box = clip(to_view(overlap, overlap.view[0], group.draw, size), size);
  group.area = area(group.box);
}

template <bool kGrid>
SCRL_INLINE void draw_again(const Overlap& overlap, const BoxOptions& o, const Stream& stream, uint32_t box,
                            Group& group) {
  const auto lane = box % kLanes;
  const uint32_t attempt = ++group.attempt[lane];
  const Words first = stream.words(box, attempt, 0), second = stream.words(box, attempt, 1);
  uint32_t words[8];
  for (int j = 0; j < 4; ++j) words[j] = first.value[j], words[4 + j] = second.value[j];
  const auto size = static_cast<double>(o.view_size);
  Numbers<double, uint32_t> numbers{words};
  const Draw<double> draw = draw_box<kGrid, double>(overlap, static_cast<double>(o.min_size), numbers);
  const Box<double> b = clip(to_view(overlap, overlap.view[0], draw, size), size);
  group.draw.x[lane] = draw.x, group.draw.y[lane] = draw.y;
  group.draw.width[lane] = draw.width, group.draw.height[lane] = draw.height;
  group.box.x0[lane] = b.x0, group.box.y0[lane] = b.y0, group.box.x1[lane] = b.x1, group.box.y1[lane] = b.y1;
  group.area[lane] = area(b);
}

// Whether the IoU of box `index` with one of those before it is the threshold or more (multiplied out: no division).
SCRL_INLINE bool too_close(const Group* groups, int64_t index, double threshold) {
  using Flags = int64_t __attribute__((vector_size(8 * kLanes)));
  using Bytes = int8_t __attribute__((vector_size(kLanes)));
  const Group& own = groups[index / kLanes];
  const auto lane = index % kLanes;
  const Doubles none = {};
  const Box<Doubles> box{none + own.box.x0[lane], none + own.box.y0[lane], none + own.box.x1[lane],
                         none + own.box.y1[lane]};
  const Flags yes = Flags{} + 1;
  Flags close = {};
  for (int64_t g = 0; g * kLanes < index; ++g) {
    const Doubles shared = shared_area(box, groups[g].box);
    const Doubles reach = threshold * (own.area[lane] + groups[g].area - shared);
    const Doubles limit = kLaneNumbers < static_cast<double>(index - g * kLanes) ? reach : none + kNever;
    close = shared >= limit ? yes : close;  // selections: a comparison kept as a value is taken apart by GCC 12
  }
  const Bytes narrow = __builtin_convertvector(close, Bytes);
  uint64_t any;
  std::memcpy(&any, &narrow, sizeof any);
  return any != 0;
}

template <bool kGrid>
SCRL_INLINE void draw_boxes(const Overlap& overlap, const BoxOptions& o, const Stream& stream, Group* groups) {
  const auto boxes = static_cast<uint32_t>(o.boxes_per_image);
  for (uint32_t begin = 0; begin < boxes; begin += kLanes)
    draw_first<kGrid>(overlap, o, stream, begin, groups[begin / kLanes]);
  if (o.iou_threshold == 1.0) return;
  for (uint32_t box = 1; box < boxes; ++box) {
    Group& group = groups[box / kLanes];
    while (too_close(groups, box, o.iou_threshold) && group.attempt[box % kLanes] + 1 < kTries)
      draw_again<kGrid>(overlap, o, stream, box, group);
  }
}

SCRL_INLINE Box<Doubles> jittered_group(const Box<Doubles>& box, const Stream& stream, uint32_t begin,
                                        const uint32_t (&attempt)[kLanes], double ratio) {
  WideWords words;
  stream.words(begin, attempt, 2, words);
  const double low = 1.0 - ratio, span = (1.0 + ratio) - low;
  Doubles factors[4];
  for (int j = 0; j < 4; ++j) factors[j] = low + span * (number(words.value[j]) * 0x1p-32);
  return jittered(box, factors);
}

SCRL_INLINE void write_rows(float* rows, int64_t image, const Box<Doubles>& box, int64_t count) {
  using Floats = float __attribute__((vector_size(4 * kLanes)));
  const Floats x0 = __builtin_convertvector(box.x0, Floats), y0 = __builtin_convertvector(box.y0, Floats),
               x1 = __builtin_convertvector(box.x1, Floats), y1 = __builtin_convertvector(box.y1, Floats);
  for (int64_t i = 0; i < count; ++i, rows += kBoxFields) {
    rows[0] = static_cast<float>(image);
    rows[1] = x0[i], rows[2] = y0[i], rows[3] = x1[i], rows[4] = y1[i];
  }
}

// All boxes of one image: boxes_per_image rows in each of rows1 and rows2. groups: scratch.
SCRL_MULTIVERSION void sample_image(const Overlap& overlap, const BoxOptions& o, const Stream& stream, int64_t image,
                                    int64_t images, Group* groups, float* rows1, float* rows2) {
  const auto size = static_cast<double>(o.view_size);
  o.grid ? draw_boxes<true>(overlap, o, stream, groups) : draw_boxes<false>(overlap, o, stream, groups);
  for (int64_t begin = 0; begin < o.boxes_per_image; begin += kLanes) {
    const Group& group = groups[begin / kLanes];
    const int64_t count = std::min<int64_t>(kLanes, o.boxes_per_image - begin);
    Box<Doubles> box2 = to_view(overlap, overlap.view[1], group.draw, size);
    if (o.jitter > 0.0) box2 = jittered_group(box2, stream, static_cast<uint32_t>(begin), group.attempt, o.jitter);
    write_rows(rows1 + begin * kBoxFields, image, group.box, count);
    write_rows(rows2 + begin * kBoxFields, image + images, clip(box2, size), count);
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
  const auto yielding = images_with_boxes(a, b, images, options);
  if (!yielding) return std::nullopt;
  const auto found = static_cast<int64_t>(yielding->size()), stride = boxes_per_image * kBoxFields;
  const std::vector<py::ssize_t> shape{found * boxes_per_image, kBoxFields};
  std::pair<Boxes, Boxes> boxes{Boxes(shape), Boxes(shape)};
  float *rows1 = boxes.first.mutable_data(), *rows2 = boxes.second.mutable_data();
  {
    py::gil_scoped_release release;
    parallel_for(found, std::max<int64_t>(kBoxesPerPiece / boxes_per_image, 1), threads,
                 [&](int64_t begin, int64_t end) {
                   std::vector<Group> groups(static_cast<size_t>((boxes_per_image + kLanes - 1) / kLanes));
                   for (int64_t n = begin; n < end; ++n) {
                     const int64_t image = (*yielding)[static_cast<size_t>(n)];
                     const auto name = static_cast<uint64_t>(names ? names[image] : image);
                     const Stream stream{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32) ^ kPurpose,
                                         static_cast<uint32_t>(name), static_cast<uint32_t>(name >> 32), step};
                     const Overlap overlap = overlap_of(a + image * kCropFields, b + image * kCropFields, options);
                     sample_image(overlap, options, stream, image, images, groups.data(), rows1 + n * stride,
                                  rows2 + n * stride);
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
