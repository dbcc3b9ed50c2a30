// Gradient of the map, gathered image by image: the thread that owns an image's channels visits its boxes in a fixed
// order and writes each element once, so there is nothing to add up between threads and nothing to clear beforehand.
#include <algorithm>

#include "cpu/roi_align_boxes.h"
#include "cpu/roi_align_lists.h"
#include "cpu/transpose.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace scrl::roi {
namespace {

constexpr int64_t kGatherCells = 1 << 12;    // maps up to this size, and
constexpr int64_t kGatherEntries = 1 << 16;  // boxes x cells of an image up to this have weights made a cell and box
constexpr int64_t kTileBytes = 1 << 15;      // of the rows of a map that are accumulated together
constexpr int64_t kChannelsTile = 512;       // of gradient rows that stay in the first cache while cells are walked
constexpr int64_t kBlockBytes = 256;         // of channels of a cell that are added up together: 64 in float32
constexpr int64_t kPlanes = 8;               // that share each load of a block of weights

// Past the caches: the gradient of a whole batch does not fit them, and lines that are to be overwritten need not be
// read first. `to` is on a 16-byte boundary.
template <class S, int Bytes>
SCRL_INLINE void store_past_caches(S* to, typename Simd<S, Bytes>::Vector value) {
  using Lanes = Simd<S, Bytes>;
#if defined(__SSE2__)
  constexpr int parts = Lanes::lanes * sizeof(S) / 16;
  if constexpr (parts > 0) {
    S bits[Lanes::lanes];
    Lanes::store(bits, value);
    __m128i part[parts];
    std::memcpy(part, bits, sizeof(bits));
    for (int i = 0; i < parts; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, part[i]);
    return;
  }
#endif
  Lanes::store(to, value);
}

template <class S, int Bytes>
struct Gathering {
  using T = accumulate_t<S>;
  using Lanes = Simd<T, Bytes>;
  using Vector = typename Lanes::Vector;
  static constexpr int64_t lanes = Lanes::lanes;
  static constexpr int wide = kBlockBytes / Bytes;

  const Problem& p;
  Weights<T> weights{};
  CellLists<T> cell_lists{};
  DenseWeights<T> dense{};
  RowLists<T> row_lists{};
  Scratch<T> tile_memory{}, gradient_memory{};
  int64_t image = 0, begin = 0, end = 0;  // the image's boxes: order[begin, end)

  SCRL_INLINE S* map(int64_t channel) const {
    return static_cast<S*>(p.result) + image * p.image_stride + channel * p.channel_stride;
  }
  SCRL_INLINE const S* pooled(int64_t row, int64_t channel) const {
    return static_cast<const S*>(p.source) + (row * p.channels + channel) * p.bins();
  }
  SCRL_INLINE void store_result(S* to, Vector value) const {
    p.stream ? store_past_caches<S, Bytes>(to, value) : Simd<S, Bytes>::store(to, value);
  }

  // ---- one bin, a map of few cells: gradients of the image's boxes in lanes, weights a cell and box ----

  SCRL_INLINE void gather(int64_t channel, int64_t channels_end) {
    const bool side_by_side = p.channel_stride == 1;
    side_by_side ? assign_lists(cell_lists, p, weights, end - begin)
                 : assign_dense(dense, p, weights, end - begin, lanes);
    for (; channel < channels_end; channel += kChannelsTile) {
      const int64_t count = std::min(kChannelsTile, channels_end - channel);
      const int64_t width = (count + kPlanes + lanes - 1) / lanes * lanes;
      const T* gradient = gradient_tile(channel, count, width);
      side_by_side ? gather_cells(gradient, width, channel, count) : multiply_planes(gradient, width, channel, count);
    }
  }

  // [box, width], zero from count on: side by side in the first cache, where rows 8 KB apart would evict one another.
  SCRL_INLINE const T* gradient_tile(int64_t channel, int64_t count, int64_t width) {
    T* tile = gradient_memory.ensure((end - begin) * width);
    for (int64_t box = 0; box < end - begin; ++box, tile += width) {
      const S* from = pooled(p.order[begin + box], channel);
      int64_t c = 0;
      for (; c + lanes <= count; c += lanes) Lanes::store(tile + c, Simd<S, Bytes>::load(from + c));
      for (; c < width; c += lanes)
        Lanes::store(tile + c, Simd<S, Bytes>::load_tail(from + c, std::max<int64_t>(count - c, 0)));
    }
    return tile - (end - begin) * width;
  }

