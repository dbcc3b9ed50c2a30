// Between planes (one channel after the other, as NCHW lies) and lanes (all channels of a cell side by side).
#pragma once
#include "cpu/lanes.h"

namespace scrl {

// Cells of 8 channels that are turned at once: run lengths that are multiples of it are fastest. Float64 goes one by
// one.
template <class Storage>
inline constexpr int64_t transpose_cells = sizeof(Storage) == 2 ? 16 : 8;

// lanes[cell * width + channel] = planes[channel * channel_stride + cell]; channels from `channels` to `width` become
// zero.
void planes_to_lanes(const float* planes, int64_t channel_stride, int64_t cells, int64_t channels, float* lanes,
                     int64_t width);
void planes_to_lanes(const double* planes, int64_t channel_stride, int64_t cells, int64_t channels, double* lanes,
                     int64_t width);
void planes_to_lanes(const bf16* planes, int64_t channel_stride, int64_t cells, int64_t channels, float* lanes,
                     int64_t width);
void planes_to_lanes(const f16* planes, int64_t channel_stride, int64_t cells, int64_t channels, float* lanes,
                     int64_t width);

// planes[channel * channel_stride + cell] = lanes[cell * width + channel]
void lanes_to_planes(const float* lanes, int64_t width, int64_t cells, int64_t channels, float* planes,
                     int64_t channel_stride);
void lanes_to_planes(const double* lanes, int64_t width, int64_t cells, int64_t channels, double* planes,
                     int64_t channel_stride);
void lanes_to_planes(const float* lanes, int64_t width, int64_t cells, int64_t channels, bf16* planes,
                     int64_t channel_stride);
void lanes_to_planes(const float* lanes, int64_t width, int64_t cells, int64_t channels, f16* planes,
                     int64_t channel_stride);

template <class Storage>
SCRL_INLINE accumulate_t<Storage> widen_one(Storage value) {
  if constexpr (sizeof(Storage) == 2)
    return load_tail(&value, 1)[0];
  else
    return value;
}

template <class Storage>
SCRL_INLINE void narrow_one(Storage* to, accumulate_t<Storage> value) {
  if constexpr (sizeof(Storage) == 2)
    store_tail(to, lanes_t<Storage>{} + value, 1);
  else
    *to = value;
}

}  // namespace scrl
