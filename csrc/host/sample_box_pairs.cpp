// Matched boxes in the overlap of two crops (SCRL, arXiv 2103.06122): counter-based random numbers, so each image is
// drawn by whichever thread comes to it, and the result is the same for any number of threads. Eight images are drawn
// side by side; what is too close to an earlier box is drawn again eight tries at a time, of which the first good one
// counts.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
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
// A counter's first word holds the box in 24 bits, the attempt in 6 and the block in 2.
static_assert(kLimit + 8 <= int64_t{1} << 24 && kTries <= 64, "boxes or attempts would share random numbers");
constexpr int64_t kLanes = 8;            // float64 numbers in the widest register
constexpr int64_t kBoxesPerPiece = 640;  // about 15 us: enough to pay for waking a thread

const PhiloxEight philox_one = philox_eight_here<1>(), philox_two = philox_eight_here<2>();

struct Keys {
  uint32_t key0, key1, step;
};

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
struct Numbers {
  const uint64_t (*next)[kLanes];
  SCRL_INLINE Doubles operator()(Doubles count) { return whole(number(*next++) * count * 0x1p-32); }
};

// One box each of eight images, or eight tries at one box of one image. The alignment is said because GCC otherwise
// takes that of the baseline (16), while the AVX-512 clone relies on 64.
struct alignas(64) Group {
  Draw<Doubles> draw;
  Box<Doubles> box;  // in view 1
  Doubles area;
  uint64_t attempt[kLanes];
};

// Eight images side by side.
struct alignas(64) Images {
  Overlap<Doubles> overlap;
  uint64_t name0[kLanes], name1[kLanes];  // the low and the high half of their keys
  int64_t image[kLanes];
  int64_t count;  // lanes in use; the others repeat the last one
};

SCRL_INLINE void draw_group(const Overlap<Doubles>& overlap, const BoxOptions& o, const Keys& keys,
                            const WideCounter& counter, Group& group) {
  WideWords words[2];
  (o.grid ? philox_two : philox_one)(counter, 0, keys.key0, keys.key1, words);
  const auto size = static_cast<double>(o.view_size), least = static_cast<double>(o.min_size);
  Numbers numbers{words[0].value};
  group.draw =
      o.grid ? draw_box<true, Doubles>(overlap, least, numbers) : draw_box<false, Doubles>(overlap, least, numbers);
  group.box = clip(to_view(overlap, 0, group.draw, size), size);
  group.area = area(group.box);
}

using Flags = int64_t __attribute__((vector_size(8 * kLanes)));

// 0xFF in the byte of each lane that is not 0.
SCRL_INLINE uint64_t lanes_set(Flags flags) {
  using Bytes = int8_t __attribute__((vector_size(kLanes)));
  const Bytes narrow = __builtin_convertvector(flags, Bytes);
  uint64_t set;
  std::memcpy(&set, &narrow, sizeof set);
  return set;
}

// Adds the lanes in which the IoU of both is the threshold or more (multiplied out: no division).
SCRL_INLINE void add_close(const Group& own, const Box<Doubles>& box, Doubles other_area, double threshold,
                           Flags& close) {
  const Doubles shared = shared_area(own.box, box);
  const Doubles reach = threshold * (own.area + other_area - shared);
  close = shared >= reach ? Flags{} - 1 : close;  // selections: a comparison kept as a value is taken apart by GCC 12
}

// Draws box `box` of the image in one lane again, eight tries at a time, until one keeps apart from those before it.
SCRL_INLINE void draw_again(const Images& images, const BoxOptions& o, const Keys& keys, uint64_t box, int64_t lane,
                            Group* groups) {
  Overlap<Doubles> overlap;
  const double* from = reinterpret_cast<const double*>(&images.overlap);
  auto* to = reinterpret_cast<Doubles*>(&overlap);
  for (size_t i = 0; i < sizeof overlap / sizeof *to; ++i) to[i] = Doubles{} + from[kLanes * i + lane];
  WideCounter counter;
  Group tries;
  for (uint64_t first = 1; first < kTries; first += kLanes) {
    for (uint64_t k = 0; k < kLanes; ++k) {
      counter.first[k] = box << 8 | (first + k) << 2;
      counter.second[k] = images.name0[lane], counter.third[k] = images.name1[lane];
    }
    counter.fourth = keys.step;
    draw_group(overlap, o, keys, counter, tries);
    Flags close = {};
    for (uint64_t j = 0; j < box; ++j) {
      const Group& g = groups[j];
      const Doubles none = {};
      const Box<Doubles> other{none + g.box.x0[lane], none + g.box.y0[lane], none + g.box.x1[lane],
                               none + g.box.y1[lane]};
      add_close(tries, other, none + g.area[lane], o.iou_threshold, close);
    }
    const uint64_t apart = ~lanes_set(close);
    uint64_t chosen = apart ? static_cast<uint64_t>(__builtin_ctzll(apart)) / 8 : kLanes;
    if (first + chosen >= kTries) chosen = kTries - 1 - first;  // the last try is kept as it is
    if (chosen >= kLanes) continue;
    const auto* source = reinterpret_cast<const double*>(&tries);
    auto* target = reinterpret_cast<double*>(&groups[box]);
    constexpr size_t numbers = offsetof(Group, attempt) / sizeof(Doubles);
    for (size_t i = 0; i < numbers; ++i) target[kLanes * i + lane] = source[kLanes * i + chosen];
    groups[box].attempt[lane] = first + chosen;
    return;
  }
}

