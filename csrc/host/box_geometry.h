// Where boxes lie: the overlap of two crops, one draw inside it, its place in a view, and whether it is too close to
// others. Shared by the counter-based sampler and the replay of NumPy's stream; both follow scrl_fast/ops/
// sample_box_pairs.py operation by operation in float64, so the results agree to the last bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "../cpu/vectorize.h"

// A fused multiply-add rounds once where the reference rounds twice.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off", "finite-math-only", "no-signed-zeros")
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors only pass through inlined calls
#endif

namespace scrl_fast::host {

constexpr int kTries = 50;
constexpr int64_t kLimit = int64_t{1} << 20;  // sizes and coordinates stay below: every product here is exact
constexpr int kCropFields = 5, kBoxFields = 5;
constexpr double kNowhere = -0x1p60;  // as its right edge lets a box overlap nothing

struct BoxOptions {
  int64_t view_size, boxes_per_image, min_size;
  double iou_threshold;
  bool grid;
  double jitter;
};

// A number is one float64 or eight, of eight images: the arithmetic below is written once for both.
// What holds numbers says its alignment, because GCC otherwise takes that of the baseline (16), while the AVX-512 clone
// relies on 64.
using Doubles = double __attribute__((vector_size(64)));

// Rows (y, x, h, w, flip); flip is 0 or 1.
template <class Number>
struct alignas(sizeof(Number)) Crop {
  Number y, x, h, w, flip;
};

template <class Number>
struct alignas(sizeof(Number)) ViewMap {
  Number scale_x, scale_y, offset_x, offset_y, flip;
};

// Boxes are drawn in width x height pixels, then mapped into each view.
template <class Number>
struct alignas(sizeof(Number)) Overlap {
  Number width, height, unscale_x, unscale_y;
  Number columns, rows;  // the finest grid
  ViewMap<Number> view[2];
};

template <class Number>
struct alignas(sizeof(Number)) Draw {
  Number x, y, width, height;
};

template <class Number>
struct alignas(sizeof(Number)) Box {
  Number x0, y0, x1, y1;
};

template <class Number>
SCRL_INLINE Number smaller(Number a, Number b) {
  return b < a ? b : a;
}

template <class Number>
SCRL_INLINE Number larger(Number a, Number b) {
  return a < b ? b : a;
}

// The nearest integer to 0 <= value < 2^51, half to even: adding 2^52 leaves no bits for a fraction. Exact, and one
// form for every instruction set.
template <class Number>
SCRL_INLINE Number nearest(Number value) {
  return (value + 0x1p52) - 0x1p52;
}

// Floor of 0 <= value < 2^51.
template <class Number>
SCRL_INLINE Number whole(Number value) {
  const Number near = nearest(value);
  return near > value ? near - 1.0 : near;
}

SCRL_INLINE double from_bits(uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

using DoubleBits = uint64_t __attribute__((vector_size(64)));

SCRL_INLINE Doubles from_bits(DoubleBits bits) {
  Doubles value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Floor of 0 <= value < 2^20 that is a multiple of 2^-32, or further than that below the next integer: adding 2^20
// leaves 32 bits for the fraction, and they are cut off.
template <class Number>
SCRL_INLINE Number whole_part(Number value) {
  using Word = std::conditional_t<std::is_same_v<Number, double>, uint64_t, DoubleBits>;
  const Number sum = value + 0x1p20;
  Word bits;
  std::memcpy(&bits, &sum, sizeof bits);
  return from_bits(bits & 0xFFFFFFFF00000000) - 0x1p20;
}

inline bool crop_in_range(const int64_t* crop) {
  bool beyond = crop[2] < 1 || crop[3] < 1;
  for (int i = 0; i < 4; ++i) beyond |= !(crop[i] > -kLimit && crop[i] < kLimit);
  return !beyond;
}

SCRL_INLINE Crop<double> crop_of(const int64_t* crop) {
  return {static_cast<double>(crop[0]), static_cast<double>(crop[1]), static_cast<double>(crop[2]),
          static_cast<double>(crop[3]), crop[4] != 0 ? 1.0 : 0.0};
}

// Pixels in which boxes are drawn, along one axis: what both views show, at the coarser view's scale.
template <class Number>
SCRL_INLINE Number drawn_extent(Number first, Number first_size, Number second, Number second_size, double view_size) {
  const Number none = {};
  const Number span = smaller(first + first_size, second + second_size) - larger(first, second);
  return nearest(larger(span, none) * (view_size / larger(first_size, second_size)));
}

template <class Number>
SCRL_INLINE Overlap<Number> overlap_of(const Crop<Number>& a, const Crop<Number>& b, const BoxOptions& o) {
  const auto size = static_cast<double>(o.view_size), least = static_cast<double>(o.min_size);
  const Number left = larger(a.x, b.x), top = larger(a.y, b.y);
  Overlap<Number> overlap;
  overlap.width = drawn_extent(a.x, a.w, b.x, b.w, size);
  overlap.height = drawn_extent(a.y, a.h, b.y, b.h, size);
  overlap.columns =
      whole(overlap.width / least);  // exact: a quotient of integers this small is never rounded up to one
  overlap.rows = whole(overlap.height / least);
  for (int v = 0; v < 2; ++v) {
    const Crop<Number>& crop = v == 0 ? a : b;
    const Number scale_x = size / crop.w, scale_y = size / crop.h;
    overlap.view[v] = {scale_x, scale_y, (left - crop.x) * scale_x, (top - crop.y) * scale_y, crop.flip};
  }
  overlap.unscale_x = 1.0 / smaller(overlap.view[0].scale_x, overlap.view[1].scale_x);
  overlap.unscale_y = 1.0 / smaller(overlap.view[0].scale_y, overlap.view[1].scale_y);
  return overlap;
}

// Whether the image yields boxes: needs no random number, so every image's rows are known before any box is drawn.
inline bool yields_boxes(const Crop<double>& a, const Crop<double>& b, const BoxOptions& o) {
  const auto size = static_cast<double>(o.view_size), least = static_cast<double>(o.min_size);
  return drawn_extent(a.x, a.w, b.x, b.w, size) > least && drawn_extent(a.y, a.h, b.y, b.h, size) > least;
}

// The images that yield boxes, in order; nothing where a crop is out of range.
inline std::optional<std::vector<int64_t>> images_with_boxes(const int64_t* a, const int64_t* b, int64_t images,
                                                             const BoxOptions& o) {
  std::vector<int64_t> found(static_cast<size_t>(images));
  int64_t count = 0;
  for (int64_t i = 0; i < images; ++i, a += kCropFields, b += kCropFields) {
    if (!crop_in_range(a) || !crop_in_range(b)) return std::nullopt;
    found[static_cast<size_t>(count)] = i;
    count += yields_boxes(crop_of(a), crop_of(b), o);
  }
  found.resize(static_cast<size_t>(count));
  return found;
}

// One try. below(n) is uniform in 0..n-1, n < 2^20; its calls are ordered.
template <bool kGrid, class Number, class Below>
SCRL_INLINE Draw<Number> draw_box(const Overlap<Number>& o, double min_size, Below&& below) {
  const Number none = {};
  const Number least = none + min_size, across = o.width, down = o.height;
  if constexpr (!kGrid) {
    const Number w = least + below(across - least), h = least + below(down - least);
    const Number x = below(across - w), y = below(down - h);
    return {x, y, w, h};
  } else {
    const Number columns = 1.0 + below(o.columns), rows = 1.0 + below(o.rows);
    const Number cell_w = across / columns, cell_h = down / rows;
    const Number column = below(columns), row = below(rows);
    const Number whole_w = whole_part(cell_w), whole_h = whole_part(cell_h);
    const Number w = least + below(whole_w - (least - 1.0)), h = least + below(whole_h - (least - 1.0));
    const Number x = below(whole_w - w + 1.0) + whole(column * cell_w);
    const Number y = below(whole_h - h + 1.0) + whole(row * cell_h);
    return {x, y, w, h};
  }
}

template <class Number>
SCRL_INLINE Box<Number> to_view(const Overlap<Number>& o, int v, const Draw<Number>& draw, double size) {
  const ViewMap<Number>& view = o.view[v];
  const Number none = {};
  const Number x0 = draw.x * o.unscale_x * view.scale_x + view.offset_x;
  const Number y0 = draw.y * o.unscale_y * view.scale_y + view.offset_y;
  const Number x1 = x0 + draw.width * o.unscale_x * view.scale_x;
  const Number y1 = y0 + draw.height * o.unscale_y * view.scale_y;
  return {view.flip > none ? size - x1 : x0, y0, view.flip > none ? size - x0 : x1, y1};
}

// factors: four numbers in [1 - ratio, 1 + ratio].
template <class Number>
SCRL_INLINE Box<Number> jittered(const Box<Number>& box, const Number* factors) {
  const Number w = box.x1 - box.x0, h = box.y1 - box.y0;
  const Number x0 = box.x0 + w * (factors[0] - 1.0), y0 = box.y0 + h * (factors[1] - 1.0);
  return {x0, y0, x0 + w * factors[2], y0 + h * factors[3]};
}

template <class Number>
SCRL_INLINE Box<Number> clip(const Box<Number>& b, double size) {
  const Number low = {}, high = low + size;
  return {smaller(larger(b.x0, low), high), smaller(larger(b.y0, low), high), smaller(larger(b.x1, low), high),
          smaller(larger(b.y1, low), high)};
}

template <class Number>
SCRL_INLINE Number area(const Box<Number>& b) {
  return (b.x1 - b.x0) * (b.y1 - b.y0);
}

template <class Number>
SCRL_INLINE Number shared_area(const Box<Number>& a, const Box<Number>& b) {
  const Number w = smaller(a.x1, b.x1) - larger(a.x0, b.x0), h = smaller(a.y1, b.y1) - larger(a.y0, b.y0);
  const Number none = {};
  return larger(w, none) * larger(h, none);
}

}  // namespace scrl_fast::host
