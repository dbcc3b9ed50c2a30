// Matched boxes in the overlap of two crops (SCRL, arXiv 2103.06122): counter-based random numbers, so each image is
// drawn by whichever thread comes to it, and the result is the same for any number of threads. Sixteen images are drawn
// side by side, each at a box and a try of its own: one that is done makes room for the next, so no lane waits.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstring>
#include <memory>
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
constexpr int64_t kLanes = 8;   // float64 numbers in the widest register
constexpr int64_t kGroups = 2;  // of eight images each: the latency of one hides behind the other
// Waking a thread takes 25 to 40 us, and then it fetches what the other one has in its cache; a box takes 22 ns.
constexpr int64_t kBoxesPerThread = 8192;

const PhiloxEight philox_one = philox_eight_here<1>(), philox_two = philox_eight_here<2>();

struct Keys {
  uint32_t key0, key1, step;
};

using Flags = int64_t __attribute__((vector_size(8 * kLanes)));  // 0 or -1

// word * 2^-32, exact.
SCRL_INLINE Doubles number(const uint64_t (&words)[kLanes]) {
  DoubleBits bits;
  std::memcpy(&bits, words, sizeof bits);
  return from_bits((bits & 0xFFFFFFFF) | 0x4130000000000000) - 0x1p20;  // 2^20 + word * 2^-32
}

// Random words in the order in which they are used; word * count < 2^52, so the product is exact.
struct Numbers {
  const uint64_t (*next)[kLanes];
  SCRL_INLINE Doubles operator()(Doubles count) { return whole_part(number(*next++) * count); }
};

// One box of eight images. The alignment is said because GCC otherwise takes that of the baseline (16), while the
// AVX-512 clone relies on 64.
struct alignas(64) Slot {
  Box<Doubles> box;
  Doubles area;
};

// What all threads share.
struct Job {
  const BoxOptions& options;
  const Keys& keys;
  const int64_t *crops1, *crops2, *names;  // [images, 5] each; names [images]: their keys, or null for their indices
  int64_t images;
  const int64_t* yielding;  // [found]
  int64_t found;
  float *rows1, *rows2;        // [found * boxes_per_image, 5] each
  std::atomic<int64_t>& next;  // of the list of those that yield boxes, the first that no thread has taken
};

// Eight images side by side, each at a box of its own.
struct alignas(64) Lanes {
  Overlap<Doubles> overlap;
  WideCounter counter;
  Flags active;  // the others have no image any more; what they draw goes nowhere
  Slot own;      // the box just drawn, in view 1
  Box<Doubles> box2;
  float* rows1[kLanes];  // where it will stand
  float* rows2[kLanes];
  double* place[kLanes];
  float image1[kLanes], image2[kLanes];
  Slot* slots;   // the boxes kept, by box
  int64_t used;  // slots that hold a box of any lane
  float idle[2 * kBoxFields];
};

// Lanes' pointers are moved as eight 64-bit numbers, and the first lane is the lowest byte of a word.
static_assert(sizeof(double*) == 8 && std::endian::native == std::endian::little);

// 0xFF in the byte of each lane that is not 0.
SCRL_INLINE uint64_t lanes_set(Flags flags) {
  using Bytes = int8_t __attribute__((vector_size(kLanes)));
  const Bytes narrow = __builtin_convertvector(flags, Bytes);
  uint64_t set;
  std::memcpy(&set, &narrow, sizeof set);
  return set;
}

// Images that follow each other in a list (null: all of them), the last one repeated where there are fewer than eight.
struct alignas(64) EightCrops {
  Crop<Doubles> view[2];
};

// False where a crop is out of range; those of a list have been looked at.
SCRL_INLINE bool gather(const int64_t* list, int64_t first, int64_t count, const int64_t* crops1, const int64_t* crops2,
                        EightCrops& crops) {
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const int64_t at = std::min(first + lane, count - 1), image = list ? list[at] : at;
    for (int v = 0; v < 2; ++v) {
      const int64_t* row = (v == 0 ? crops1 : crops2) + image * kCropFields;
      if (!list && !crop_in_range(row)) return false;
      const Crop<double> crop = crop_of(row);
      Crop<Doubles>& c = crops.view[v];
      c.y[lane] = crop.y, c.x[lane] = crop.x, c.h[lane] = crop.h, c.w[lane] = crop.w, c.flip[lane] = crop.flip;
    }
  }
  return true;
}

