// Where boxes lie: the overlap of two crops, one draw inside it, its place in a view, and whether it is too close to
// others. Shared by the counter-based sampler and the replay of NumPy's stream; both follow scrl_fast/ops/
// sample_box_pairs.py operation by operation in float64, so the results agree to the last bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../cpu/vectorize.h"

// A fused multiply-add rounds once where the reference rounds twice.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace scrl_fast::host {

constexpr int kTries = 50;
constexpr int64_t kLimit = int64_t{1} << 20;  // sizes and coordinates stay below: every product here is exact
constexpr int kCropFields = 5, kBoxFields = 5;

struct BoxOptions {
  int64_t view_size, boxes_per_image, min_size;
  double iou_threshold;
  bool grid;
  double jitter;
};

struct ViewMap {
  double scale_x, scale_y, offset_x, offset_y;
  bool flip;
};

// Boxes are drawn in width x height pixels, then mapped into each view.
struct Overlap {
  double width, height, unscale_x, unscale_y;
  uint32_t columns, rows;  // the finest grid
  ViewMap view[2];
};

struct Draw {
  double x, y, width, height;
};

struct Box {
  double x0, y0, x1, y1;
};

// Rows (y, x, h, w, flip).
inline bool crop_in_range(const int64_t* crop) {
  for (int i = 0; i < 4; ++i)
    if (!(crop[i] > -kLimit && crop[i] < kLimit)) return false;
  return crop[2] >= 1 && crop[3] >= 1;
}

// Pixels in which boxes are drawn, along one axis: what both views show, at the coarser view's scale.
inline double drawn_extent(int64_t first, int64_t first_size, int64_t second, int64_t second_size, double view_size) {
  const int64_t begin = std::max(first, second), end = std::min(first + first_size, second + second_size);
  if (begin >= end) return 0;
  return std::nearbyint(static_cast<double>(end - begin) *
                        (view_size / static_cast<double>(std::max(first_size, second_size))));
}

// Whether the image yields boxes: needs no random number, so every image's rows are known before any box is drawn.
inline bool yields_boxes(const int64_t* a, const int64_t* b, const BoxOptions& o) {
  const auto size = static_cast<double>(o.view_size), least = static_cast<double>(o.min_size);
  return drawn_extent(a[1], a[3], b[1], b[3], size) > least && drawn_extent(a[0], a[2], b[0], b[2], size) > least;
}

inline Overlap overlap_of(const int64_t* a, const int64_t* b, const BoxOptions& o) {
  const auto size = static_cast<double>(o.view_size);
  const int64_t left = std::max(a[1], b[1]), top = std::max(a[0], b[0]);
  Overlap overlap;
  overlap.width = drawn_extent(a[1], a[3], b[1], b[3], size);
  overlap.height = drawn_extent(a[0], a[2], b[0], b[2], size);
  overlap.columns = static_cast<uint32_t>(static_cast<int64_t>(overlap.width) / o.min_size);
  overlap.rows = static_cast<uint32_t>(static_cast<int64_t>(overlap.height) / o.min_size);
  for (int v = 0; v < 2; ++v) {
    const int64_t* crop = v == 0 ? a : b;
    const double scale_x = size / static_cast<double>(crop[3]), scale_y = size / static_cast<double>(crop[2]);
    overlap.view[v] = {scale_x, scale_y, static_cast<double>(left - crop[1]) * scale_x,
                       static_cast<double>(top - crop[0]) * scale_y, crop[4] != 0};
  }
  overlap.unscale_x = 1.0 / std::min(overlap.view[0].scale_x, overlap.view[1].scale_x);
  overlap.unscale_y = 1.0 / std::min(overlap.view[0].scale_y, overlap.view[1].scale_y);
  return overlap;
}

// One try. below(n) is uniform in 0..n-1, n < 2^20; its calls are ordered. The conversions to int32 truncate what is
// never negative: floor, in one instruction on every processor.
template <bool kGrid, class Below>
SCRL_INLINE Draw draw_box(const Overlap& o, int32_t min_size, Below&& below) {
  const auto whole = [](double value) { return static_cast<int32_t>(value); };
  if constexpr (!kGrid) {
    const int32_t w = min_size + below(whole(o.width) - min_size), h = min_size + below(whole(o.height) - min_size);
    const int32_t x = below(whole(o.width) - w), y = below(whole(o.height) - h);
    return {double(x), double(y), double(w), double(h)};
  } else {
    const int32_t columns = 1 + below(o.columns), rows = 1 + below(o.rows);
    const double cell_w = o.width / columns, cell_h = o.height / rows;
    const int32_t column = below(columns), row = below(rows);
    const int32_t w = min_size + below(whole(cell_w) - min_size + 1),
                  h = min_size + below(whole(cell_h) - min_size + 1);
    const int32_t x = below(whole(cell_w - w) + 1) + whole(column * cell_w);
    const int32_t y = below(whole(cell_h - h) + 1) + whole(row * cell_h);
    return {double(x), double(y), double(w), double(h)};
  }
}

SCRL_INLINE Box to_view(const Overlap& o, const ViewMap& view, const Draw& draw, double size) {
  const double x0 = draw.x * o.unscale_x * view.scale_x + view.offset_x;
  const double y0 = draw.y * o.unscale_y * view.scale_y + view.offset_y;
  const double x1 = x0 + draw.width * o.unscale_x * view.scale_x;
  const double y1 = y0 + draw.height * o.unscale_y * view.scale_y;
  return {view.flip ? size - x1 : x0, y0, view.flip ? size - x0 : x1, y1};
}

// factors: four numbers in [1 - ratio, 1 + ratio].
inline Box jittered(const Box& box, const double* factors) {
  const double w = box.x1 - box.x0, h = box.y1 - box.y0;
  const double x0 = box.x0 + w * (factors[0] - 1.0), y0 = box.y0 + h * (factors[1] - 1.0);
  return {x0, y0, x0 + w * factors[2], y0 + h * factors[3]};
}

SCRL_INLINE Box clip(const Box& b, double size) {
  return {std::min(std::max(b.x0, 0.0), size), std::min(std::max(b.y0, 0.0), size), std::min(std::max(b.x1, 0.0), size),
          std::min(std::max(b.y1, 0.0), size)};
}

SCRL_INLINE double intersection_over_union(const Box& a, const Box& b) {
  const double shared = std::max(std::min(a.x1, b.x1) - std::max(a.x0, b.x0), 0.0) *
                        std::max(std::min(a.y1, b.y1) - std::max(a.y0, b.y0), 0.0);
  const double both = (a.x1 - a.x0) * (a.y1 - a.y0) + (b.x1 - b.x0) * (b.y1 - b.y0) - shared;
  return shared > 0.0 ? shared / both : 0.0;
}

inline void write_row(float* row, int64_t image, const Box& box) {
  row[0] = static_cast<float>(image);
  row[1] = static_cast<float>(box.x0);
  row[2] = static_cast<float>(box.y0);
  row[3] = static_cast<float>(box.x1);
  row[4] = static_cast<float>(box.y1);
}

}  // namespace scrl_fast::host
