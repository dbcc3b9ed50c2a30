// Gradient of the map, gathered image by image: whoever owns an image's channels visits its boxes in a fixed order and
// writes each element once, so there is nothing to add up between threads and nothing to clear beforehand.
#include <algorithm>

#include "cpu/roi_align_boxes.h"
#include "cpu/transpose.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace scrl::roi {
namespace {

constexpr int64_t kGatherEntries = 1 << 16;  // boxes x cells of an image up to which one list a cell is made
constexpr int64_t kTileBytes = 1 << 15;      // of the rows of a map that are accumulated together
constexpr int64_t kChannelsTile = 512;       // of gradient rows that stay in the first cache while cells are walked

// Past the caches: the gradient of a whole batch does not fit them, and reading lines before overwriting them costs a
// third of the time. `to` is on a 16-byte boundary.
template <class S>
SCRL_INLINE void store_past_caches(S* to, lanes_t<S> value) {
#if defined(__SSE2__)
  S bits[lane_count<S>];
  store(bits, value);
  __m128i parts[sizeof(bits) / 16];
  std::memcpy(parts, bits, sizeof(bits));
  for (size_t i = 0; i < sizeof(bits) / 16; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, parts[i]);
#else
  store(to, value);
#endif
}

template <class T>
struct Entry {
  int64_t row;  // of the pooled gradient
  T weight;
};

// For every cell of the map, which boxes of an image read it.
template <class T>
struct CellLists {
  std::vector<int32_t> first;  // [cells + 1]
  std::vector<Entry<T>> entries;
};

template <class T>
void assign_lists(CellLists<T>& lists, const Problem& p, const Weights<T>& weights, int64_t begin, int64_t end) {
  const auto for_each = [&](const auto& visit) {
    for (int64_t box = 0; box < end - begin; ++box)
      for (const RowTap<T>* row = weights.rows_begin(box); row != weights.rows_end(box); ++row)
        for (const Tap<T>* column = weights.columns_begin(box, 0); column != weights.columns_end(box, 0); ++column)
          visit(row->row * p.width + column->cell, box, row->weight * column->weight);
  };
  lists.first.assign(p.cells() + 1, 0);
  for_each([&](int64_t cell, int64_t, T) { ++lists.first[cell]; });
  int32_t total = 0;
  for (int32_t& first : lists.first)
    total += first, first = total;  // ends; filling backwards turns them into beginnings
  lists.entries.resize(total);
  for (int64_t box = end - begin - 1; box >= 0; --box)
    for (const RowTap<T>* row = weights.rows_begin(box); row != weights.rows_end(box); ++row)
      for (const Tap<T>* column = weights.columns_begin(box, 0); column != weights.columns_end(box, 0); ++column)
        lists.entries[--lists.first[row->row * p.width + column->cell]] = {p.order[begin + box],
                                                                           row->weight * column->weight};
}

// For every row of the map, which boxes of an image read it and where their taps of this row are.
template <class T>
struct RowLists {
  struct Visit {
    int32_t box;
    const RowTap<T>*begin, *end;
  };
  std::vector<int32_t> first;  // [height + 1]
  std::vector<Visit> visits;
};

template <class T>
void assign_lists(RowLists<T>& lists, const Problem& p, const Weights<T>& weights, int64_t boxes) {
  const auto for_each = [&](int64_t box, const auto& visit) {
    for (const RowTap<T>*row = weights.rows_begin(box), *next; row != weights.rows_end(box); row = next) {
      for (next = row + 1; next != weights.rows_end(box) && next->row == row->row;) ++next;
      visit(row, next);
    }
  };
  lists.first.assign(p.height + 1, 0);
  for (int64_t box = 0; box < boxes; ++box)
    for_each(box, [&](const RowTap<T>* row, const RowTap<T>*) { ++lists.first[row->row]; });
  int32_t total = 0;
  for (int32_t& first : lists.first) total += first, first = total;
  lists.visits.resize(total);
  for (int64_t box = boxes - 1; box >= 0; --box)
    for_each(box, [&](const RowTap<T>* row, const RowTap<T>* next) {
      lists.visits[--lists.first[row->row]] = {static_cast<int32_t>(box), row, next};
    });
}

template <class S>
struct Backward {
  using T = accumulate_t<S>;
  static constexpr int64_t lanes = lane_count<S>;

  const Problem& p;
  Weights<T> weights;
  CellLists<T> cell_lists;
  RowLists<T> row_lists;
  Scratch<T> tile_memory, gradient_memory, row_memory;
  int64_t image, begin, end;  // the image's boxes: order[begin, end)

