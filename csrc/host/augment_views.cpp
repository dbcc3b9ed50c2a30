// augment_views: a table row and a decoded picture in, a normalised view out. One view is one piece of work; everything
// between the picture and the result stays in two scratch planes of the thread that makes it (2 x 0.6 MB at 224 pixels).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <bit>
#include <cstring>
#include <type_traits>
#include <vector>

#include "host/parallel.h"
#include "host/photometric.h"
#include "host/resample.h"

namespace py = pybind11;

namespace scrl_fast::host {
namespace {

// scrl_fast.ops.augment_views.VIEW_DTYPE
struct ViewRow {
  int32_t image, y, x, h, w;
  uint8_t flip, jitter, order[4];
  float brightness, contrast, saturation, hue;
  uint8_t grayscale, blur;
  float blur_amount;
  uint8_t solarize;

  // whether step k of the jitter changes nothing; the way to hue and back alone would move pixels by one or two
  bool neutral(int k) const {
    const float value[] = {brightness - 1.0f, contrast - 1.0f, saturation - 1.0f, hue};
    return value[order[k]] == 0.0f;
  }
};
static_assert(sizeof(ViewRow) == 56, "ViewRow must have the layout of VIEW_DTYPE");

enum Blur : uint8_t { kNoBlur, kResizeBlur, kGaussianBlur };
enum Output : int { kFloat32, kBFloat16, kFloat16, kUint8 };

struct Job {
  const uint8_t* buffer;
  const int64_t *offsets, *widths;
  const ViewRow* rows;
  void* out;
  int size;
  Output output;
  bool channels_last;
  std::array<float, 3> scale, shift;  // result = level * scale + shift
  float solarize_threshold;
  int gaussian_taps;
};

struct Scratch {
  Axis along, down;
  std::vector<float> block, lanes, filtered, narrow, picture, blurred;
};

// Grows and never shrinks: sizes repeat from view to view.
SCRL_INLINE float* at_least(std::vector<float>& buffer, int64_t count) {
  if (static_cast<int64_t>(buffer.size()) < count) buffer.resize(count);
  return buffer.data();
}

// s.along along the rows and then s.down down the columns of a picture of `height` rows of `width` interleaved pixels
// (step 3, bytes) or of one plane (step 1, floats, rows padded to whole vectors). Result: `step` planes of `pitch` x
// `pitch` levels.
template <typename T>
SCRL_INLINE void filter_picture(const T* source, int64_t stride, int height, int width, int step, bool mirror, int pitch,
                                Scratch& s, float* planes) {
  const int size = s.down.size(), n = width * step, wide = round_up(s.along.size(), kLanes);
  const int64_t padded = round_up(n, 8), tall = round_up(height, kLanes);
  float* block = at_least(s.block, kLanes * padded);
  float* lanes = at_least(s.lanes, kLanes * padded);
  float* filtered = at_least(s.filtered, kLanes * wide);
  float* narrow = at_least(s.narrow, step * tall * wide);
  for (int top = 0; top < height; top += kLanes) {
    // the last block is moved up to end with the picture: its first rows are made twice, and none is read from beyond
    const int from = std::max(0, std::min(top, height - kLanes)), rows = std::min(kLanes, height);
    const T* corner = source + from * stride;
    const float* floats = block;
    int64_t floats_stride = padded;
    if constexpr (std::is_same_v<T, float>) {
      floats = corner, floats_stride = stride;
    } else {
      for (int i = 0; i < rows; ++i) {
        const T* SCRL_RESTRICT in = corner + i * stride;
        float* SCRL_RESTRICT out = block + i * padded;
        for (int j = 0; j < n; ++j) out[j] = static_cast<float>(in[j]);
      }
    }
    rows_to_lanes(floats, floats_stride, static_cast<int>(padded), lanes);
    for (int c = 0; c < step; ++c) {
      filter_lanes(lanes + c * kLanes, step, s.along, mirror, filtered);
      lanes_to_rows(filtered, wide, narrow + (c * tall + from) * wide, wide);
    }
  }
  for (int c = 0; c < step; ++c) {
    for (int y = 0; y < size; ++y) {
      filter_columns(narrow + (c * tall + s.down.first[y]) * wide, wide,
                     &s.down.weight[static_cast<size_t>(y) * s.down.taps], s.down.count[y], wide,
                     planes + (static_cast<int64_t>(c) * pitch + y) * pitch);
    }
  }
}

SCRL_INLINE void jitter(const ViewRow& row, int size, int pitch, float* planes) {
  const int64_t plane = static_cast<int64_t>(pitch) * pitch;
  const int shift = static_cast<int>(row.hue * 255.0f) & 255;
  int contrast_at = 0;
  while (row.order[contrast_at] != 1) ++contrast_at;
  float grey = 0.0f;
  // Contrast pulls towards the mean of the picture as it is then: one pass up to it, one from it on.
  for (int pass = 0; pass < 2; ++pass) {
    const int begin = pass == 0 ? 0 : contrast_at, end = pass == 0 ? contrast_at : 4;
    int64_t sum = 0;
    for (int y = 0; y < size; ++y) {
      float* r = planes + static_cast<int64_t>(y) * pitch;
      float *g = r + plane, *b = g + plane;
      for (int k = begin; k < end; ++k) {
        if (row.neutral(k)) continue;
        switch (row.order[k]) {
          case 0:
            for (float* v : {r, g, b}) blend_constant(v, size, 0.0f, row.brightness);
            break;
          case 1:
            for (float* v : {r, g, b}) blend_constant(v, size, grey, row.contrast);
            break;
          case 2: saturate(r, g, b, size, row.saturation); break;
          default: turn_hue(r, g, b, pitch, shift);
        }
      }
      if (pass == 0) sum += sum_luma(r, g, b, size);
    }
    if (pass == 0) grey = static_cast<float>(static_cast<int>(static_cast<double>(sum) / size / size + 0.5));
  }
}

struct Float32 {
  using type = float;
  static SCRL_INLINE type from(float v) { return v; }
};
struct Uint8 {
  using type = uint8_t;
  static SCRL_INLINE type from(float v) { return static_cast<uint8_t>(static_cast<int>(v)); }
};
struct BFloat16 {  // to nearest, ties to even; levels are finite
  using type = uint16_t;
  static SCRL_INLINE type from(float v) {
    const uint32_t bits = std::bit_cast<uint32_t>(v);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};
struct Float16 {
  using type = uint16_t;
  static SCRL_INLINE type from(float v) {
#if defined(__FLT16_MAX__)
    return std::bit_cast<uint16_t>(static_cast<_Float16>(v));
#else  // below 2^-14 adding 0.5 puts the last bit of a float where float16's subnormals end, and rounds
    const uint32_t bits = std::bit_cast<uint32_t>(v), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    const uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
    const uint32_t small = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
    return static_cast<uint16_t>(sign | (magnitude >= 0x38800000 ? std::min<uint32_t>(normal, 0x7c00) : small));
#endif
  }
};

template <typename Format>
SCRL_INLINE void write_view(const Job& job, int64_t view, bool solarized, int pitch, const float* planes) {
  using T = typename Format::type;
  const int size = job.size;
  const int64_t plane = static_cast<int64_t>(pitch) * pitch, pixels = static_cast<int64_t>(size) * size;
  const float s0 = job.scale[0], s1 = job.scale[1], s2 = job.scale[2];
  const float t0 = job.shift[0], t1 = job.shift[1], t2 = job.shift[2];
  // a level at or above the threshold is inverted; 256 is above all
  const float threshold = solarized ? job.solarize_threshold : 256.0f;
  for (int y = 0; y < size; ++y) {
    const float* SCRL_RESTRICT r = planes + static_cast<int64_t>(y) * pitch;
    const float *SCRL_RESTRICT g = r + plane, *SCRL_RESTRICT b = g + plane;
    T* SCRL_RESTRICT out = static_cast<T*>(job.out) + view * 3 * pixels;
    if (job.channels_last) {
      out += static_cast<int64_t>(y) * size * 3;
      for (int i = 0; i < size; ++i) {
        out[3 * i] = Format::from(solarized_level(r[i], threshold) * s0 + t0);
        out[3 * i + 1] = Format::from(solarized_level(g[i], threshold) * s1 + t1);
        out[3 * i + 2] = Format::from(solarized_level(b[i], threshold) * s2 + t2);
      }
    } else {
      out += static_cast<int64_t>(y) * size;
      for (int i = 0; i < size; ++i) out[i] = Format::from(solarized_level(r[i], threshold) * s0 + t0);
      for (int i = 0; i < size; ++i) out[pixels + i] = Format::from(solarized_level(g[i], threshold) * s1 + t1);
      for (int i = 0; i < size; ++i) out[2 * pixels + i] = Format::from(solarized_level(b[i], threshold) * s2 + t2);
    }
  }
}

SCRL_INLINE void blur(const Job& job, const ViewRow& row, int pitch, Scratch& s, const float* planes, float* blurred) {
  const int64_t plane = static_cast<int64_t>(pitch) * pitch;
  const int size = job.size, channels = row.grayscale ? 1 : 3;  // the planes of a grey picture are equal
  const bool resize = row.blur == kResizeBlur;
  const int small = resize ? std::max(1, static_cast<int>(size / static_cast<double>(row.blur_amount) + 1e-3)) : size;
  for (int pass = 0; pass < (resize ? 2 : 1); ++pass) {
    const int from = pass == 0 ? size : small, to = pass == 0 ? small : size;
    if (resize) {
      bicubic_axis(from, to, s.along);
    } else {
      gaussian_axis(size, std::min(job.gaussian_taps, 2 * size - 1), row.blur_amount, s.along);
    }
    s.down = s.along;
    for (int c = 0; c < channels; ++c) {
      filter_picture((pass == 0 ? planes : blurred) + c * plane, pitch, from, from, 1, false, pitch, s,
                     blurred + c * plane);
    }
  }
  for (int c = channels; c < 3; ++c) std::memcpy(blurred + c * plane, blurred, plane * sizeof(float));
}

SCRL_MULTIVERSION void make_views(const Job& job, Scratch& s, int64_t begin, int64_t end) {
  const int size = job.size, pitch = round_up(size, kLanes);
  const int64_t plane = static_cast<int64_t>(pitch) * pitch;
  for (int64_t view = begin; view < end; ++view) {
    const ViewRow& row = job.rows[view];
    const int64_t stride = job.widths[row.image] * 3;
    const uint8_t* corner = job.buffer + job.offsets[row.image] + row.y * stride + row.x * 3;
    float* planes = at_least(s.picture, 3 * plane);
    bicubic_axis(row.w, size, s.along);
    bicubic_axis(row.h, size, s.down);
    filter_picture(corner, stride, row.h, row.w, 3, row.flip != 0, pitch, s, planes);
    if (row.jitter) jitter(row, size, pitch, planes);
    if (row.grayscale) {
      for (int y = 0; y < size; ++y) {
        float* r = planes + static_cast<int64_t>(y) * pitch;
        to_grey(r, r + plane, r + 2 * plane, size);
      }
    }
    if (row.blur != kNoBlur) {
      float* blurred = at_least(s.blurred, 3 * plane);
      blur(job, row, pitch, s, planes, blurred);
      planes = blurred;
    }
    switch (job.output) {
      case kFloat32: write_view<Float32>(job, view, row.solarize != 0, pitch, planes); break;
      case kBFloat16: write_view<BFloat16>(job, view, row.solarize != 0, pitch, planes); break;
      case kFloat16: write_view<Float16>(job, view, row.solarize != 0, pitch, planes); break;
      case kUint8: write_view<Uint8>(job, view, row.solarize != 0, pitch, planes); break;
    }
  }
}

void augment_views(py::array_t<uint8_t, py::array::c_style> buffer, py::array_t<int64_t, py::array::c_style> offsets,
                   py::array_t<int64_t, py::array::c_style> widths, py::buffer rows, uintptr_t out, int size,
                   int output, bool channels_last, std::array<float, 3> scale, std::array<float, 3> shift,
                   float solarize_threshold, int gaussian_taps, int threads) {
  const py::buffer_info table = rows.request();
  if (table.itemsize != sizeof(ViewRow) || table.ndim != 1 || (table.size > 1 && table.strides[0] != table.itemsize)) {
    throw py::type_error("rows must be a contiguous array of VIEW_DTYPE");
  }
  const Job job{buffer.data(), offsets.data(), widths.data(), static_cast<const ViewRow*>(table.ptr),
                reinterpret_cast<void*>(out), size, static_cast<Output>(output), channels_last, scale, shift,
                solarize_threshold, gaussian_taps};
  py::gil_scoped_release release;
  parallel_for(table.size, 1, threads, [&job](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    make_views(job, scratch, begin, end);
  });
}

}  // namespace

void bind_augment_views(py::module_& m) {
  m.def("augment_views", &augment_views, py::arg("buffer"), py::arg("offsets"), py::arg("widths"), py::arg("rows"),
        py::arg("out"), py::arg("size"), py::arg("output"), py::arg("channels_last"), py::arg("scale"),
        py::arg("shift"), py::arg("solarize_threshold"), py::arg("gaussian_taps"), py::arg("threads"));
}

}  // namespace scrl_fast::host
