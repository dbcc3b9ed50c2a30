// Separable filtering of pictures: Pillow's antialiased bicubic resize, the resize blur and the Gaussian blur are all
// an Axis (which pixels, with which weights) applied along the rows and then down the columns.
//
// Along a row neighbouring results share no vector lane, so L rows are transposed first and each lane holds one of
// them: both passes are then plain multiply-adds on contiguous floats.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "host/filter_axis.h"
#include "host/levels.h"
#include "host/view.h"

namespace scrl_fast::host {

// L rows of n bytes become n groups of L lanes. Nothing is read outside the rows: the last block of columns is moved up
// to end with them, and rows too short for one block are copied first.
template <int L>
SCRL_INLINE void rows_to_lanes(const uint8_t* const (&row)[L], int n, float* lanes) {
  constexpr int kBlock = 4 * L;
  uint8_t copy[L][kBlock] = {};
  const uint8_t* start[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    start[i] = row[i];
    if (n < kBlock) start[i] = static_cast<const uint8_t*>(std::memcpy(copy[i], row[i], n));
  }
  for (int j = 0; j < n; j += kBlock) {
    const int at = std::max(0, std::min(j, n - kBlock));
    Words<L> block[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) block[i] = load_words<L>(start[i] + at);
    transpose<L, L>(block);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) store<L>(lanes + (at + 4 * i + q) * L, quarter<L>(block[i], q));
    }
  }
}

struct Scratch {
  Axis along, down;
  Buffer<float> lanes, strip, unrounded;
  Buffer<uint8_t> narrow, picture, shrunk;
};

// A picture of interleaved channels, or one plane.
struct Source {
  const uint8_t* corner;
  int64_t stride;
  int height, width;
};

// Results i..i+3 along L rows of each channel; the lanes begin with source pixel `begin`.
template <int L, int step>
SCRL_INLINE void filter_lanes(const float* lanes, int begin, const Axis& axis, int i, Floats<L> (&sum)[step][4]) {
  const float* source[4];
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    source[q] = lanes + static_cast<int64_t>(axis.first[i + q] - begin) * step * L;
#pragma GCC unroll 3
    for (int c = 0; c < step; ++c) sum[c][q] = Floats<L>{};
  }
  const float* weight = &axis.weight[i];
  const int taps = axis.taps, weights = axis.pitch;
  for (int t = 0; t < taps; ++t, weight += weights) {
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
#pragma GCC unroll 3
      for (int c = 0; c < step; ++c) sum[c][q] += weight[q] * load<L>(source[q] + (t * step + c) * L);
    }
  }
}

// L rows of 4 L results each, from their lanes on: rounded to levels, planes of rows of `pitch` bytes.
struct LevelSink {
  uint8_t* planes;
  int64_t plane, pitch;

  template <int L, int step>
  SCRL_INLINE void take(const float* lanes, int begin, const Axis& axis, int row, int x) const {
    Words<L> block[step][L];
    for (int k = 0; k < L; ++k) {
      Floats<L> sum[step][4];
      filter_lanes<L, step>(lanes, begin, axis, x + 4 * k, sum);
#pragma GCC unroll 3
      for (int c = 0; c < step; ++c) {
        block[c][k] = pack<L>(nearest_level<L>(sum[c][0]), nearest_level<L>(sum[c][1]), nearest_level<L>(sum[c][2]),
                              nearest_level<L>(sum[c][3]));
      }
    }
    for (int c = 0; c < step; ++c) {
      uint8_t* out = planes + c * plane + row * pitch + x;
      Words<L> rows[L];
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k) rows[k] = block[c][k];
      transpose<L, L>(rows);
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k) store_words<L>(out + k * pitch, rows[k]);
    }
  }
};

// The same unrounded, for one plane: rows of strips of 4 L floats, each quarter after quarter. The last strip ends with
// the picture, so it overlaps the one before.
struct FloatSink {
  float* values;
  int64_t pitch;

