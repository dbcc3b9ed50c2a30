// The published sampler's boxes to the bit: the same geometry, drawn from NumPy's own generator in the published order.
// One number depends on the one before, so one thread draws them all.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
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

// The lowest bits that can hold `last`; none where it is 0. RandomState.randint takes a word's bits under this mask,
// and another word until they do not exceed `last`; a single choice takes no word.
SCRL_INLINE uint32_t mask_of(uint32_t last) {
  return (~uint32_t{0} >> __builtin_clz(last | 1)) & (0 - static_cast<uint32_t>(last != 0));
}

// Numbers of any bit generator, one call each.
struct AnyNumbers {
  const BitGenerator& generator;

  void begin() {}
  SCRL_INLINE uint32_t below_or_at(uint32_t last) {
    if (last == 0) return 0;
    const uint32_t mask = mask_of(last);
    uint32_t drawn;
    do drawn = generator.next_uint32(generator.state) & mask;
    while (drawn > last);
    return drawn;
  }
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

SCRL_MULTIVERSION void twist(const uint32_t* SCRL_RESTRICT key, uint32_t* SCRL_RESTRICT next) {
  constexpr int left = kStateWords - kStateReach;
  for (int i = 0; i < left; ++i) next[i] = twisted(key[i], key[i + 1], key[i + kStateReach]);
  for (int i = left; i < kStateWords - 1; ++i) next[i] = twisted(key[i], key[i + 1], next[i - left]);
  next[kStateWords - 1] = twisted(key[kStateWords - 1], next[0], next[kStateReach - 1]);
}

SCRL_MULTIVERSION void temper(const uint32_t* SCRL_RESTRICT key, uint32_t* SCRL_RESTRICT words) {
  for (int i = 0; i < kStateWords; ++i) {
    uint32_t word = key[i];
    word ^= word >> 11;
    word ^= (word << 7) & 0x9D2C5680;
    word ^= (word << 15) & 0xEFC60000;
    words[i] = word ^ (word >> 18);
  }
}

// The same numbers as AnyNumbers over a Mersenne Twister. A block of 624 words is made at once, and always one more
// than is needed, so that words can be looked at before it is known how many of them will be used: which of the next
// three is the first to fit is counted, not branched on, since no processor predicts it.
struct TwisterNumbers {
  static constexpr int kSlack = 64;  // more than a try looks at
  MersenneTwister& state;
  int64_t next = state.position;
  uint32_t ahead[kStateWords];  // the state after the next twist
  uint32_t words[2 * kStateWords];

