// The published sampler's boxes to the bit: the same geometry, drawn from NumPy's own generator in the published order.
// One number depends on the one before, so one thread draws them all.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
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

// Numbers of any bit generator, one call each.
struct AnyNumbers {
  const BitGenerator& generator;
  SCRL_INLINE uint32_t word() { return generator.next_uint32(generator.state); }
  SCRL_INLINE double uniform() { return generator.next_double(generator.state); }
  void finish() {}
};

// NumPy's MT19937 as it lies in memory (numpy/random/src/mt19937/mt19937.h; the caller has compared it with what the
// generator says of itself).
constexpr int kStateWords = 624, kStateReach = 397;
struct MersenneTwister {
  uint32_t key[kStateWords];
  int position;
};

SCRL_INLINE uint32_t twisted(uint32_t here, uint32_t next, uint32_t far) {
  const uint32_t mixed = (here & 0x80000000) | (next & 0x7FFFFFFF);
  return far ^ (mixed >> 1) ^ ((mixed & 1) ? 0x9908B0DF : 0);
}

SCRL_MULTIVERSION void twist(uint32_t* key) {
  constexpr int left = kStateWords - kStateReach;
  for (int i = 0; i < left; ++i) key[i] = twisted(key[i], key[i + 1], key[i + kStateReach]);
  for (int i = left; i < kStateWords - 1; ++i) key[i] = twisted(key[i], key[i + 1], key[i - left]);
  key[kStateWords - 1] = twisted(key[kStateWords - 1], key[0], key[kStateReach - 1]);
}

SCRL_MULTIVERSION void temper(const uint32_t* key, uint32_t* words) {
  for (int i = 0; i < kStateWords; ++i) {
    uint32_t word = key[i];
    word ^= word >> 11;
    word ^= (word << 7) & 0x9D2C5680;
    word ^= (word << 15) & 0xEFC60000;
    words[i] = word ^ (word >> 18);
  }
}

// The same numbers as AnyNumbers over a Mersenne Twister, a block of 624 made at once (4 -> 1 ns a word).
struct TwisterNumbers {
  MersenneTwister& state;
  int next = state.position;
  uint32_t words[kStateWords];

  explicit TwisterNumbers(MersenneTwister& s) : state(s) { temper(state.key, words); }
  SCRL_INLINE uint32_t word() {
    if (next == kStateWords) twist(state.key), temper(state.key, words), next = 0;
    return words[next++];
  }
  SCRL_INLINE double uniform() {
    const double high = word() >> 5, low = word() >> 6;
    return (high * 0x1p26 + low) / 0x1p53;
  }
  void finish() { state.position = next; }
};

// numpy.random.RandomState.randint(0, count): the lowest bits that can hold count - 1, again until they do not exceed
// it. A single choice draws nothing.
template <class Source>
struct LegacyIntegers {
  Source& source;

  SCRL_INLINE double operator()(double count) const {
    const auto last = static_cast<uint32_t>(static_cast<int32_t>(count)) - 1;
    if (last == 0) return 0.0;
    const uint32_t mask = ~uint32_t{0} >> __builtin_clz(last);
    uint32_t drawn;
    do drawn = source.word() & mask;
    while (drawn > last);
    return static_cast<int32_t>(drawn);
  }
};

// Accepted boxes, eight to a vector; what was not filled has no area and overlaps nothing. The alignment is said
// because GCC otherwise takes that of the baseline (16), while the AVX-512 clone relies on 64.
struct alignas(64) Accepted {
  Box<Doubles> box;
};

// The published loop compares the box before it is clipped with those that were clipped. The division stays: at equal
// distance from the threshold its rounding decides. It is made only where the product says that it may matter.
SCRL_INLINE bool too_close(const Box<double>& box, const Accepted* accepted, int64_t count, double threshold) {
  using Flags = int64_t __attribute__((vector_size(8 * kLanes)));
  const Doubles none = {};
  const Box<Doubles> wide{none + box.x0, none + box.y0, none + box.x1, none + box.y1};
  const double own = area(box), nearly = threshold * (1.0 - 0x1p-40);
  Flags maybe = {};
  for (int64_t g = 0; g * kLanes < count; ++g) {
    const Doubles shared = shared_area(wide, accepted[g].box);
    maybe = shared >= nearly * (own + area(accepted[g].box) - shared) ? Flags{} - 1 : maybe;
  }
  int64_t any = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) any |= maybe[lane];
  if (!any) return false;
  bool close = false;
  for (int64_t i = 0; i < count; ++i) {
    const Box<Doubles>& a = accepted[i / kLanes].box;
    const int64_t lane = i % kLanes;
    const Box<double> other{a.x0[lane], a.y0[lane], a.x1[lane], a.y1[lane]};
    const double shared = shared_area(box, other);
    close |= shared / (own + area(other) - shared) >= threshold;
  }
  return close;
}

// Clips as published: the near edges to 0, the far edges to the size.
SCRL_INLINE Box<double> clip_as_published(const Box<double>& b, double size) {
  return {larger(b.x0, 0.0), larger(b.y0, 0.0), smaller(b.x1, size), smaller(b.y1, size)};
}

