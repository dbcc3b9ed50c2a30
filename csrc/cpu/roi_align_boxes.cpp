// A fused multiply-add would move samples by one rounding. Not compiled for wider instruction sets for that reason, and
// some processors (AArch64) always have it.
#include "cpu/roi_align_boxes.h"

#include <utility>

#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "roi_align.h"

namespace scrl::roi {
namespace {

// Adds a weight to a cell's tap. Samples walk the cells in order, so an earlier tap of the cell is among the last
// three.
template <class T>
void add_tap(std::vector<Tap<T>>& taps, size_t bin_begin, int64_t cell, T weight) {
  if (weight == T(0)) return;
  for (size_t i = taps.size(); i > bin_begin && i + 3 > taps.size(); --i) {
    if (taps[i - 1].cell == cell) {
      taps[i - 1].weight += weight;
      return;
    }
  }
  taps.push_back({static_cast<int32_t>(cell), weight});
}

// A bin may have more than 2^31 cells only if the map has: checked before.
template <class T>
void append_rows(const Axis<T>& axis, int64_t bins, int64_t size, std::vector<Tap<T>>& taps,
                 std::vector<RowTap<T>>& rows) {
  const size_t box_begin = rows.size();
  for (int64_t bin = 0; bin < bins; ++bin) {
    taps.clear();
    for_each_tap(axis, bin, size, [&](int64_t cell, T weight) { add_tap(taps, 0, cell, weight); });
    for (const Tap<T>& tap : taps) {
      size_t at = rows.size();
      rows.push_back({tap.cell, static_cast<int32_t>(bin), tap.weight});
      for (; at > box_begin && rows[at - 1].row > rows[at].row; --at) std::swap(rows[at - 1], rows[at]);
    }
  }
}
}  // namespace

template <class T>
void Weights<T>::assign(const Problem& p, int64_t begin, int64_t end) {
  bins_ = p.pooled_width;
  rows_.clear(), columns_.clear(), sampled_.clear();
  row_ends_.assign(1, 0), column_ends_.assign(1, 0);
  std::vector<Tap<T>> taps;
  for (int64_t i = begin; i < end; ++i) {
    const T* box = static_cast<const T*>(p.boxes) + 5 * p.order[i];
    Axis<T> y, x;
    const T scale = static_cast<T>(p.scale);
    const bool fine_y = make_axis(box[2], box[4], scale, p.pooled_height, p.sampling_ratio, p.aligned, y);
    const bool fine = make_axis(box[1], box[3], scale, p.pooled_width, p.sampling_ratio, p.aligned, x) && fine_y;
    const size_t box_begin = columns_.size();
    for (int64_t bin = 0; bin < p.pooled_width; ++bin) {
      const size_t bin_begin = columns_.size();
      if (fine)
        for_each_tap(x, bin, p.width, [&](int64_t cell, T weight) { add_tap(columns_, bin_begin, cell, weight); });
      column_ends_.push_back(static_cast<int64_t>(columns_.size()));
    }
    if (columns_.size() > box_begin) append_rows(y, p.pooled_height, p.height, taps, rows_);
    row_ends_.push_back(static_cast<int64_t>(rows_.size()));
    sampled_.push_back(fine);
  }
}

template class Weights<float>;
template class Weights<double>;

}  // namespace scrl::roi
