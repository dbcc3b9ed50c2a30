// Between planes (one channel after the other, as NCHW lies) and lanes (all channels of a cell side by side).
#pragma once
#include "cpu/simd.h"

namespace scrl {

// Runs of cells that are multiples of this are turned fastest.
constexpr int64_t kTransposeCells = 8;

// planes_to_lanes: lanes[cell * width + channel] = planes[channel * channel_stride + cell]; channels from `channels` up
// to `width` become zero. lanes_to_planes: the other way, `channels` of them.
#define SCRL_TRANSPOSE_DECLARATIONS(Storage)                                                               \
  void planes_to_lanes(const Storage* planes, int64_t channel_stride, int64_t cells, int64_t channels,     \
                       accumulate_t<Storage>* lanes, int64_t width);                                       \
  void lanes_to_planes(const accumulate_t<Storage>* lanes, int64_t width, int64_t cells, int64_t channels, \
                       Storage* planes, int64_t channel_stride);
SCRL_TRANSPOSE_DECLARATIONS(float)
SCRL_TRANSPOSE_DECLARATIONS(double)
SCRL_TRANSPOSE_DECLARATIONS(bf16)
SCRL_TRANSPOSE_DECLARATIONS(f16)
#undef SCRL_TRANSPOSE_DECLARATIONS

template <class Storage>
SCRL_INLINE accumulate_t<Storage> widen_one(Storage value) {
  if constexpr (sizeof(Storage) == 2)
    return Simd<Storage, 16>::load_tail(&value, 1)[0];
  else
    return value;
}

template <class Storage>
SCRL_INLINE void narrow_one(Storage* to, accumulate_t<Storage> value) {
  if constexpr (sizeof(Storage) == 2) {
    typename Simd<Storage, 16>::Vector lanes = {};
    Simd<Storage, 16>::store_tail(to, lanes + value, 1);
  } else {
    *to = value;
  }
}

}  // namespace scrl
