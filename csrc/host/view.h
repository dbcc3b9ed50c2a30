// One view: its row of the table, and the memory in which it is made.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#include "host/levels.h"

namespace scrl_fast::host {

// scrl_fast.ops.view_table.VIEW_DTYPE
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

// Begins with a cache line: the widest vectors are one line long, and each that lies across two costs two accesses.
template <typename T>
struct OnLines {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  OnLines() = default;
  template <typename U>
  OnLines(const OnLines<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kLine)); }
  void deallocate(T* data, size_t) { ::operator delete(data, kLine); }
  bool operator==(const OnLines&) const { return true; }
};
template <typename T>
using Buffer = std::vector<T, OnLines<T>>;

// Grows and never shrinks: sizes repeat from view to view. Room for a group more, so that whole vectors can be used.
template <typename T>
T* at_least(Buffer<T>& buffer, int64_t count) {
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
