#include "cpu/transpose.h"

namespace scrl {
namespace {

template <class V>
SCRL_INLINE void transpose(V (&r)[4]) {
  V t[4];
  for (int i = 0; i < 4; i += 2) {
    t[i] = SCRL_SHUFFLE(r[i], r[i + 1], 0, 4, 1, 5);
    t[i + 1] = SCRL_SHUFFLE(r[i], r[i + 1], 2, 6, 3, 7);
  }
  for (int i = 0; i < 2; ++i) {
    r[2 * i] = SCRL_SHUFFLE(t[i], t[i + 2], 0, 1, 4, 5);
    r[2 * i + 1] = SCRL_SHUFFLE(t[i], t[i + 2], 2, 3, 6, 7);
  }
}

// 24 shuffles of 32 bytes: AVX2 has them, and AVX-512 runs two of most a cycle where it runs one of 64 bytes.
template <class V>
SCRL_INLINE void transpose(V (&r)[8]) {
  V t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = SCRL_SHUFFLE(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    t[i + 1] = SCRL_SHUFFLE(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      u[i + 2 * j] = SCRL_SHUFFLE(t[i + j], t[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      u[i + 2 * j + 1] = SCRL_SHUFFLE(t[i + j], t[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = SCRL_SHUFFLE(u[i], u[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    r[i + 4] = SCRL_SHUFFLE(u[i], u[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// Runs block(cell) over [0, cells) in blocks of `size` and single(cell) over the rest. A rest of one or two cells is
// cheaper cell by cell; a longer one is a last block that overlaps the one before.
template <int64_t size, class Block, class Single>
SCRL_INLINE void in_blocks(int64_t cells, const Block& block, const Single& single) {
  int64_t cell = 0;
  for (; cell + size <= cells; cell += size) block(cell);
  if (cells - cell > 2 && cells >= size) {
    block(cells - size);
    return;
  }
  for (; cell < cells; ++cell) single(cell);
}

template <class Storage, int Bytes>
struct Turn {
  using Number = accumulate_t<Storage>;
  using From = Simd<Storage, Bytes>;
  using Vector = typename From::Vector;
  static constexpr int64_t side = From::lanes;
  static constexpr bool in_registers = sizeof(Number) == 4;  // float64 goes one by one

  static SCRL_INLINE void block_to_lanes(const Storage* planes, int64_t channel_stride, Number* lanes, int64_t width) {
    Vector r[side];
    for (int i = 0; i < side; ++i) r[i] = From::load(planes + i * channel_stride);
    transpose(r);
    for (int i = 0; i < side; ++i) std::memcpy(lanes + i * width, &r[i], sizeof(Vector));
  }

  static SCRL_INLINE void block_to_planes(const Number* lanes, int64_t width, Storage* planes, int64_t channel_stride) {
    Vector r[side];
    for (int i = 0; i < side; ++i) std::memcpy(&r[i], lanes + i * width, sizeof(Vector));
    transpose(r);
    for (int i = 0; i < side; ++i) From::store(planes + i * channel_stride, r[i]);
  }
};

template <class Storage>
struct ToLanes {
  template <int Bytes>
  static SCRL_INLINE void run(const Storage* planes, int64_t channel_stride, int64_t cells, int64_t channels,
                              accumulate_t<Storage>* lanes, int64_t width) {
    using Block = Turn<Storage, Bytes == 64 ? 32 : Bytes>;
    int64_t c = 0;
    if constexpr (Block::in_registers)
      for (; c + Block::side <= channels; c += Block::side) {
        const Storage* from = planes + c * channel_stride;
        in_blocks<Block::side>(
            cells,
            [&](int64_t cell) __attribute__((always_inline)) {
              Block::block_to_lanes(from + cell, channel_stride, lanes + cell * width + c, width);
            },
            [&](int64_t cell) __attribute__((always_inline)) {
              for (int i = 0; i < Block::side; ++i)
                lanes[cell * width + c + i] = widen_one(from[i * channel_stride + cell]);
            });
      }
    for (; c < width; ++c)
      for (int64_t cell = 0; cell < cells; ++cell)
        lanes[cell * width + c] = c < channels ? widen_one(planes[c * channel_stride + cell]) : 0;
  }
};

template <class Storage>
struct ToPlanes {
  template <int Bytes>
  static SCRL_INLINE void run(const accumulate_t<Storage>* lanes, int64_t width, int64_t cells, int64_t channels,
                              Storage* planes, int64_t channel_stride) {
    using Block = Turn<Storage, Bytes == 64 ? 32 : Bytes>;
    int64_t c = 0;
    if constexpr (Block::in_registers)
      for (; c + Block::side <= channels; c += Block::side) {
        Storage* to = planes + c * channel_stride;
        in_blocks<Block::side>(
            cells,
            [&](int64_t cell) __attribute__((always_inline)) {
              Block::block_to_planes(lanes + cell * width + c, width, to + cell, channel_stride);
            },
            [&](int64_t cell) __attribute__((always_inline)) {
              for (int i = 0; i < Block::side; ++i)
                narrow_one(to + i * channel_stride + cell, lanes[cell * width + c + i]);
            });
      }
    for (; c < channels; ++c)
      for (int64_t cell = 0; cell < cells; ++cell)
        narrow_one(planes + c * channel_stride + cell, lanes[cell * width + c]);
  }
};
}  // namespace

#define SCRL_TRANSPOSE(Storage)                                                                                     \
  SCRL_WIDEST(planes_to_lanes,                                                                                      \
              (const Storage* planes, int64_t channel_stride, int64_t cells, int64_t channels,                      \
               accumulate_t<Storage>* lanes, int64_t width),                                                        \
              (planes, channel_stride, cells, channels, lanes, width), ToLanes<Storage>)                            \
  SCRL_WIDEST(lanes_to_planes,                                                                                      \
              (const accumulate_t<Storage>* lanes, int64_t width, int64_t cells, int64_t channels, Storage* planes, \
               int64_t channel_stride),                                                                             \
              (lanes, width, cells, channels, planes, channel_stride), ToPlanes<Storage>)
SCRL_TRANSPOSE(float)
SCRL_TRANSPOSE(double)
SCRL_TRANSPOSE(bf16)
SCRL_TRANSPOSE(f16)

}  // namespace scrl
