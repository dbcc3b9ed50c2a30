// Pooled rows of a group of boxes of one image, a block of channels side by side in registers.
#include <algorithm>
#include <limits>

#include "cpu/roi_align_boxes.h"
#include "cpu/transpose.h"

namespace scrl::roi {
namespace {

constexpr int64_t kBlockBytes = 256;  // of channels of one cell that are pooled together: 64 in float32
constexpr int64_t kWholeMap = 1024;   // cells up to which planes are turned into lanes once for all boxes of a group
constexpr int64_t kWideCells = 128;   // cells in lanes up to which blocks of 256 bytes a cell stay in the first cache
constexpr int64_t kWideBins = 128;

template <class S, int Bytes>
struct Pooling {
  using T = accumulate_t<S>;
  using Vector = typename Simd<T, Bytes>::Vector;
  static constexpr int64_t lanes = Simd<T, Bytes>::lanes;
  static constexpr int wide = kBlockBytes / Bytes;

  const Problem& p;
  const Group& group;
  const Weights<T>& weights;
  Scratch<T>&tile_memory, &pooled_memory;

  SCRL_INLINE const S* map(int64_t channel) const {
    return static_cast<const S*>(p.source) + group.image * p.image_stride + channel * p.channel_stride;
  }

  // One bin, V vectors of channels. row_at(row): the row's cell 0 in these channels.
  template <class From, int V, class RowAt>
  SCRL_INLINE void pool_one_bin(int64_t box, int64_t cell_stride, const RowAt& row_at, Vector (&sum)[V]) const {
    for (int v = 0; v < V; ++v) sum[v] = Vector{};
    const Tap<T>*columns = weights.columns_begin(box, 0), *columns_end = weights.columns_end(box, 0);
    const RowTap<T>* rows_end = weights.rows_end(box);
    for (const RowTap<T>* row = weights.rows_begin(box); row != rows_end; ++row) {
      const From* cells = row_at(row->row);
      for (const Tap<T>* column = columns; column != columns_end; ++column) {
        const T weight = row->weight * column->weight;
        const From* from = cells + column->cell * cell_stride;
        for (int v = 0; v < V; ++v) sum[v] += weight * Simd<From, Bytes>::load(from + v * lanes);
      }
    }
  }

  // Every bin, pooled[bin * V * lanes + channel]: each map row is first reduced to the columns' bins, once for all rows
  // of bins that it goes into.
  template <class From, int V, class RowAt>
  SCRL_INLINE void pool_bins(int64_t box, int64_t cell_stride, const RowAt& row_at, T* pooled) const {
    constexpr int64_t width = V * lanes;
    std::fill(pooled, pooled + p.bins() * width, T(0));
    const RowTap<T>* rows_end = weights.rows_end(box);
    for (const RowTap<T>*row = weights.rows_begin(box), *next; row != rows_end; row = next) {
      for (next = row + 1; next != rows_end && next->row == row->row;) ++next;
      const From* cells = row_at(row->row);
      for (int64_t bin = 0; bin < p.pooled_width; ++bin) {
        Vector sum[V] = {};
        const Tap<T>* columns_end = weights.columns_end(box, bin);
        for (const Tap<T>* column = weights.columns_begin(box, bin); column != columns_end; ++column) {
          const From* from = cells + column->cell * cell_stride;
          for (int v = 0; v < V; ++v) sum[v] += column->weight * Simd<From, Bytes>::load(from + v * lanes);
        }
        for (const RowTap<T>* tap = row; tap != next; ++tap) {
          T* to = pooled + (tap->bin * p.pooled_width + bin) * width;
          for (int v = 0; v < V; ++v)
            Simd<T, Bytes>::store(to + v * lanes, Simd<T, Bytes>::load(to + v * lanes) + tap->weight * sum[v]);
        }
      }
    }
  }

  // Box `box` of the group, channels [channel, channel + count), count <= V * lanes.
  template <class From, int V, class RowAt>
  SCRL_INLINE void box_channels(int64_t box, int64_t channel, int64_t count, int64_t cell_stride, const RowAt& row_at) {
    constexpr T nan = std::numeric_limits<T>::quiet_NaN();
    S* out = static_cast<S*>(p.result) + (p.order[group.begin + box] * p.channels + channel) * p.bins();
    if (p.bins() == 1) {
      Vector sum[V];
      if (weights.can_be_sampled(box)) {
        pool_one_bin<From, V>(box, cell_stride, row_at, sum);
      } else {
        for (int v = 0; v < V; ++v) sum[v] = Vector{} + nan;
      }
      if (count < V * lanes) return Simd<S, Bytes>::store_tail(out, sum[0], count);
      for (int v = 0; v < V; ++v) Simd<S, Bytes>::store(out + v * lanes, sum[v]);
      return;
    }
    T* pooled = pooled_memory.ensure(p.bins() * V * lanes);
    if (weights.can_be_sampled(box)) {
      pool_bins<From, V>(box, cell_stride, row_at, pooled);
    } else {
      std::fill(pooled, pooled + p.bins() * V * lanes, nan);
    }
    lanes_to_planes(pooled, V * lanes, p.bins(), count, out, p.bins());
  }

  // Channels that lie side by side in the map: read where they are.
  template <int V>
  SCRL_INLINE void box_in_place(int64_t box, int64_t channel) {
    const S* from = map(channel);
    box_channels<S, V>(box, channel, V * lanes, p.column_stride,
                       [&](int64_t row) __attribute__((always_inline)) { return from + row * p.row_stride; });
  }

