// Colour, pixel by pixel, on whole levels kept in floats: each function takes n pixels of each channel, n a multiple of
// L, and leaves whole levels behind. The arithmetic is Pillow's (where it truncates, this truncates), so that the mean
// grey, a threshold or a hue sector decides as it does there.
#pragma once
#include <algorithm>
#include <cstdint>

#include "host/levels.h"
#include "host/view.h"

namespace scrl_fast::host {

// Pillow's blend: extrapolates, clamps, truncates.
template <int L>
SCRL_INLINE Floats<L> blended(Floats<L> base, Floats<L> value, float factor) {
  return to_floats<L>(clamped<L>(to_ints<L>(base + factor * (value - base)), 255));
}

// ITU-R 601 luma in 16-bit fixed point, rounded; all sums stay below 2^24, where floats are exact.
template <int L>
SCRL_INLINE Ints<L> luma(Floats<L> r, Floats<L> g, Floats<L> b) {
  return to_ints<L>((r * 19595.0f + g * 38470.0f + b * 7471.0f + 32768.0f) * 0x1p-16f);
}

// Away from black (brightness) or from one grey (contrast).
template <int L>
SCRL_INLINE void blend_constant(float* v, int n, float base, float factor) {
  for (int i = 0; i < n; i += L) store<L>(v + i, blended<L>(Floats<L>{} + base, load<L>(v + i), factor));
}

template <int L>
SCRL_INLINE void saturate(float* r, float* g, float* b, int n, float factor) {
  for (int i = 0; i < n; i += L) {
    const Floats<L> red = load<L>(r + i), green = load<L>(g + i), blue = load<L>(b + i);
    const Floats<L> grey = to_floats<L>(luma<L>(red, green, blue));
    store<L>(r + i, blended<L>(grey, red, factor));
    store<L>(g + i, blended<L>(grey, green, factor));
    store<L>(b + i, blended<L>(grey, blue, factor));
  }
}

template <int L>
SCRL_INLINE void to_grey(float* r, float* g, float* b, int n) {
  for (int i = 0; i < n; i += L) {
    const Floats<L> grey = to_floats<L>(luma<L>(load<L>(r + i), load<L>(g + i), load<L>(b + i)));
    store<L>(r + i, grey), store<L>(g + i, grey), store<L>(b + i, grey);
  }
}

template <int L>
SCRL_INLINE int sum_luma(const float* r, const float* g, const float* b, int n) {
  Ints<L> sums = {};
  for (int i = 0; i < n; i += L) sums += luma<L>(load<L>(r + i), load<L>(g + i), load<L>(b + i));
  int sum = 0;
  for (int l = 0; l < L; ++l) sum += sums[l];
  return sum;
}

// Through HSV in whole levels, as Pillow converts: `shift` is added to the hue level, which wraps at 256.
template <int L>
SCRL_INLINE void turn_hue(float* r, float* g, float* b, int n, int shift) {
  using F = Floats<L>;
  using I = Ints<L>;
  const F one = F{} + 1.0f;
  for (int i = 0; i < n; i += L) {
    const F red = load<L>(r + i), green = load<L>(g + i), blue = load<L>(b + i);
    const F high = larger<L>(larger<L>(red, green), blue), low = smaller<L>(smaller<L>(red, green), blue);
    const F chroma = high - low;
    // sixths of the circle: from red (0), green (2) or blue (4), towards the larger of the other two
    const I is_red = red == high, is_green = green == high;
    const F towards = is_red ? green - blue : (is_green ? blue - red : red - green);
    const F from = is_red ? F{} : (is_green ? one + 1.0f : one + 3.0f);
    F sixths = from + towards / larger<L>(chroma, one);
    sixths = sixths < F{} ? sixths + 6.0f : sixths;
    const I hue = (to_ints<L>(sixths * 42.5f) + shift) & 255;
    const F saturation = whole<L>(chroma * 255.0f / larger<L>(high, one)) * (1.0f / 255.0f);
    const F angle = to_floats<L>(hue) * (6.0f / 255.0f);
    // how far each channel falls from the highest level: all the way for two sixths, not at all for two
    const F fall_red = clamped<L>(2.0f - magnitude<L>(angle - 3.0f), 1.0f);
    const F fall_green = clamped<L>(magnitude<L>(angle - 2.0f) - 1.0f, 1.0f);
    const F fall_blue = clamped<L>(magnitude<L>(angle - 4.0f) - 1.0f, 1.0f);
    store<L>(r + i, whole<L>(high * (1.0f - saturation * fall_red) + 0.5f));
    store<L>(g + i, whole<L>(high * (1.0f - saturation * fall_green) + 0.5f));
    store<L>(b + i, whole<L>(high * (1.0f - saturation * fall_blue) + 0.5f));
  }
}

struct Step {
  uint8_t kind;
  float amount;
};

struct Steps {
  Step step[5];
  int count = 0;