  explicit TwisterNumbers(MersenneTwister& s) : state(s) {
    temper(state.key, words);
    look_ahead();
  }
  void look_ahead() {
    twist(state.key, ahead);
    temper(ahead, words + kStateWords);
  }
  // NumPy twists when it needs a word: at the end of a block it still holds that block.
  __attribute__((noinline)) void turn() {
    std::copy(ahead, ahead + kStateWords, state.key);
    std::copy(words + kStateWords, words + 2 * kStateWords, words);
    look_ahead();
    next -= kStateWords;
  }
  SCRL_INLINE void begin() {
    if (next > kStateWords) turn();
  }
  SCRL_INLINE uint32_t below_or_at(uint32_t last) {
    const uint32_t mask = mask_of(last);
    const uint32_t* at = words + next;
    const uint32_t over0 = (at[0] & mask) > last, over1 = over0 & ((at[1] & mask) > last),
                   over2 = over1 & ((at[2] & mask) > last);
    if (__builtin_expect(over2, 0)) return search(mask, last);
    const uint32_t skipped = over0 + over1;
    next += skipped + (last != 0);
    return at[skipped] & mask;
  }
  __attribute__((noinline)) uint32_t search(uint32_t mask, uint32_t last) {
    for (next += 3;; ++next) {
      if (next > 2 * kStateWords - kSlack) turn();
      const uint32_t drawn = words[next] & mask;
      if (drawn <= last) return ++next, drawn;
    }
  }
  SCRL_INLINE double uniform() {
    const double high = words[next] >> 5, low = words[next + 1] >> 6;
    next += 2;
    return (high * 0x1p26 + low) / 0x1p53;
  }
  void finish() {
    begin();
    state.position = static_cast<int>(next);
  }
};

SCRL_INLINE int32_t whole_number(double value) { return static_cast<int32_t>(value); }

// One of 0..count-1.
template <class Source>
SCRL_INLINE int32_t drawn_below(int32_t count, Source& source) {
  return static_cast<int32_t>(source.below_or_at(static_cast<uint32_t>(count - 1)));
}

// One try, as draw_box, in integers.
template <bool kGrid, class Source>
SCRL_INLINE Draw<double> replay_box(const Overlap<double>& o, int32_t least, Source& source) {
  const int32_t across = whole_number(o.width), down = whole_number(o.height);
  int32_t x, y, w, h;
  if constexpr (kGrid) {
    const int32_t columns = 1 + drawn_below(whole_number(o.columns), source),
                  rows = 1 + drawn_below(whole_number(o.rows), source);
    const double cell_w = o.width / columns, cell_h = o.height / rows;
    const int32_t whole_w = whole_number(cell_w), whole_h = whole_number(cell_h);
    const int32_t column = drawn_below(columns, source), row = drawn_below(rows, source);
    w = least + drawn_below(whole_w - least + 1, source), h = least + drawn_below(whole_h - least + 1, source);
    x = drawn_below(whole_w - w + 1, source) + whole_number(column * cell_w);
    y = drawn_below(whole_h - h + 1, source) + whole_number(row * cell_h);
  } else {
    w = least + drawn_below(across - least, source), h = least + drawn_below(down - least, source);
    x = drawn_below(across - w, source), y = drawn_below(down - h, source);
  }
  return {static_cast<double>(x), static_cast<double>(y), static_cast<double>(w), static_cast<double>(h)};
}

// Eight accepted boxes; a place that is still empty overlaps nothing. The alignment is said because GCC otherwise takes
// that of the baseline (16), while the AVX-512 clone relies on 64.
struct alignas(64) Accepted {
  Box<Doubles> box;
  Doubles area;
};

using Flags = int64_t __attribute__((vector_size(8 * kLanes)));

SCRL_INLINE bool any(Flags flags) {
  using Bytes = int8_t __attribute__((vector_size(kLanes)));
  const Bytes narrow = __builtin_convertvector(flags, Bytes);
  uint64_t set;
  std::memcpy(&set, &narrow, sizeof set);
  return set != 0;
}

// The published loop compares the box before it is clipped with those that were clipped, and its division's rounding
// decides at equal distance from the threshold. It is made only where the product leaves it open, so hardly ever.
SCRL_INLINE bool too_close(const Box<double>& box, const Accepted* accepted, int64_t count, double threshold,
                           const Doubles& zero) {
  const Box<Doubles> wide{zero + box.x0, zero + box.y0, zero + box.x1, zero + box.y1};
  const double own = area(box), nearly = threshold * (1.0 - 0x1p-40), surely = threshold * (1.0 + 0x1p-40);
  Flags maybe = {}, sure = {};
  for (int64_t g = 0; g * kLanes < count; ++g) {
    const Doubles shared = shared_area(wide, accepted[g].box);
    const Doubles together = own + accepted[g].area - shared;
    maybe = shared >= nearly * together ? Flags{} - 1 : maybe;
    sure = shared >= surely * together ? Flags{} - 1 : sure;
  }
  bool close = any(sure);
  if (__builtin_expect(any(maybe & ~sure), 0)) {
    for (int64_t i = 0; i < count; ++i) {
      const Box<Doubles>& a = accepted[i / kLanes].box;
      const int64_t lane = i % kLanes;
      const Box<double> other{a.x0[lane], a.y0[lane], a.x1[lane], a.y1[lane]};
      const double shared = shared_area(box, other);
      close |= shared / (own + area(other) - shared) >= threshold;
    }
  }
  return close;
}

// Clips as published: the near edges to 0, the far edges to the size.
SCRL_INLINE Box<double> clip_as_published(const Box<double>& b, double size) {
  return {larger(b.x0, 0.0), larger(b.y0, 0.0), smaller(b.x1, size), smaller(b.y1, size)};
}

SCRL_INLINE void write_row(float* row, float image, const Box<double>& box) {
  row[0] = image, row[1] = static_cast<float>(box.x0), row[2] = static_cast<float>(box.y0);
  row[3] = static_cast<float>(box.x1), row[4] = static_cast<float>(box.y1);
}

struct Work {
  const int64_t *crops1, *crops2;
  int64_t images;
  const std::vector<int64_t>& yielding;
  float *rows1, *rows2;
  Accepted* accepted;  // groups of eight, for the boxes of one image
};

SCRL_INLINE int64_t groups_of(int64_t boxes) { return (boxes + kLanes - 1) / kLanes; }

// Whether a try is accepted does not change which words the next one takes, so nothing waits for it: a box that is too
// close is written over by the next one.
template <bool kGrid, class Source>
SCRL_INLINE void replay_image(const Overlap<double>& overlap, const BoxOptions& o, Source& source, const Work& work,
                              int64_t image, float* rows1, float* rows2) {
  const auto size = static_cast<double>(o.view_size);
  const auto least = static_cast<int32_t>(o.min_size);
  const double low = 1.0 - o.jitter, span = (1.0 + o.jitter) - low;
  const auto image1 = static_cast<float>(image), image2 = static_cast<float>(image + work.images);
  // Zeros of which the compiler knows nothing: GCC 12 makes a vector of one number lane by lane, but adds one to a
  // vector as it should.
  alignas(64) Doubles zero = {};
  __asm__("" : "+m"(zero));
  Accepted* accepted = work.accepted;
  std::fill(accepted, accepted + groups_of(o.boxes_per_image), Accepted{});
  for (int64_t i = 0, attempt = 0; i < o.boxes_per_image;) {
    source.begin();
    const Draw<double> draw = replay_box<kGrid>(overlap, least, source);
    Box<double> box1 = to_view(overlap, 0, draw, size), box2 = to_view(overlap, 1, draw, size);
    if (o.jitter > 0.0) {
      double factors[4];
      for (double& factor : factors) factor = low + span * source.uniform();
      box2 = jittered(box2, factors);
    }
    const bool close = o.iou_threshold < 1.0 && too_close(box1, accepted, i, o.iou_threshold, zero);
    const bool kept = !close | (attempt == kTries - 1);
    box1 = clip_as_published(box1, size);
    write_row(rows1 + i * kBoxFields, image1, box1);
    write_row(rows2 + i * kBoxFields, image2, clip_as_published(box2, size));
    Accepted& group = accepted[i / kLanes];
    const int64_t lane = i % kLanes;
    group.box.x0[lane] = box1.x0, group.box.y0[lane] = box1.y0, group.box.y1[lane] = box1.y1;
    group.box.x1[lane] = kept ? box1.x1 : kNowhere;
    group.area[lane] = area(box1);
    i += kept, attempt = kept ? 0 : attempt + 1;
  }
}

template <class Source>
SCRL_INLINE void replay_images(const Work& work, const BoxOptions& o, Source& source) {
  const int64_t stride = o.boxes_per_image * kBoxFields;
  float *rows1 = work.rows1, *rows2 = work.rows2;
  for (const int64_t image : work.yielding) {
    const Overlap<double> overlap =
        overlap_of(crop_of(work.crops1 + image * kCropFields), crop_of(work.crops2 + image * kCropFields), o);
    o.grid ? replay_image<true>(overlap, o, source, work, image, rows1, rows2)
           : replay_image<false>(overlap, o, source, work, image, rows1, rows2);
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
  std::vector<Accepted> accepted(static_cast<size_t>(groups_of(boxes_per_image)));
  const Work work{crops1.data(),
                  crops2.data(),
                  crops1.shape(0),
                  *yielding,
                  boxes.first.mutable_data(),
                  boxes.second.mutable_data(),
                  accepted.data()};
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