  template <int L, int step>
  SCRL_INLINE void take(const float* lanes, int begin, const Axis& axis, int row, int x) const {
    Words<L> block[4][L];
    for (int k = 0; k < L; ++k) {
      Floats<L> sum[step][4];
      filter_lanes<L, step>(lanes, begin, axis, x + 4 * k, sum);
      for (int q = 0; q < 4; ++q) block[q][k] = (Words<L>)sum[0][q];
    }
    for (int q = 0; q < 4; ++q) {
      transpose<L, L>(block[q]);
      float* out = values + row * pitch + round_up(x, 4 * L) + q * L;
      for (int k = 0; k < L; ++k) store_words<L>(out + k * pitch, block[q][k]);
    }
  }

  // As filter_down reads rows.
  template <int L>
  SCRL_INLINE void read(int row, int x, float* out) const {
    const float* in = values + row * pitch + round_up(x, 4 * L);
    for (int i = 0; i < 4 * L; i += L) store<L>(out + i, load<L>(in + i));
  }
};

struct LevelRows {
  const uint8_t* levels;
  int64_t pitch;

  template <int L>
  SCRL_INLINE void read(int row, int x, float* out) const {
    unpack<L>(levels + row * pitch + x, out);
  }
};

// Along the rows, `width` (64 at least) results each; the sink gets max(height, L) rows. Rows whose lanes fit into the
// first cache are transposed once for all results, longer ones strip by strip.
template <int L, int step, class Sink>
SCRL_INLINE void filter_along(const Source& source, const Axis& axis, int width, Scratch& s, const Sink& sink) {
  constexpr int kMostLanes = (32 << 10) / (4 * L);
  const bool whole = source.width * step <= kMostLanes;
  for (int top = 0; top < source.height; top += L) {
    // the last block is moved up to end with the picture; the last row stands for those that a lower picture lacks
    const int from = std::max(0, std::min(top, source.height - L));
    for (int start = 0; start < width; start += 4 * L) {
      const int x = std::min(start, width - 4 * L), last = axis.first[x + 4 * L - 1];
      const int begin = whole ? 0 : std::min(axis.first[x], last);
      const int end = whole ? source.width : std::max(axis.first[x], last) + axis.taps;
      float* lanes = at_least(s.lanes, static_cast<int64_t>(std::max((end - begin) * step, 4 * L)) * L);
      if (start == 0 || !whole) {
        const uint8_t* row[L];
        for (int i = 0; i < L; ++i) {
          row[i] = source.corner + std::min(from + i, source.height - 1) * source.stride + begin * step;
        }
        rows_to_lanes<L>(row, (end - begin) * step, lanes);
      }
      sink.template take<L, step>(lanes, begin, axis, from, x);
    }
  }
}

// Down the columns: rows of `pitch` levels (64 at least) from rows.read(r, x, out), which gives 4 L floats of row r
// from column x on, quarter after quarter. A ring of rows as floats stays in the first cache.
template <int L, class Rows>
SCRL_INLINE void filter_down(const Rows& rows, const Axis& axis, int pitch, Scratch& s, uint8_t* out) {
  constexpr int kStrip = 4 * L;
  const int size = axis.size, taps = axis.taps, weights = axis.pitch;
  const int* first = axis.first.data();
  int ring = 1;
  while (ring < taps) ring *= 2;
  float* strip = at_least(s.strip, static_cast<int64_t>(ring) * kStrip);
  for (int start = 0; start < pitch; start += kStrip) {
    const int x = std::min(start, pitch - kStrip);
    int ready = 0;
    for (int y = 0; y < size; ++y) {
      const int end = first[y] + taps;
      for (; ready < end; ++ready) rows.template read<L>(ready, x, strip + (ready & (ring - 1)) * kStrip);
      Floats<L> q0 = {}, q1 = {}, q2 = {}, q3 = {};
      const float* weight = &axis.weight[y];
      for (int row = first[y]; row < end; ++row, weight += weights) {
        const float* source = strip + (row & (ring - 1)) * kStrip;
        q0 += *weight * load<L>(source), q1 += *weight * load<L>(source + L);
        q2 += *weight * load<L>(source + 2 * L), q3 += *weight * load<L>(source + 3 * L);
      }
      store_words<L>(out + static_cast<int64_t>(y) * pitch + x,
                     pack<L>(nearest_level<L>(q0), nearest_level<L>(q1), nearest_level<L>(q2), nearest_level<L>(q3)));
    }
  }
}

}  // namespace scrl_fast::host
