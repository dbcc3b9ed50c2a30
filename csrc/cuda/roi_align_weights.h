// RoIAlign on the GPU: weights of every box and axis, and the boxes of every image. The kernels that use them follow.
// No torch here: tests/cuda_on_cpu compiles these headers for the CPU and runs them.
#pragma once
#include <algorithm>
#include <limits>
#include <type_traits>

#include "cuda/chunks.h"
#include "roi_align.h"

namespace scrl::roi {
using scrl::cuda::accumulate_t;
using scrl::cuda::narrow;
using scrl::cuda::Pack;
using scrl::cuda::widen;

constexpr int kWarp = 32, kWarps = 8;  // lanes, warps a block
constexpr unsigned kAll = 0xffffffffu;

template <class T>
constexpr int kPack = 16 / sizeof(T);

struct Sizes {
  int count, images, channels, height, width, pooled_height, pooled_width;
};

// Slabs of 32 x V channels.
template <int V>
SCRL_HOST_DEVICE int slabs_of(const Sizes& s) {
  return (s.channels + kWarp * V - 1) / (kWarp * V);
}

struct Strides {  // of the map or its gradient, in elements
  int64_t image, channel, row, column;
};

// The cells [begin, end) that a bin reads on one axis. The weight of a cell lies at shift + cell of its box's strip.
struct Bin {
  int begin, end, shift;
};

template <class R>
struct BinWeights {
  const R* weights;  // of a cell in [begin, end)
  int begin, end;

  __device__ __forceinline__ R operator[](int cell) const { return weights[cell]; }
  __device__ __forceinline__ R at(int cell) const { return cell >= begin && cell < end ? weights[cell] : R(0); }
};

// Weights of one axis. The bins of a box follow each other on the map and share few cells with the next one, so that
// all of them fit into one strip, each shifted by that many cells more than the one before it. One row of the map a bin
// would take 246 MB for 8,192 boxes of 14 x 14 bins on 200 x 336 cells, where strips take 23.
template <class R>
struct AxisWeights {
  static constexpr int kShared = 4;  // at most, as box_weights cuts them
  R* strips;                         // [count, strip_length()]
  Bin* bins;                         // [count, bins_a_box]
  int size, bins_a_box;              // cells of the axis