SCRL_INLINE void draw_boxes(const Images& images, const BoxOptions& o, const Keys& keys, Group* groups) {
  WideCounter counter;
  std::memcpy(counter.second, images.name0, sizeof counter.second);
  std::memcpy(counter.third, images.name1, sizeof counter.third);
  counter.fourth = keys.step;
  const uint64_t used = ~uint64_t{0} >> (8 * (kLanes - images.count));
  for (uint64_t box = 0; box < static_cast<uint64_t>(o.boxes_per_image); ++box) {
    Group& group = groups[box];
    for (int64_t lane = 0; lane < kLanes; ++lane) counter.first[lane] = box << 8, group.attempt[lane] = 0;
    draw_group(images.overlap, o, keys, counter, group);
    if (o.iou_threshold == 1.0) continue;
    Flags close = {};
    for (uint64_t j = 0; j < box; ++j) add_close(group, groups[j].box, groups[j].area, o.iou_threshold, close);
    for (uint64_t again = lanes_set(close) & used; again;) {
      const int64_t lane = __builtin_ctzll(again) / 8;
      again &= ~(uint64_t{0xFF} << 8 * lane);
      draw_again(images, o, keys, box, lane, groups);
    }
  }
}

SCRL_INLINE Box<Doubles> jittered_group(const Box<Doubles>& box, const Images& images, const Keys& keys, uint64_t index,
                                        const Group& group, double ratio) {
  WideCounter counter;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    counter.first[lane] = index << 8 | group.attempt[lane] << 2;
    counter.second[lane] = images.name0[lane], counter.third[lane] = images.name1[lane];
  }
  counter.fourth = keys.step;
  WideWords words;
  philox_one(counter, 2, keys.key0, keys.key1, &words);
  const double low = 1.0 - ratio, span = (1.0 + ratio) - low;
  Doubles factors[4];
  for (int j = 0; j < 4; ++j) factors[j] = low + span * (number(words.value[j]) * 0x1p-32);
  return jittered(box, factors);
}

// One row for each image: its index plus `offset`, then the box.
SCRL_INLINE void write_rows(float* rows, int64_t stride, const Images& images, int64_t offset,
                            const Box<Doubles>& box) {
  using Eight = float __attribute__((vector_size(4 * kLanes)));
  using Four = float __attribute__((vector_size(16)));
  const Eight x0 = __builtin_convertvector(box.x0, Eight), y0 = __builtin_convertvector(box.y0, Eight),
              x1 = __builtin_convertvector(box.x1, Eight), y1 = __builtin_convertvector(box.y1, Eight);
  for (int64_t i = 0; i < images.count; ++i, rows += stride) {
    rows[0] = static_cast<float>(images.image[i] + offset);
    const Four edges{x0[i], y0[i], x1[i], y1[i]};
    std::memcpy(rows + 1, &edges, sizeof edges);
  }
}

// All boxes of eight images: boxes_per_image rows in each of rows1 and rows2. groups: scratch, one a box.
SCRL_MULTIVERSION void sample_images(const Images& images, const BoxOptions& o, const Keys& keys, int64_t second_view,
                                     Group* groups, float* rows1, float* rows2) {
  const auto size = static_cast<double>(o.view_size);
  draw_boxes(images, o, keys, groups);
  const int64_t stride = o.boxes_per_image * kBoxFields;
  for (int64_t i = 0; i < o.boxes_per_image; ++i) {
    const Group& group = groups[i];
    Box<Doubles> box2 = to_view(images.overlap, 1, group.draw, size);
    if (o.jitter > 0.0) box2 = jittered_group(box2, images, keys, static_cast<uint64_t>(i), group, o.jitter);
    write_rows(rows1 + i * kBoxFields, stride, images, 0, group.box);
    write_rows(rows2 + i * kBoxFields, stride, images, second_view, clip(box2, size));
  }
}

SCRL_MULTIVERSION void overlaps_of(const Crop<Doubles>& a, const Crop<Doubles>& b, const BoxOptions& o,
                                   Overlap<Doubles>& overlap) {
  overlap = overlap_of(a, b, o);
}

// `count` images of a list, count > 0; `names`: their keys, or null for their indices.
void gather(const int64_t* list, int64_t count, const int64_t* crops1, const int64_t* crops2, const int64_t* names,
            const BoxOptions& o, Images& images) {
  images.count = std::min(count, kLanes);
  alignas(64) Crop<Doubles> crops[2];  // not the alignment of the baseline: see Group
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const int64_t image = list[std::min(lane, images.count - 1)];
    const auto name = static_cast<uint64_t>(names ? names[image] : image);
    images.image[lane] = image, images.name0[lane] = name & 0xFFFFFFFF, images.name1[lane] = name >> 32;
    for (int v = 0; v < 2; ++v) {
      const Crop<double> crop = crop_of((v == 0 ? crops1 : crops2) + image * kCropFields);
      crops[v].y[lane] = crop.y, crops[v].x[lane] = crop.x, crops[v].h[lane] = crop.h, crops[v].w[lane] = crop.w;
      crops[v].flip[lane] = crop.flip;
    }
  }
  overlaps_of(crops[0], crops[1], o, images.overlap);
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
    const Keys words{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32) ^ kPurpose, step};
    const int64_t groups_of_images = (found + kLanes - 1) / kLanes;
    const int64_t grain = std::max<int64_t>(kBoxesPerPiece / (boxes_per_image * kLanes), 1);
    parallel_for(groups_of_images, grain, threads, [&](int64_t begin, int64_t end) {
      std::vector<Group> groups(static_cast<size_t>(boxes_per_image));
      Images eight;
      for (int64_t n = begin * kLanes; n < std::min(end * kLanes, found); n += kLanes) {
        gather(yielding->data() + n, found - n, a, b, names, options, eight);
        sample_images(eight, options, words, images, groups.data(), rows1 + n * stride, rows2 + n * stride);
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
