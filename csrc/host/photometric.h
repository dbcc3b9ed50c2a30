// Colour, pixel by pixel, on whole levels 0..255 kept in floats: each function takes one row of each channel and leaves
// levels behind. The arithmetic is Pillow's (where it truncates, this truncates), so that the mean grey, a threshold or
// a hue sector decides as it does there.
#pragma once
#include <algorithm>
#include <cstdint>

#include "host/resample.h"

namespace scrl_fast::host {

SCRL_INLINE float truncated(float value) {
  return static_cast<float>(static_cast<int>(std::min(std::max(value, 0.0f), 255.0f)));
}

// ITU-R 601 luma in 16-bit fixed point, rounded.
SCRL_INLINE int luma(float r, float g, float b) {
  return (static_cast<int>(r) * 19595 + static_cast<int>(g) * 38470 + static_cast<int>(b) * 7471 + 0x8000) >> 16;
}

// Away from black (brightness) or from one grey (contrast).
SCRL_INLINE void blend_constant(float* SCRL_RESTRICT v, int n, float base, float factor) {
  for (int i = 0; i < n; ++i) v[i] = truncated(base + factor * (v[i] - base));
}

SCRL_INLINE void saturate(float* SCRL_RESTRICT r, float* SCRL_RESTRICT g, float* SCRL_RESTRICT b, int n, float factor) {
  for (int i = 0; i < n; ++i) {
    const float grey = static_cast<float>(luma(r[i], g[i], b[i]));
    r[i] = truncated(grey + factor * (r[i] - grey));
    g[i] = truncated(grey + factor * (g[i] - grey));
    b[i] = truncated(grey + factor * (b[i] - grey));
  }
}

SCRL_INLINE void to_grey(float* SCRL_RESTRICT r, float* SCRL_RESTRICT g, float* SCRL_RESTRICT b, int n) {
  for (int i = 0; i < n; ++i) r[i] = g[i] = b[i] = static_cast<float>(luma(r[i], g[i], b[i]));
}

SCRL_INLINE int sum_luma(const float* SCRL_RESTRICT r, const float* SCRL_RESTRICT g, const float* SCRL_RESTRICT b,
                         int n) {
  int sum = 0;
  for (int i = 0; i < n; ++i) sum += luma(r[i], g[i], b[i]);
  return sum;
}

SCRL_INLINE Vec whole(Vec value) { return __builtin_convertvector(__builtin_convertvector(value, IntVec), Vec); }

// Through HSV in whole levels, as Pillow converts: `shift` is added to the hue level, which wraps at 256. n is a multiple
// of sixteen. In vectors, since compilers leave a loop with this many choices scalar (ten times slower).
SCRL_INLINE void turn_hue(float* r, float* g, float* b, int n, int shift) {
  const Vec zero = {}, one = zero + 1.0f;
  for (int i = 0; i < n; i += kLanes) {
    const Vec red = *reinterpret_cast<Vec*>(r + i), green = *reinterpret_cast<Vec*>(g + i);
    const Vec blue = *reinterpret_cast<Vec*>(b + i);
    const Vec some = red > green ? red : green, less = red > green ? green : red;
    const Vec high = some > blue ? some : blue, low = less > blue ? blue : less;
    const Vec chroma = high - low, inverse = one / (chroma > zero ? chroma : one);
    const Vec rc = (high - red) * inverse, gc = (high - green) * inverse, bc = (high - blue) * inverse;
    const Vec not_red = green == high ? 2.0f + rc - bc : 4.0f + gc - rc;
    Vec sector = (red == high ? bc - gc : not_red) * (1.0f / 6.0f);
    sector = sector < zero ? sector + one : sector;
    const IntVec level = (__builtin_convertvector(sector * 255.0f, IntVec) + shift) & 255;
    const IntVec turned = chroma > zero ? level : (level & 0) + (shift & 255);
    const Vec saturation = whole(chroma * 255.0f / (high > zero ? high : one)) * (1.0f / 255.0f);
    const Vec angle = __builtin_convertvector(turned, Vec) * (6.0f / 255.0f);
    const Vec side = whole(angle), f = angle - side;
    const Vec p = whole(high * (1.0f - saturation) + 0.5f), q = whole(high * (1.0f - saturation * f) + 0.5f);
    const Vec t = whole(high * (1.0f - saturation * (1.0f - f)) + 0.5f);
    const Vec k = side == 6.0f ? zero : side;
    // the channel at its highest, falling, lowest and rising parts of the circle
    *reinterpret_cast<Vec*>(r + i) = (k == 0.0f) | (k == 5.0f) ? high : (k == 1.0f ? q : (k == 4.0f ? t : p));
    *reinterpret_cast<Vec*>(g + i) = (k == 1.0f) | (k == 2.0f) ? high : (k == 0.0f ? t : (k == 3.0f ? q : p));
    *reinterpret_cast<Vec*>(b + i) = (k == 3.0f) | (k == 4.0f) ? high : (k == 2.0f ? t : (k == 5.0f ? q : p));
  }
}

SCRL_INLINE float solarized_level(float v, float threshold) { return v >= threshold ? 255.0f - v : v; }

}  // namespace scrl_fast::host