SCRL_INLINE void write_row(float* row, int64_t image, const Box<double>& box) {
  row[0] = static_cast<float>(image), row[1] = static_cast<float>(box.x0), row[2] = static_cast<float>(box.y0);
  row[3] = static_cast<float>(box.x1), row[4] = static_cast<float>(box.y1);
}

struct Work {
  const int64_t *crops1, *crops2;
  int64_t images;
  const std::vector<int64_t>& yielding;
  float *rows1, *rows2;
};

template <bool kGrid, class Source>
SCRL_INLINE void replay_image(const Overlap<double>& overlap, const BoxOptions& o, Source& source, const Work& work,
                              int64_t image, std::vector<Accepted>& accepted, float* rows1, float* rows2) {
  const auto size = static_cast<double>(o.view_size), least = static_cast<double>(o.min_size);
  const double low = 1.0 - o.jitter, span = (1.0 + o.jitter) - low;
  std::fill(accepted.begin(), accepted.end(), Accepted{});
  for (int64_t i = 0; i < o.boxes_per_image; ++i) {
    Draw<double> draw;
    Box<double> box1;
    double factors[4] = {};
    for (int attempt = 0; attempt < kTries; ++attempt) {
      draw = draw_box<kGrid, double>(overlap, least, LegacyIntegers<Source>{source});
      box1 = to_view(overlap, 0, draw, size);
      if (o.jitter > 0.0)
        for (double& factor : factors) factor = low + span * source.uniform();
      if (i == 0 || o.iou_threshold == 1.0 || !too_close(box1, accepted.data(), i, o.iou_threshold)) break;
    }
    Box<double> box2 = to_view(overlap, 1, draw, size);
    if (o.jitter > 0.0) box2 = jittered(box2, factors);
    box1 = clip_as_published(box1, size);
    Box<Doubles>& group = accepted[static_cast<size_t>(i / kLanes)].box;
    const int64_t lane = i % kLanes;
    group.x0[lane] = box1.x0, group.y0[lane] = box1.y0, group.x1[lane] = box1.x1, group.y1[lane] = box1.y1;
    write_row(rows1 + i * kBoxFields, image, box1);
    write_row(rows2 + i * kBoxFields, image + work.images, clip_as_published(box2, size));
  }
}

template <class Source>
SCRL_INLINE void replay_images(const Work& work, const BoxOptions& o, Source& source) {
  std::vector<Accepted> accepted(static_cast<size_t>((o.boxes_per_image + kLanes - 1) / kLanes));
  const int64_t stride = o.boxes_per_image * kBoxFields;
  float *rows1 = work.rows1, *rows2 = work.rows2;
  for (const int64_t image : work.yielding) {
    const Overlap<double> overlap =
        overlap_of(crop_of(work.crops1 + image * kCropFields), crop_of(work.crops2 + image * kCropFields), o);
    o.grid ? replay_image<true>(overlap, o, source, work, image, accepted, rows1, rows2)
           : replay_image<false>(overlap, o, source, work, image, accepted, rows1, rows2);
    rows1 += stride, rows2 += stride;
  }
  source.finish();
}

SCRL_MULTIVERSION void replay_any(const Work& work, const BoxOptions& o, AnyNumbers& source) {
  replay_images(work, o, source);
}

SCRL_MULTIVERSION void replay_twister(const Work& work, const BoxOptions& o, TwisterNumbers& source) {
  replay_images(work, o, source);
}

// None where a crop is out of range; the caller says which. capsule: a bit generator's, its lock held by the caller.
// twister: its state lies in memory as MersenneTwister.
std::optional<std::pair<Boxes, Boxes>> sample_box_pairs_replay(const Crops& crops1, const Crops& crops2,
                                                               int64_t view_size, int64_t boxes_per_image,
                                                               int64_t min_size, double iou_threshold, bool grid,
                                                               double jitter, const py::capsule& capsule,
                                                               bool twister) {
  const BoxOptions options{view_size, boxes_per_image, min_size, iou_threshold, grid, jitter};
  const BitGenerator& generator = *capsule.get_pointer<BitGenerator>();
  const auto yielding = images_with_boxes(crops1.data(), crops2.data(), crops1.shape(0), options);
  if (!yielding) return std::nullopt;
  const std::vector<py::ssize_t> shape{static_cast<int64_t>(yielding->size()) * boxes_per_image, kBoxFields};
  std::pair<Boxes, Boxes> boxes{Boxes(shape), Boxes(shape)};
  const Work work{crops1.data(),
                  crops2.data(),
                  crops1.shape(0),
                  *yielding,
                  boxes.first.mutable_data(),
                  boxes.second.mutable_data()};
  py::gil_scoped_release release;
  if (twister) {
    TwisterNumbers numbers(*static_cast<MersenneTwister*>(generator.state));
    replay_twister(work, options, numbers);
  } else {
    AnyNumbers numbers{generator};
    replay_any(work, options, numbers);
  }
  return boxes;
}

}  // namespace

void bind_sample_box_pairs_replay(py::module_& m) {
  m.def("sample_box_pairs_replay", &sample_box_pairs_replay,
        "Arguments as checked by scrl_fast.ops.sample_box_pairs_replay; None where a crop is out of range.");
}

}  // namespace scrl_fast::host
