// One view: its row of the table, and the memory in which it is made.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "host/levels.h"

namespace scrl_fast::host {

// scrl_fast.ops.augment_views.VIEW_DTYPE
struct ViewRow {
  int32_t image, y, x, h, w;
  uint8_t flip, jitter, order[4];
  float brightness, contrast, saturation, hue;
  uint8_t grayscale, blur;
  float blur_amount;
  uint8_t solarize;
};
static_assert(sizeof(ViewRow) == 56, "ViewRow must have the layout of VIEW_DTYPE");

enum Jitter : uint8_t { kBrightness, kContrast, kSaturation, kHue, kToGrey };
enum Blur : uint8_t { kNoBlur, kResizeBlur, kGaussianBlur };

constexpr int kGroup = 64;  // levels in the widest vector of words: pictures are padded to whole groups

// Grows and never shrinks: sizes repeat from view to view. Room for a group more, so that whole vectors can be used.
template <typename T>
T* at_least(std::vector<T>& buffer, int64_t count) {
  if (static_cast<int64_t>(buffer.size()) < count + kGroup) buffer.resize(count + kGroup);
  return buffer.data();
}

// The planes of a view: rows of `pitch` levels, of which those from `size` on are zero; `plane` levels each.
struct Shape {
  int size, pitch;
  int64_t plane;

  explicit Shape(int side) : size(side), pitch(std::max(side, kGroup)), plane(round_up(side * pitch, kGroup)) {}
};

}  // namespace scrl_fast::host