// The images a thread has taken and not yet begun.
struct alignas(64) Queue {
  Overlap<Doubles> overlap;
  int64_t at = 0, end = 0;
};

SCRL_INLINE void take_images(const Job& job, Queue& queue) {
  queue.at = std::min(job.next.fetch_add(kLanes, std::memory_order_relaxed), job.found);
  queue.end = std::min(queue.at + kLanes, job.found);
  if (queue.at == queue.end) return;
  EightCrops crops;
  gather(job.yielding, queue.at, job.found, job.crops1, job.crops2, crops);
  queue.overlap = overlap_of(crops.view[0], crops.view[1], job.options);
}

// Gives a lane its next image.
SCRL_INLINE void load_image(const Job& job, Queue& queue, Lanes& lanes, int64_t lane) {
  if (queue.at == queue.end) take_images(job, queue);
  lanes.counter.first[lane] = 0;
  if (queue.at == queue.end) {
    lanes.active[lane] = 0;
    lanes.place[lane] = reinterpret_cast<double*>(lanes.slots) + lane;
    lanes.rows1[lane] = lanes.idle, lanes.rows2[lane] = lanes.idle + kBoxFields;
    return;
  }
  const int64_t n = queue.at++, image = job.yielding[n];
  const auto name = static_cast<uint64_t>(job.names ? job.names[image] : image);
  lanes.counter.second[lane] = name & 0xFFFFFFFF, lanes.counter.third[lane] = name >> 32;
  const auto* from = reinterpret_cast<const double*>(&queue.overlap) + n % kLanes;
  auto* to = reinterpret_cast<double*>(&lanes.overlap) + lane;
  for (size_t i = 0; i < sizeof(Overlap<Doubles>) / sizeof(Doubles); ++i) to[kLanes * i] = from[kLanes * i];
  for (int64_t j = 0; j < lanes.used; ++j) lanes.slots[j].box.x1[lane] = kNowhere;
  lanes.active[lane] = -1;
  const int64_t place = n * job.options.boxes_per_image * kBoxFields;
  lanes.rows1[lane] = job.rows1 + place, lanes.rows2[lane] = job.rows2 + place;
  lanes.image1[lane] = static_cast<float>(image), lanes.image2[lane] = static_cast<float>(image + job.images);
  lanes.place[lane] = reinterpret_cast<double*>(lanes.slots) + lane;
}

// Boxes as rows of four float32 numbers.
SCRL_INLINE void transposed(const Box<Doubles>& box, float (&edges)[kLanes][4]) {
  using Floats = float __attribute__((vector_size(4 * kLanes)));
  using Pairs = double __attribute__((vector_size(4 * kLanes)));
  const Floats x0 = __builtin_convertvector(box.x0, Floats), y0 = __builtin_convertvector(box.y0, Floats),
               x1 = __builtin_convertvector(box.x1, Floats), y1 = __builtin_convertvector(box.y1, Floats);
  const auto near_low = (Pairs)SCRL_SHUFFLE(x0, y0, 0, 8, 1, 9, 4, 12, 5, 13);
  const auto far_low = (Pairs)SCRL_SHUFFLE(x1, y1, 0, 8, 1, 9, 4, 12, 5, 13);
  const auto near_high = (Pairs)SCRL_SHUFFLE(x0, y0, 2, 10, 3, 11, 6, 14, 7, 15);
  const auto far_high = (Pairs)SCRL_SHUFFLE(x1, y1, 2, 10, 3, 11, 6, 14, 7, 15);
  const Pairs rows[4] = {SCRL_SHUFFLE(near_low, far_low, 0, 4, 2, 6), SCRL_SHUFFLE(near_low, far_low, 1, 5, 3, 7),
                         SCRL_SHUFFLE(near_high, far_high, 0, 4, 2, 6), SCRL_SHUFFLE(near_high, far_high, 1, 5, 3, 7)};
  for (int i = 0; i < 4; ++i) {
    std::memcpy(edges[i], &rows[i], 16);
    std::memcpy(edges[i + 4], reinterpret_cast<const char*>(&rows[i]) + 16, 16);
  }
}