  // What changes the picture. The way to hue and back alone would move pixels by one or two, so a shift of 0 is left
  // out.
  explicit Steps(const ViewRow& row) {
    const float amount[] = {row.brightness, row.contrast, row.saturation, row.hue}, neutral[] = {1, 1, 1, 0};
    for (uint8_t kind : row.order) {
      if (row.jitter && amount[kind] != neutral[kind]) step[count++] = {kind, amount[kind]};
    }
    if (row.grayscale) step[count++] = {kToGrey, 0.0f};
  }
};

constexpr int kChunk = 512;  // pixels whose three channels of floats stay in the first cache through all steps

template <int L>
SCRL_INLINE void apply(const Step& step, float* r, float* g, float* b, int n, float mean_grey) {
  switch (step.kind) {
    case kBrightness:
      for (float* v : {r, g, b}) blend_constant<L>(v, n, 0.0f, step.amount);
      break;
    case kContrast:
      for (float* v : {r, g, b}) blend_constant<L>(v, n, mean_grey, step.amount);
      break;
    case kSaturation:
      saturate<L>(r, g, b, n, step.amount);
      break;
    case kHue:
      turn_hue<L>(r, g, b, n, static_cast<int>(step.amount * 255.0f));
      break;
    default:
      to_grey<L>(r, g, b, n);
  }
}

// Steps begin..end-1 on all pixels; returns the sum of what their greys then are. The pixels that only fill up rows and
// planes are black and stay so until the contrast, behind which no sum is asked for.
template <int L>
SCRL_INLINE int64_t apply(const Steps& steps, int begin, int end, const Shape& shape, float mean_grey, bool sum,
                          uint8_t* picture) {
  int64_t total = 0;
  alignas(64) float values[3][kChunk];
  for (int64_t start = 0; start < shape.plane; start += kChunk) {
    const int n = static_cast<int>(std::min<int64_t>(kChunk, shape.plane - start));
    for (int c = 0; c < 3; ++c) {
      for (int i = 0; i < n; i += 4 * L) unpack<L>(picture + c * shape.plane + start + i, values[c] + i);
    }
    for (int k = begin; k < end; ++k) apply<L>(steps.step[k], values[0], values[1], values[2], n, mean_grey);
    if (sum) total += sum_luma<L>(values[0], values[1], values[2], n);
    for (int c = 0; c < 3 && begin < end; ++c) {
      for (int i = 0; i < n; i += 4 * L) pack<L>(values[c] + i, picture + c * shape.plane + start + i);
    }
  }
  return total;
}

// Contrast pulls towards the mean grey of the picture as it is then: one pass up to it, one from it on.
template <int L>
SCRL_INLINE void colour(const Steps& steps, const Shape& shape, uint8_t* picture) {
  int contrast = 0;
  while (contrast < steps.count && steps.step[contrast].kind != kContrast) ++contrast;
  float mean_grey = 0.0f;
  if (contrast < steps.count) {
    const int64_t sum = apply<L>(steps, 0, contrast, shape, 0.0f, true, picture);
    mean_grey = static_cast<float>(static_cast<int>(static_cast<double>(sum) / shape.size / shape.size + 0.5));
  } else {
    contrast = 0;
  }
  if (contrast < steps.count) apply<L>(steps, contrast, steps.count, shape, mean_grey, false, picture);
}

}  // namespace scrl_fast::host