  template <int V>
  SCRL_INLINE void gather_cell(int64_t cell, const T* gradient, int64_t width, S* to, int64_t count) const {
    Vector sum[V] = {};
    const auto* last = cell_lists.entries.data() + cell_lists.first[cell + 1];
    for (const auto* entry = cell_lists.entries.data() + cell_lists.first[cell]; entry != last; ++entry) {
      const T* from = gradient + entry->box * width;
      for (int v = 0; v < V; ++v) sum[v] += entry->weight * Lanes::load(from + v * lanes);
    }
    if (count < V * lanes) return Simd<S, Bytes>::store_tail(to, sum[0], count);
    for (int v = 0; v < V; ++v) store_result(to + v * lanes, sum[v]);
  }

  // Channels side by side: each cell sums over the boxes that read it.
  SCRL_INLINE void gather_cells(const T* gradient, int64_t width, int64_t channel, int64_t count) const {
    for (int64_t row = 0; row < p.height; ++row)
      for (int64_t column = 0; column < p.width; ++column) {
        const int64_t cell = row * p.width + column;
        S* to = map(channel) + row * p.row_stride + column * p.column_stride;
        int64_t c = 0;
        for (; c + wide * lanes <= count; c += wide * lanes)
          gather_cell<wide>(cell, gradient + c, width, to + c, wide * lanes);
        for (; c < count; c += lanes) gather_cell<1>(cell, gradient + c, width, to + c, std::min(lanes, count - c));
      }
  }

  // Planes: [channels, boxes] x [boxes, cells] in blocks of one vector of cells, which needs no transposition; blocks
  // of weights that are zero are left out. Blocks go from the last to the first: what the last one writes beyond its
  // plane is the beginning of the next, written later. Results wait in the first cache until whole vectors can be
  // written out; written out at once, between the products, because memory takes them more slowly than they are made.
  SCRL_INLINE void multiply_planes(const T* gradient, int64_t width, int64_t channel, int64_t count) {
    const int64_t cells = p.cells(), blocks = dense.padded / lanes;
    const int64_t multiple = std::max(lanes, kPlanes);
    const int64_t at_once =
        std::clamp<int64_t>(kTileBytes / 2 / (cells * sizeof(T)) / multiple * multiple, multiple, kChannelsTile);
    T* stage = tile_memory.ensure((at_once + kPlanes) * cells + lanes);
    for (int64_t start = 0; start < count; start += at_once) {
      const int64_t stop = std::min(count, start + at_once);
      S* to = map(channel + start);
      int64_t written = 0;
      for (int64_t c = start; c < stop; c += kPlanes) {
        for (int64_t b = blocks - 1; b >= 0; --b)
          multiply_block(b, gradient + c, width, stage + (c - start) * cells + b * lanes);
        if (p.channel_stride == cells)
          for (; written + lanes <= (c - start) * cells; written += lanes)
            store_result(to + written, Lanes::load(stage + written));
      }
      if (p.channel_stride == cells) {
        write_run(stage + written, (stop - start) * cells - written, to + written);
      } else {
        for (int64_t c = start; c < stop; ++c) write_run(stage + (c - start) * cells, cells, map(channel + c));
      }
    }
  }

  SCRL_INLINE void multiply_block(int64_t block, const T* gradient, int64_t width, T* to) const {
    Vector sum[kPlanes] = {};
    for (int32_t e = dense.first[block]; e < dense.first[block + 1]; ++e) {
      const Vector weight = Lanes::load(dense.weights.data() + dense.boxes[e] * dense.padded + block * lanes);
      const T* from = gradient + dense.boxes[e] * width;
      for (int i = 0; i < kPlanes; ++i) sum[i] += from[i] * weight;
    }
    for (int i = 0; i < kPlanes; ++i) Lanes::store(to + i * p.cells(), sum[i]);
  }

  SCRL_INLINE void write_run(const T* from, int64_t size, S* to) const {
    int64_t i = 0;
    for (; i + lanes <= size; i += lanes) store_result(to + i, Lanes::load(from + i));
    if (i < size) Simd<S, Bytes>::store_tail(to + i, Lanes::load(from + i), size - i);
  }