// Draws a box for each lane.
SCRL_INLINE void draw_group(const Job& job, Lanes& lanes, const WideWords* words) {
  const BoxOptions& o = job.options;
  const auto size = static_cast<double>(o.view_size), least = static_cast<double>(o.min_size);
  Numbers numbers{words[0].value};
  const Overlap<Doubles>& overlap = lanes.overlap;
  const Draw<Doubles> draw =
      o.grid ? draw_box<true, Doubles>(overlap, least, numbers) : draw_box<false, Doubles>(overlap, least, numbers);
  lanes.own.box = clip(to_view(overlap, 0, draw, size), size);
  lanes.own.area = area(lanes.own.box);
  Box<Doubles> box2 = to_view(overlap, 1, draw, size);
  if (o.jitter > 0.0) {
    const double low = 1.0 - o.jitter, span = (1.0 + o.jitter) - low;
    Doubles factors[4];
    for (int j = 0; j < 4; ++j) factors[j] = low + span * number(words[2].value[j]);
    box2 = jittered(box2, factors);
  }
  lanes.box2 = clip(box2, size);
}

// The lanes whose box keeps apart from those before it: the IoU of none is the threshold or more (multiplied out: no
// division). The last try is kept as it is.
SCRL_INLINE Flags accepted_of(const Job& job, const Lanes& lanes) {
  const BoxOptions& o = job.options;
  const Slot own = lanes.own;
  Flags close = {};
  if (o.iou_threshold < 1.0) {
    for (int64_t j = 0; j < lanes.used; ++j) {
      const Slot& other = lanes.slots[j];
      const Doubles shared = shared_area(own.box, other.box);
      const Doubles reach = o.iou_threshold * (own.area + other.area - shared);
      close = shared >= reach ? Flags{} - 1 : close;  // a comparison kept as a value is taken apart by GCC 12
    }
  }
  Flags counter;
  std::memcpy(&counter, lanes.counter.first, sizeof counter);
  const Flags last_try = (counter & 0xFC) == ((kTries - 1) << 2);
  return lanes.active & (~close | last_try);
}

SCRL_INLINE void advance(void* pointers, Flags accepted, int64_t bytes) {
  Flags moved;
  std::memcpy(&moved, pointers, sizeof moved);
  moved += accepted & bytes;
  std::memcpy(pointers, &moved, sizeof moved);
}

// Writes every lane's box, moves on those that accepted theirs and loads images where one is done: a box that was not
// accepted overlaps nothing and is written over by the next, which costs less than choosing.
SCRL_INLINE void keep(const Job& job, Lanes& lanes, Flags accepted, Queue& queue) {
  const BoxOptions& o = job.options;
  alignas(64) float edges1[kLanes][4], edges2[kLanes][4];
  transposed(lanes.own.box, edges1), transposed(lanes.box2, edges2);
  const Doubles nowhere = Doubles{} + kNowhere;
  lanes.own.box.x1 = accepted ? lanes.own.box.x1 : nowhere;
  const auto* from = reinterpret_cast<const double*>(&lanes.own);
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    float *row1 = lanes.rows1[lane], *row2 = lanes.rows2[lane];
    row1[0] = lanes.image1[lane], row2[0] = lanes.image2[lane];
    std::memcpy(row1 + 1, edges1[lane], 16), std::memcpy(row2 + 1, edges2[lane], 16);
    double* slot = lanes.place[lane];
    for (int i = 0; i < 5; ++i) slot[kLanes * i] = from[kLanes * i + lane];
  }
  advance(lanes.rows1, accepted, sizeof(float) * kBoxFields);
  advance(lanes.rows2, accepted, sizeof(float) * kBoxFields);
  advance(lanes.place, accepted, sizeof(Slot));
  Flags counter;
  std::memcpy(&counter, lanes.counter.first, sizeof counter);
  counter = accepted ? (counter & ~Flags{} << 8) + 0x100 : counter + (lanes.active & 4);
  std::memcpy(lanes.counter.first, &counter, sizeof counter);
  lanes.used = std::min(lanes.used + 1, o.boxes_per_image);
  const Flags ended = counter >= o.boxes_per_image << 8;
  for (uint64_t done = lanes_set(ended); done;) {
    const int64_t lane = __builtin_ctzll(done) / 8;
    done &= ~(uint64_t{0xFF} << 8 * lane);
    load_image(job, queue, lanes, lane);
  }
}

