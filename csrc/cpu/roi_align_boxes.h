// What the CPU's forward and backward passes of RoIAlign share: the problem, boxes by image, sampling weights of a box.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace scrl::roi {

struct Group {
  int32_t image, begin, end;  // boxes order[begin, end)
};

struct Problem {
  const void* boxes;  // [count, 5], double for a double map, else float
  int64_t count, images, channels, height, width, pooled_height, pooled_width, sampling_ratio;
  double scale;
  bool aligned;

  std::vector<int32_t> order;  // rows of boxes by image; within an image in their own order
  std::vector<int32_t> first;  // [images + 1]: where an image's boxes begin in order
  std::vector<Group> groups;   // order cut into runs of one image, for the forward pass

  const void* source;  // forward: the map [images, channels, height, width]; backward: the gradient [count, channels,
                       // pooled_height, pooled_width]
  void* result;        // forward: [count, channels, pooled_height, pooled_width]; backward: the map's gradient
  int64_t image_stride, channel_stride, row_stride, column_stride;  // of the map or its gradient, in elements
  bool stream;                                                      // write past the caches

  int64_t bins() const { return pooled_height * pooled_width; }
  int64_t cells() const { return height * width; }
  bool nothing() const { return images == 0 || channels == 0 || cells() == 0; }  // of the map
};

template <class T>
struct Tap {
  int32_t cell;
  T weight;
};

template <class T>
struct RowTap {
  int32_t row, bin;
  T weight;
};

// Sampling weights of a run of boxes, O(boxes x (height + width)): which map rows go into which bins of a column,
// sorted by row, and which cells of a row go into each bin of a row. Built without fused multiply-adds, as torchvision
// is.
template <class T>
class Weights {
 public:
  void assign(const Problem& problem, int64_t begin, int64_t end);  // boxes order[begin, end)

  const RowTap<T>* rows_begin(int64_t box) const { return rows_.data() + row_ends_[box]; }
  const RowTap<T>* rows_end(int64_t box) const { return rows_.data() + row_ends_[box + 1]; }
  const Tap<T>* columns_begin(int64_t box, int64_t bin) const {
    return columns_.data() + column_ends_[box * bins_ + bin];
  }
  const Tap<T>* columns_end(int64_t box, int64_t bin) const {
    return columns_.data() + column_ends_[box * bins_ + bin + 1];
  }
  bool can_be_sampled(int64_t box) const { return sampled_[box]; }

 private:
  int64_t bins_ = 0;
  std::vector<RowTap<T>> rows_;
  std::vector<Tap<T>> columns_;
  std::vector<int64_t> row_ends_, column_ends_;  // many large boxes of one image have more taps than fit 32 bits
  std::vector<char> sampled_;
};

// Memory that begins at a cache line, kept from use to use.
template <class T>
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }
  T* ensure(int64_t size) {
    if (size > size_) {
      std::free(data_);
      data_ = static_cast<T*>(std::aligned_alloc(64, (size * sizeof(T) + 63) / 64 * 64));
      if (!data_) throw std::bad_alloc();
      size_ = size;
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// Pieces of work that threads take one after the other: which thread does which has no influence on the result.
struct Work {
  int64_t pieces, channel_ranges, channels_a_range;  // pieces: groups (forward) or images (backward) x ranges
  std::atomic<int64_t> next{0};
};

// Each runs pieces of the work until none is left.
void forward_float(const Problem&, Work&);
void forward_double(const Problem&, Work&);
void forward_bf16(const Problem&, Work&);
void forward_f16(const Problem&, Work&);
void backward_float(const Problem&, Work&);
void backward_double(const Problem&, Work&);
void backward_bf16(const Problem&, Work&);
void backward_f16(const Problem&, Work&);

}  // namespace scrl::roi