  // Cells [begin, end) of a row, in lanes.
  void row_to_lanes(const S* row, int64_t begin, int64_t end, int64_t count, T* to, int64_t width) const {
    if (p.column_stride == 1) return planes_to_lanes(row + begin, p.channel_stride, end - begin, count, to, width);
    for (int64_t cell = begin; cell < end; ++cell)
      for (int64_t c = 0; c < width; ++c)
        to[(cell - begin) * width + c] =
            c < count ? widen_one(row[cell * p.column_stride + c * p.channel_stride]) : T(0);
  }

  // The planes of the next block come in while boxes are pooled from this one.
  SCRL_INLINE void prefetch(const S* from, int64_t size) const {
    for (int64_t i = 0; i < size; i += 64 / sizeof(S)) __builtin_prefetch(from + i, 0, 2);
  }

  // Channels that lie apart: turned into lanes first, the whole map at once or row by row.
  template <int V>
  SCRL_INLINE void boxes_through_lanes(int64_t channel, int64_t count) {
    constexpr int64_t width = V * lanes;
    const S* from = map(channel);
    const int64_t boxes = group.end - group.begin;
    if (p.cells() <= kWholeMap) {
      T* tile = tile_memory.ensure(p.cells() * width);
      if (p.column_stride == 1 && p.row_stride == p.width) {
        planes_to_lanes(from, p.channel_stride, p.cells(), count, tile, width);
        if (p.channel_stride == p.cells()) prefetch(from + count * p.cells(), count * p.cells());
      } else {
        for (int64_t row = 0; row < p.height; ++row)
          row_to_lanes(from + row * p.row_stride, 0, p.width, count, tile + row * p.width * width, width);
      }
      for (int64_t box = 0; box < boxes; ++box)
        box_channels<T, V>(box, channel, count, width,
                           [&](int64_t row) __attribute__((always_inline)) { return tile + row * p.width * width; });
      return;
    }
    T* tile = tile_memory.ensure(p.width * width);
    for (int64_t box = 0; box < boxes; ++box) {
      const auto [begin, end] = columns_of(box);
      box_channels<T, V>(box, channel, count, width, [&](int64_t row) __attribute__((always_inline)) {
        row_to_lanes(from + row * p.row_stride, begin, end, count, tile, width);
        return tile - begin * width;
      });
    }
  }

  // The run of cells that a box reads of a row, made longer to whole blocks where the row has room for them.
  std::pair<int64_t, int64_t> columns_of(int64_t box) const {
    int64_t begin = p.width, end = 0;
    const Tap<T>* last = weights.columns_end(box, p.pooled_width - 1);
    for (const Tap<T>* column = weights.columns_begin(box, 0); column != last; ++column) {
      begin = std::min<int64_t>(begin, column->cell);
      end = std::max<int64_t>(end, column->cell + 1);
    }
    const int64_t size = (end - begin + kTransposeCells - 1) / kTransposeCells * kTransposeCells;
    end = std::min(p.width, begin + size);
    return {std::max<int64_t>(0, std::min(begin, end - size)), end};
  }

  SCRL_INLINE void run(int64_t channel, int64_t channels_end) {
    const bool few_bins = p.bins() <= kWideBins;
    if (p.channel_stride == 1) {
      const int64_t last = channel + (channels_end - channel) / lanes * lanes;
      for (int64_t box = 0; box < group.end - group.begin; ++box) {
        int64_t c = channel;
        if (few_bins)
          for (; c + wide * lanes <= last; c += wide * lanes) box_in_place<wide>(box, c);
        for (; c < last; c += lanes) box_in_place<1>(box, c);
      }
      channel = last;
    }
    if (few_bins && (p.cells() > kWholeMap ? p.width : p.cells()) <= kWideCells)
      for (; channel + wide * lanes <= channels_end; channel += wide * lanes)
        boxes_through_lanes<wide>(channel, wide * lanes);
    for (; channel < channels_end; channel += lanes)
      boxes_through_lanes<1>(channel, std::min(lanes, channels_end - channel));
  }
};

template <class S>
struct Forward {
  template <int Bytes>
  static SCRL_INLINE void run(const Problem& p, Work& work) {
    using T = accumulate_t<S>;
    Weights<T> weights;
    Scratch<T> tile, pooled;
    for (int64_t piece; (piece = work.next.fetch_add(1)) < work.pieces;) {
      const Group& group = p.groups[piece / work.channel_ranges];
      const int64_t channel = piece % work.channel_ranges * work.channels_a_range;
      weights.assign(p, group.begin, group.end);
      Pooling<S, Bytes>{p, group, weights, tile, pooled}.run(channel,
                                                             std::min(p.channels, channel + work.channels_a_range));
    }
  }
};
}  // namespace

SCRL_WIDEST(forward_float, (const Problem& p, Work& work), (p, work), Forward<float>)
SCRL_WIDEST(forward_double, (const Problem& p, Work& work), (p, work), Forward<double>)
SCRL_WIDEST(forward_bf16, (const Problem& p, Work& work), (p, work), Forward<bf16>)
SCRL_WIDEST(forward_f16, (const Problem& p, Work& work), (p, work), Forward<f16>)

}  // namespace scrl::roi