  SCRL_HOST_DEVICE int64_t strip_length() const { return size + int64_t{kShared} * bins_a_box; }
  __device__ __forceinline__ BinWeights<R> of(int64_t k, int bin) const {
    const Bin made = bins[k * bins_a_box + bin];
    return {strips + k * strip_length() + made.shift, made.begin, made.end};
  }
};

// What box_weights and group_by_image write: weights of rows and columns; the image of a box, -1 for one that cannot be
// sampled; order[first[n], first[n + 1]) are the boxes of image n, and those from first[images] on cannot be sampled.
template <class R>
struct Workspace {
  AxisWeights<R> y, x;
  int *image, *order, *first;  // [count], [count], [images + 1]
  int* unsorted;               // [1]: not 0 where boxes do not come in the order of their images
};

// boxes [count, 5] -> w.y, w.x, w.image. A thread a bin of an axis of a box.
template <class R>
__global__ void box_weights(const R* __restrict__ boxes, Workspace<R> w, Sizes s, R scale, int64_t sampling_ratio,
                            bool aligned) {
  const int bins = s.pooled_height + s.pooled_width;
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t k = thread / bins;
  if (k >= s.count) return;
  const R* box = boxes + 5 * k;
  Axis<R> y, x;
  const bool fine_y = make_axis(box[2], box[4], scale, s.pooled_height, sampling_ratio, aligned, y);
  const bool fine_x = make_axis(box[1], box[3], scale, s.pooled_width, sampling_ratio, aligned, x);
  const int image = fine_y && fine_x ? static_cast<int>(image_of(box[0], s.images)) : -1;

  int bin = static_cast<int>(thread % bins);
  if (thread == 0) *w.unsorted = 0;  // until take_order finds otherwise
  if (bin == 0) w.image[k] = image;
  const bool vertical = bin < s.pooled_height;
  if (!vertical) bin -= s.pooled_height;
  const Axis<R> axis = vertical ? y : x;
  const AxisWeights<R> weights = vertical ? w.y : w.x;
  const bool backwards = axis.bin < R(0);  // an edge right of the other one: bins follow each other to the left
  Bin made{weights.size, 0, AxisWeights<R>::kShared * (backwards ? weights.bins_a_box - 1 - bin : bin)};
  R* strip = weights.strips + k * weights.strip_length() + made.shift;
  if (image >= 0) {
    // A sample lies between its bin's edges but for rounding. That may exceed a cell in boxes millions of cells long;
    // what lies further out would meet the next bin's weights in the strip, and is left out.
    const R edge = std::floor(axis.start + multiply(static_cast<R>(bin), axis.bin));
    const R next = std::floor(axis.start + multiply(static_cast<R>(bin + 1), axis.bin));
    const R low = (backwards ? next : edge) - R(1), high = (backwards ? edge : next) + R(3);
    const auto for_each = [&](const auto& use) {
      for_each_tap(axis, bin, weights.size, [&](int64_t cell, R weight) {
        if (static_cast<R>(cell) >= low && static_cast<R>(cell) < high) use(static_cast<int>(cell), weight);
      });
    };
    for_each([&](int cell, R) {
      made.begin = min(made.begin, cell);
      made.end = max(made.end, cell + 1);
    });
    for (int cell = made.begin; cell < made.end; ++cell) strip[cell] = R(0);
    for_each([&](int cell, R weight) { strip[cell] += weight; });
  }
  weights.bins[k * weights.bins_a_box + bin] = made;
}

// w.image [count] -> w.order [count], w.first [images + 1] of boxes that come in the order of their images, as those of
// a training step do; else w.unsorted. A thread a box, and one for the end.
template <class R>
__global__ void take_order(Workspace<R> w, int images, int count) {
  const int64_t k = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (k > count) return;
  const auto image_at = [&](int64_t k) { return w.image[k] < 0 ? images : w.image[k]; };
  const int before = k > 0 ? image_at(k - 1) : -1, own = k < count ? image_at(k) : images;
  if (own < before) *w.unsorted = 1;
  for (int n = before + 1; n <= own; ++n) w.first[n] = static_cast<int>(k);
  if (k < count) w.order[k] = static_cast<int>(k);
}

// w.image [count] -> w.order [count], w.first [images + 1] of boxes in any order; take_order has done it for sorted
// ones. Block n finds the boxes of image n, block `images` those that cannot be sampled. Each warp walks one stretch of
// the boxes twice: counting, then placing behind what the warps before it have counted, so boxes stay in their order.
template <class R>
__global__ void group_by_image(Workspace<R> w, int images, int count) {
  if (*w.unsorted == 0) return;
  static __shared__ int before[kWarps], mine[kWarps];
  const int n = blockIdx.x, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int begin = static_cast<int>(int64_t{count} * warp / kWarps);
  const int end = static_cast<int>(int64_t{count} * (warp + 1) / kWarps);
  const auto image_at = [&](int k) {
    const int image = k < end ? w.image[k] : images + 1;
    return image < 0 ? images : image;
  };
  int less = 0, equal = 0;
  for (int base = begin; base < end; base += kWarp) {
    const int image = image_at(base + lane);
    less += __popc(__ballot_sync(kAll, image < n));
    equal += __popc(__ballot_sync(kAll, image == n));
  }
  if (lane == 0) before[warp] = less, mine[warp] = equal;
  __syncthreads();
  int place = 0;
  for (int i = 0; i < kWarps; ++i) place += before[i];
  if (threadIdx.x == 0) w.first[n] = place;
  for (int i = 0; i < warp; ++i) place += mine[i];
  if (equal == 0) return;
  for (int base = begin; base < end; base += kWarp) {
    const bool is_mine = image_at(base + lane) == n;
    const unsigned all = __ballot_sync(kAll, is_mine);
    if (is_mine) w.order[place + __popc(all & ((1u << lane) - 1))] = base + lane;
    place += __popc(all);
  }
}

// ---- blocks of a launch ----

inline int64_t in_blocks(int64_t work, int64_t a_block) { return (work + a_block - 1) / a_block; }

inline int64_t box_weights_blocks(const Sizes& s, int threads) {
  return in_blocks(int64_t{s.count} * (s.pooled_height + s.pooled_width), threads);
}
inline int64_t take_order_blocks(const Sizes& s, int threads) { return in_blocks(int64_t{s.count} + 1, threads); }

}  // namespace scrl::roi