  SCRL_INLINE S* map(int64_t channel) const {
    return static_cast<S*>(p.result) + image * p.image_stride + channel * p.channel_stride;
  }
  SCRL_INLINE const S* pooled(int64_t row, int64_t channel) const {
    return static_cast<const S*>(p.source) + (row * p.channels + channel) * p.bins();
  }

  // ---- one bin, a map of few cells: each cell sums over its list ----

  template <int V>
  SCRL_INLINE void gather(int64_t cell, int64_t channel, lanes_t<T> (&sum)[V]) const {
    for (int v = 0; v < V; ++v) sum[v] = lanes_t<T>{};
    const Entry<T>* last = cell_lists.entries.data() + cell_lists.first[cell + 1];
    for (const Entry<T>* entry = cell_lists.entries.data() + cell_lists.first[cell]; entry != last; ++entry) {
      const S* from = pooled(entry->row, channel);
      for (int v = 0; v < V; ++v) sum[v] += entry->weight * load(from + v * lanes);
    }
  }

  template <int V>
  SCRL_INLINE void gather_in_place(int64_t cell, S* to, int64_t channel) const {
    lanes_t<T> sum[V];
    gather<V>(cell, channel, sum);
    for (int v = 0; v < V; ++v) p.stream ? store_past_caches(to + v * lanes, sum[v]) : store(to + v * lanes, sum[v]);
  }

  SCRL_INLINE void gather_side_by_side(int64_t channel, int64_t channels_end) {
    for (; channel < channels_end; channel += kChannelsTile) {
      const int64_t tile_end = std::min(channels_end, channel + kChannelsTile);
      for (int64_t cell = 0; cell < p.cells(); ++cell) {
        S* to = map(0) + cell / p.width * p.row_stride + cell % p.width * p.column_stride;
        int64_t c = channel;
        for (; c + 4 * lanes <= tile_end; c += 4 * lanes) gather_in_place<4>(cell, to + c, c);
        for (; c + lanes <= tile_end; c += lanes) gather_in_place<1>(cell, to + c, c);
        if (c < tile_end) store_tail(to + c, gather_tail(cell, c, tile_end - c), tile_end - c);
      }
    }
  }

  SCRL_INLINE lanes_t<T> gather_tail(int64_t cell, int64_t channel, int64_t count) const {
    lanes_t<T> sum = {};
    for (int32_t e = cell_lists.first[cell]; e < cell_lists.first[cell + 1]; ++e)
      sum += cell_lists.entries[e].weight * load_tail(pooled(cell_lists.entries[e].row, channel), count);
    return sum;
  }

  template <int V>
  SCRL_INLINE void gather_apart(int64_t channel, int64_t count) {
    constexpr int64_t width = V * lanes;
    T* tile = tile_memory.ensure(p.cells() * width);
    for (int64_t cell = 0; cell < p.cells(); ++cell) {
      lanes_t<T> sum[V];
      if (count == width)
        gather<V>(cell, channel, sum);
      else
        sum[0] = gather_tail(cell, channel, count);
      for (int v = 0; v < V; ++v) store(tile + cell * width + v * lanes, sum[v]);
    }
    lanes_to_planes(tile, width, p.cells(), count, map(channel), p.channel_stride);
  }

  SCRL_INLINE void gather_all(int64_t channel, int64_t channels_end) {
    assign_lists(cell_lists, p, weights, begin, end);
    if (p.channel_stride == 1) return gather_side_by_side(channel, channels_end);
    if (p.cells() * 4 * lanes * sizeof(T) <= kTileBytes)
      for (; channel + 4 * lanes <= channels_end; channel += 4 * lanes) gather_apart<4>(channel, 4 * lanes);
    for (; channel < channels_end; channel += lanes) gather_apart<1>(channel, std::min(lanes, channels_end - channel));
  }

  // ---- any number of bins, any map: a band of rows at a time takes what its boxes give ----

