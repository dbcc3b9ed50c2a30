#include "cpu/transpose.h"

#include "cpu/lanes.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#define SCRL_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, i32x8{__VA_ARGS__})
#else
#define SCRL_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif

namespace scrl {
namespace {

using f32x8 = float __attribute__((vector_size(32)));
using i32x8 = int32_t __attribute__((vector_size(32)));

// 24 shuffles of 32 bytes: AVX2 has them, and AVX-512 runs two of them a cycle where it runs one of 64 bytes.
SCRL_INLINE void transpose(f32x8 (&r)[8]) {
  f32x8 t[8], u[8];
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

template <class Storage>
SCRL_INLINE void planes_to_lanes_block(const Storage* planes, int64_t channel_stride, float* lanes, int64_t width) {
  f32x8 r[2][8];
  for (int c = 0; c < 8; ++c) {
    if constexpr (sizeof(Storage) == 2) {
      const f32x16 both = load(planes + c * channel_stride);
      std::memcpy(&r[0][c], &both, sizeof(f32x8));
      std::memcpy(&r[1][c], reinterpret_cast<const char*>(&both) + sizeof(f32x8), sizeof(f32x8));
    } else {
      std::memcpy(&r[0][c], planes + c * channel_stride, sizeof(f32x8));
    }
  }
  for (int half = 0; half < transpose_cells<Storage> / 8; ++half) {
    transpose(r[half]);
    for (int i = 0; i < 8; ++i) std::memcpy(lanes + (8 * half + i) * width, &r[half][i], sizeof(f32x8));
  }
}

template <class Storage>
SCRL_INLINE void lanes_to_planes_block(const float* lanes, int64_t width, Storage* planes, int64_t channel_stride) {
  f32x8 r[2][8];
  for (int half = 0; half < transpose_cells<Storage> / 8; ++half) {
    for (int i = 0; i < 8; ++i) std::memcpy(&r[half][i], lanes + (8 * half + i) * width, sizeof(f32x8));
    transpose(r[half]);
  }
  for (int c = 0; c < 8; ++c) {
    if constexpr (sizeof(Storage) == 2) {
      f32x16 both;
      std::memcpy(&both, &r[0][c], sizeof(f32x8));
      std::memcpy(reinterpret_cast<char*>(&both) + sizeof(f32x8), &r[1][c], sizeof(f32x8));
      store(planes + c * channel_stride, both);
    } else {
      std::memcpy(planes + c * channel_stride, &r[0][c], sizeof(f32x8));
    }
  }
}

// Runs block(cell) over [0, cells) in whole blocks and single(cell) over the rest. A rest of one or two float32 cells
// is cheaper cell by cell; any other is a last block that overlaps the one before.
template <class Storage, class Block, class Single>
SCRL_INLINE void in_blocks(int64_t cells, const Block& block, const Single& single) {
  constexpr int64_t size = transpose_cells<Storage>, cheap = sizeof(Storage) == 2 ? 0 : 2;
  int64_t cell = 0;
  if constexpr (sizeof(Storage) <= 4) {
    for (; cell + size <= cells; cell += size) block(cell);
    if (cell < cells && cells >= size && cells - cell > cheap) {
      block(cells - size);
      return;
    }
  }
  for (; cell < cells; ++cell) single(cell);
}

template <class Storage>
SCRL_INLINE void to_lanes(const Storage* planes, int64_t channel_stride, int64_t cells, int64_t channels,
                          accumulate_t<Storage>* lanes, int64_t width) {
  int64_t c = 0;
  for (; c + 8 <= channels; c += 8) {
    const Storage* from = planes + c * channel_stride;
    accumulate_t<Storage>* to = lanes + c;
    in_blocks<Storage>(
        cells,
        [&](int64_t cell) __attribute__((always_inline)) {
          if constexpr (sizeof(Storage) <= 4)
            planes_to_lanes_block(from + cell, channel_stride, to + cell * width, width);
        },
        [&](int64_t cell) __attribute__((always_inline)) {
          for (int i = 0; i < 8; ++i) to[cell * width + i] = widen_one(from[i * channel_stride + cell]);
        });
  }
  for (; c < width; ++c)
    for (int64_t cell = 0; cell < cells; ++cell)
      lanes[cell * width + c] = c < channels ? widen_one(planes[c * channel_stride + cell]) : 0;
}

template <class Storage>
SCRL_INLINE void to_planes(const accumulate_t<Storage>* lanes, int64_t width, int64_t cells, int64_t channels,
                           Storage* planes, int64_t channel_stride) {
  int64_t c = 0;
  for (; c + 8 <= channels; c += 8) {
    const accumulate_t<Storage>* from = lanes + c;
    Storage* to = planes + c * channel_stride;
    in_blocks<Storage>(
        cells,
        [&](int64_t cell) __attribute__((always_inline)) {
          if constexpr (sizeof(Storage) <= 4)
            lanes_to_planes_block(from + cell * width, width, to + cell, channel_stride);
        },
        [&](int64_t cell) __attribute__((always_inline)) {
          for (int i = 0; i < 8; ++i) narrow_one(to + i * channel_stride + cell, from[cell * width + i]);
        });
  }
  for (; c < channels; ++c)
    for (int64_t cell = 0; cell < cells; ++cell)
      narrow_one(planes + c * channel_stride + cell, lanes[cell * width + c]);
}
}  // namespace

#define SCRL_TRANSPOSE(Storage)                                                                            \
  SCRL_MULTIVERSION void planes_to_lanes(const Storage* planes, int64_t channel_stride, int64_t cells,     \
                                         int64_t channels, accumulate_t<Storage>* lanes, int64_t width) {  \
    to_lanes(planes, channel_stride, cells, channels, lanes, width);                                       \
  }                                                                                                        \
  SCRL_MULTIVERSION void lanes_to_planes(const accumulate_t<Storage>* lanes, int64_t width, int64_t cells, \
                                         int64_t channels, Storage* planes, int64_t channel_stride) {      \
    to_planes(lanes, width, cells, channels, planes, channel_stride);                                      \
  }
SCRL_TRANSPOSE(float)
SCRL_TRANSPOSE(double)
SCRL_TRANSPOSE(bf16)
SCRL_TRANSPOSE(f16)

}  // namespace scrl