  // ---- any number of bins, any map: a band of rows at a time takes what its boxes give ----

  SCRL_INLINE void bands(int64_t channel, int64_t channels_end) {
    assign_lists(row_lists, p, weights, end - begin);
    if (p.width * kBlockBytes <= kTileBytes)
      for (; channel + wide * lanes <= channels_end; channel += wide * lanes) bands_of<wide>(channel, wide * lanes);
    for (; channel < channels_end; channel += lanes) bands_of<1>(channel, std::min(lanes, channels_end - channel));
  }

  template <int V>
  SCRL_INLINE void bands_of(int64_t channel, int64_t count) {
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
        for (int64_t v = row_lists.first[r]; v < row_lists.first[r + 1]; ++v)
          add_visit<V>(row_lists.visits[v], gradient + row_lists.visits[v].box * gradient_size,
                       tile + (r - row) * p.width * width);
      write_rows<V>(tile, row, rows_end, channel, count);
    }
  }

  // What one box adds to one row: the row's share of its bins, spread over the columns.
  template <int V>
  SCRL_INLINE void add_visit(const typename RowLists<T>::Visit& visit, const T* gradient, T* cells) const {
    constexpr int64_t width = V * lanes;
    for (int64_t bin = 0; bin < p.pooled_width; ++bin) {
      Vector sum[V] = {};
      for (const RowTap<T>* tap = visit.begin; tap != visit.end; ++tap) {
        const T* from = gradient + (tap->bin * p.pooled_width + bin) * width;
        for (int v = 0; v < V; ++v) sum[v] += tap->weight * Lanes::load(from + v * lanes);
      }
      const Tap<T>* columns_end = weights.columns_end(visit.box, bin);
      for (const Tap<T>* column = weights.columns_begin(visit.box, bin); column != columns_end; ++column) {
        T* to = cells + column->cell * width;
        for (int v = 0; v < V; ++v) Lanes::store(to + v * lanes, Lanes::load(to + v * lanes) + column->weight * sum[v]);
      }
    }
  }

  template <int V>
  SCRL_INLINE void write_rows(const T* tile, int64_t row, int64_t rows_end, int64_t channel, int64_t count) const {
    constexpr int64_t width = V * lanes;
    S* to = map(channel) + row * p.row_stride;
    if (p.channel_stride != 1)
      return lanes_to_planes(tile, width, (rows_end - row) * p.width, count, to, p.channel_stride);
    for (; row < rows_end; ++row, to += p.row_stride)
      for (int64_t column = 0; column < p.width; ++column, tile += width) {
        S* cell = to + column * p.column_stride;
        if (count < width)
          Simd<S, Bytes>::store_tail(cell, Lanes::load(tile), count);
        else
          for (int v = 0; v < V; ++v) store_result(cell + v * lanes, Lanes::load(tile + v * lanes));
      }
  }

  SCRL_INLINE void run(int64_t of_image, int64_t channel, int64_t channels_end) {
    image = of_image, begin = p.first[image], end = p.first[image + 1];
    weights.assign(p, begin, end);
    const int64_t cells = p.cells();
    p.bins() == 1 && cells <= kGatherCells && (end - begin) * cells <= kGatherEntries ? gather(channel, channels_end)
                                                                                      : bands(channel, channels_end);
  }
};

template <class S>
struct Backward {
  template <int Bytes>
  static SCRL_INLINE void run(const Problem& p, Work& work) {
    Gathering<S, Bytes> gathering{p};
    for (int64_t piece; (piece = work.next.fetch_add(1)) < work.pieces;) {
      const int64_t channel = piece % work.channel_ranges * work.channels_a_range;
      gathering.run(piece / work.channel_ranges, channel, std::min(p.channels, channel + work.channels_a_range));
    }
#if defined(__SSE2__)
    if (p.stream) _mm_sfence();
#endif
  }
};
}  // namespace

SCRL_WIDEST(backward_float, (const Problem& p, Work& work), (p, work), Backward<float>)
SCRL_WIDEST(backward_double, (const Problem& p, Work& work), (p, work), Backward<double>)
SCRL_WIDEST(backward_bf16, (const Problem& p, Work& work), (p, work), Backward<bf16>)
SCRL_WIDEST(backward_f16, (const Problem& p, Work& work), (p, work), Backward<f16>)

}  // namespace scrl::roi