  template <int V>
  SCRL_INLINE void add_visit(const typename RowLists<T>::Visit& visit, const T* gradient, T* cells) {
    constexpr int64_t width = V * lanes;
    for (int64_t bin = 0; bin < p.pooled_width; ++bin) {
      lanes_t<T> sum[V] = {};
      for (const RowTap<T>* tap = visit.begin; tap != visit.end; ++tap) {
        const T* from = gradient + (tap->bin * p.pooled_width + bin) * width;
        for (int v = 0; v < V; ++v) sum[v] += tap->weight * load(from + v * lanes);
      }
      const Tap<T>* columns_end = weights.columns_end(visit.box, bin);
      for (const Tap<T>* column = weights.columns_begin(visit.box, bin); column != columns_end; ++column) {
        T* to = cells + column->cell * width;
        for (int v = 0; v < V; ++v) store(to + v * lanes, load(to + v * lanes) + column->weight * sum[v]);
      }
    }
  }

  template <int V>
  SCRL_INLINE void bands(int64_t channel, int64_t count) {
    constexpr int64_t width = V * lanes;
    const int64_t boxes = end - begin, gradient_size = p.bins() * width;
    T* gradient = gradient_memory.ensure(boxes * gradient_size);
    for (int64_t box = 0; box < boxes; ++box)
      planes_to_lanes(pooled(p.order[begin + box], channel), p.bins(), p.bins(), count, gradient + box * gradient_size,
                      width);

    const int64_t rows = std::clamp<int64_t>(kTileBytes / (p.width * width * sizeof(T)), 1, p.height);
    T* tile = tile_memory.ensure(rows * p.width * width);
    for (int64_t row = 0; row < p.height; row += rows) {
      const int64_t rows_end = std::min(p.height, row + rows);
      std::fill(tile, tile + (rows_end - row) * p.width * width, T(0));
      for (int64_t r = row; r < rows_end; ++r)
        for (int32_t v = row_lists.first[r]; v < row_lists.first[r + 1]; ++v)
          add_visit<V>(row_lists.visits[v], gradient + row_lists.visits[v].box * gradient_size,
                       tile + (r - row) * p.width * width);
      write_rows<V>(tile, row, rows_end, channel, count);
    }
  }

  template <int V>
  SCRL_INLINE void write_rows(const T* tile, int64_t row, int64_t rows_end, int64_t channel, int64_t count) {
    constexpr int64_t width = V * lanes;
    S* to = map(channel) + row * p.row_stride;
    if (p.channel_stride != 1)
      return lanes_to_planes(tile, width, (rows_end - row) * p.width, count, to, p.channel_stride);
    for (; row < rows_end; ++row, to += p.row_stride)
      for (int64_t column = 0; column < p.width; ++column, tile += width) {
        if (count == width) {
          for (int v = 0; v < V; ++v) store(to + column * p.column_stride + v * lanes, load(tile + v * lanes));
        } else {
          store_tail(to + column * p.column_stride, load(tile), count);
        }
      }
  }

  SCRL_INLINE void bands_all(int64_t channel, int64_t channels_end) {
    assign_lists(row_lists, p, weights, end - begin);
    if (p.width * 4 * lanes * static_cast<int64_t>(sizeof(T)) <= kTileBytes)
      for (; channel + 4 * lanes <= channels_end; channel += 4 * lanes) bands<4>(channel, 4 * lanes);
    for (; channel < channels_end; channel += lanes) bands<1>(channel, std::min(lanes, channels_end - channel));
  }

  SCRL_INLINE void run(int64_t of_image, int64_t channel, int64_t channels_end) {
    image = of_image, begin = p.first[image], end = p.first[image + 1];
    weights.assign(p, begin, end);
    p.bins() == 1 && (end - begin) * p.cells() <= kGatherEntries ? gather_all(channel, channels_end)
                                                                 : bands_all(channel, channels_end);
  }
};

template <class S>
SCRL_INLINE void backward(const Problem& p, Work& work) {
  Backward<S> backward{p, {}, {}, {}, {}, {}, {}, 0, 0, 0};
  for (int64_t piece; (piece = work.next.fetch_add(1)) < work.pieces;) {
    const int64_t channel = piece % work.channel_ranges * work.channels_a_range;
    backward.run(piece / work.channel_ranges, channel, std::min(p.channels, channel + work.channels_a_range));
  }
#if defined(__SSE2__)
  if (p.stream) _mm_sfence();
#endif
}
}  // namespace

SCRL_MULTIVERSION void backward_float(const Problem& p, Work& work) { backward<float>(p, work); }
SCRL_MULTIVERSION void backward_double(const Problem& p, Work& work) { backward<double>(p, work); }
SCRL_MULTIVERSION void backward_bf16(const Problem& p, Work& work) { backward<bf16>(p, work); }
SCRL_MULTIVERSION void backward_f16(const Problem& p, Work& work) { backward<f16>(p, work); }

}  // namespace scrl::roi