// Draws images until there are no more. Each part is done for both groups before the next, so that they overlap.
SCRL_INLINE void sample_until_done(const Job& job, Lanes* groups, Slot* slots) {
  const BoxOptions& o = job.options;
  Queue queue = {};
  for (int64_t i = 0; i < kGroups * o.boxes_per_image; ++i) {
    const Doubles none = {};
    slots[i].box = {none, none, none + kNowhere, none};
    slots[i].area = none + 1.0;
  }
  for (int64_t g = 0; g < kGroups; ++g) {
    Lanes& lanes = groups[g];
    lanes.counter.fourth = job.keys.step;
    lanes.slots = slots + g * o.boxes_per_image, lanes.used = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) load_image(job, queue, lanes, lane);
  }
  const PhiloxEight philox = o.grid ? philox_two : philox_one;
  for (;;) {
    WideWords words[kGroups][3];
    bool busy[kGroups], any = false;
    for (int64_t g = 0; g < kGroups; ++g) {
      any |= busy[g] = lanes_set(groups[g].active) != 0;
      if (!busy[g]) continue;
      philox(groups[g].counter, 0, job.keys.key0, job.keys.key1, words[g]);
      if (o.jitter > 0.0) philox_one(groups[g].counter, 2, job.keys.key0, job.keys.key1, words[g] + 2);
    }
    if (!any) return;
    for (int64_t g = 0; g < kGroups; ++g)
      if (busy[g]) draw_group(job, groups[g], words[g]);
    alignas(64) Flags accepted[kGroups];
    for (int64_t g = 0; g < kGroups; ++g)
      if (busy[g]) accepted[g] = accepted_of(job, groups[g]);
    for (int64_t g = 0; g < kGroups; ++g)
      if (busy[g]) keep(job, groups[g], accepted[g], queue);
  }
}

SCRL_MULTIVERSION void sample_images(const Job& job, Lanes* groups, Slot* slots) {
  sample_until_done(job, groups, slots);
}

// Lists the images that yield boxes, which needs no random number; false where a crop is out of range.
SCRL_INLINE bool list_yielding(const int64_t* crops1, const int64_t* crops2, int64_t images, const BoxOptions& o,
                               int64_t* yielding, int64_t* found) {
  const auto size = static_cast<double>(o.view_size), least = static_cast<double>(o.min_size);
  *found = 0;
  for (int64_t first = 0; first < images; first += kLanes) {
    EightCrops crops;
    if (!gather(nullptr, first, images, crops1, crops2, crops)) return false;
    const Crop<Doubles>&c = crops.view[0], &d = crops.view[1];
    const Doubles side = smaller(drawn_extent(c.x, c.w, d.x, d.w, size), drawn_extent(c.y, c.h, d.y, d.h, size));
    const Flags enough = side > least ? Flags{} - 1 : Flags{};
    for (int64_t lane = 0; lane < std::min(kLanes, images - first); ++lane) {
      yielding[*found] = first + lane;
      *found -= enough[lane];
    }
  }
  return true;
}

SCRL_MULTIVERSION bool find_yielding(const int64_t* crops1, const int64_t* crops2, int64_t images, const BoxOptions& o,
                                     int64_t* yielding, int64_t* found) {
  return list_yielding(crops1, crops2, images, o, yielding, found);
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
  const auto yielding = std::make_unique_for_overwrite<int64_t[]>(static_cast<size_t>(images) + 1);
  int64_t found = 0;
  if (!find_yielding(a, b, images, options, yielding.get(), &found)) return std::nullopt;
  const std::vector<py::ssize_t> shape{found * boxes_per_image, kBoxFields};
  std::pair<Boxes, Boxes> boxes{Boxes(shape), Boxes(shape)};
  float *rows1 = boxes.first.mutable_data(), *rows2 = boxes.second.mutable_data();
  {
    py::gil_scoped_release release;
    const Keys words{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32) ^ kPurpose, step};
    std::atomic<int64_t> next{0};
    const Job job{options, words, a, b, names, images, yielding.get(), found, rows1, rows2, next};
    const int64_t pieces = std::clamp<int64_t>(found * boxes_per_image / kBoxesPerThread, 1, std::max(threads, 1));
    parallel_for(pieces, 1, threads, [&](int64_t, int64_t) {
      Lanes groups[kGroups] = {};
      const auto slots = std::make_unique_for_overwrite<Slot[]>(static_cast<size_t>(kGroups * boxes_per_image));
      sample_images(job, groups, slots.get());
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
