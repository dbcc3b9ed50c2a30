// augment_views: a table row and a decoded picture in, a normalised view out. One view is one piece of work; everything
// between the picture and the result stays in the scratch memory of the thread that makes it, as planes of bytes.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "host/parallel.h"
#include "host/photometric.h"
#include "host/resample.h"
#include "host/view.h"
#include "host/view_format.h"

namespace py = pybind11;

namespace scrl_fast::host {
namespace {

struct Job {
  const uint8_t* buffer;            // [bytes]
  const int64_t *offsets, *widths;  // [images]
  const ViewRow* rows;              // [views]
  uint8_t* out;                     // [views, 3, size, size], views out_step bytes apart
  int64_t out_step;                 // bytes from one view to the next
  int size;
  Format format;
  bool channels_last;
  Normalization normalization;
  int solarize_threshold, gaussian_taps;
};

template <int L, int step>
SCRL_INLINE void resize(const Source& source, const Shape& to, Scratch& s, uint8_t* out) {
  const int64_t plane = static_cast<int64_t>(std::max(source.height, L)) * to.pitch;
  uint8_t* narrow = at_least(s.narrow, step * plane);
  filter_along<L, step>(source, s.along, to.pitch, s, LevelSink{narrow, plane, to.pitch});
  for (int c = 0; c < step; ++c) {
    filter_down<L>(LevelRows{narrow + c * plane, to.pitch}, s.down, to.pitch, s, out + c * to.plane);
  }
}

// Planes of one side become planes of another.
template <int L>
SCRL_INLINE void resize_planes(const uint8_t* in, const Shape& from, const Shape& to, int channels, Scratch& s,
                               uint8_t* out) {
  bicubic_axis(from.size, to.size, s.along);
  s.down = s.along;
  for (int c = 0; c < channels; ++c) {
    resize<L, 1>({in + c * from.plane, from.pitch, from.size, from.size}, to, s, out + c * to.plane);
  }
}

template <int L>
SCRL_INLINE void resize_blur(const Shape& shape, int channels, float factor, Scratch& s, uint8_t* picture) {
  const Shape small(std::max(1, static_cast<int>(shape.size / static_cast<double>(factor) + 1e-3)));
  uint8_t* shrunk = at_least(s.shrunk, channels * small.plane);
  resize_planes<L>(picture, shape, small, channels, s, shrunk);
  resize_planes<L>(shrunk, small, shape, channels, s, picture);
}

// torchvision's Gaussian blur rounds once, so what comes out of the rows stays in floats.
template <int L>
SCRL_INLINE void gaussian_blur(const Shape& shape, int channels, int taps, float sigma, Scratch& s, uint8_t* picture) {
  gaussian_axis(shape.size, std::min(taps, 2 * shape.size - 1), sigma, s.along);
  const int pitch = round_up(shape.pitch, 4 * L);
  float* unrounded = at_least(s.unrounded, static_cast<int64_t>(std::max(shape.size, L)) * pitch);
  for (int c = 0; c < channels; ++c) {
    uint8_t* plane = picture + c * shape.plane;
    const FloatSink sink{unrounded, pitch};
    filter_along<L, 1>({plane, shape.pitch, shape.size, shape.size}, s.along, shape.pitch, s, sink);
    filter_down<L>(sink, s.along, shape.pitch, s, plane);
  }
}

template <int L, Format format, bool channels_last>
SCRL_INLINE void write_view(const Job& job, const Shape& shape, const uint8_t* const (&planes)[3], uint8_t* out) {
  const int64_t pixels = static_cast<int64_t>(shape.size) * shape.size, plane = pixels * element_bytes(format);
  const bool dense = shape.pitch == shape.size;
  const int64_t count = dense ? pixels : shape.size, step = count * element_bytes(format) * (channels_last ? 3 : 1);
  for (int64_t run = 0; run < (dense ? 1 : shape.size); ++run) {
    const uint8_t* const rows[] = {planes[0] + run * shape.pitch, planes[1] + run * shape.pitch,
                                   planes[2] + run * shape.pitch};
    format_run<L, format, channels_last>(rows, count, job.normalization, out + run * step, plane);
  }
}

template <int L, Format format>
SCRL_INLINE void write_view(const Job& job, const Shape& shape, const uint8_t* const (&planes)[3], int64_t view) {
  uint8_t* out = job.out + view * job.out_step;
  if (job.channels_last) {
    write_view<L, format, true>(job, shape, planes, out);
  } else {
    write_view<L, format, false>(job, shape, planes, out);
  }
}

template <int L>
SCRL_INLINE void make_view(const Job& job, int64_t view, Scratch& s) {
  const ViewRow& row = job.rows[view];
  const Shape shape(job.size);
  uint8_t* picture = at_least(s.picture, 3 * shape.plane);
  for (int c = 0; c < 3; ++c) {
    const int64_t used = static_cast<int64_t>(shape.size) * shape.pitch;
    std::memset(picture + c * shape.plane + used, 0, shape.plane - used);
  }
  bicubic_axis(row.w, job.size, s.along);
  bicubic_axis(row.h, job.size, s.down);
  if (row.flip) s.along.mirror();
  const int64_t stride = job.widths[row.image] * 3;
  const uint8_t* corner = job.buffer + job.offsets[row.image] + row.y * stride + row.x * 3;
  resize<L, 3>({corner, stride, row.h, row.w}, shape, s, picture);

  const Steps steps(row);
  colour<L>(steps, shape, picture);
  const int channels = row.grayscale ? 1 : 3;  // the planes of a grey picture are equal: one is blurred and written
  if (row.blur == kResizeBlur) resize_blur<L>(shape, channels, row.blur_amount, s, picture);
  if (row.blur == kGaussianBlur) gaussian_blur<L>(shape, channels, job.gaussian_taps, row.blur_amount, s, picture);
  if (row.solarize) solarize(picture, channels * shape.plane, job.solarize_threshold);

  const int64_t next = channels == 1 ? 0 : shape.plane;
  const uint8_t* const planes[] = {picture, picture + next, picture + 2 * next};
  switch (job.format) {
    case kFloat32:
      write_view<L, kFloat32>(job, shape, planes, view);
      break;
    case kBFloat16:
      write_view<L, kBFloat16>(job, shape, planes, view);
      break;
    case kFloat16:
      write_view<L, kFloat16>(job, shape, planes, view);
      break;
    case kUint8:
      write_view<L, kUint8>(job, shape, planes, view);
      break;
  }
}

// As many lanes as the widest register holds.
struct Views {
  template <int Bytes>
  static SCRL_INLINE void run(const Job& job, int64_t view, Scratch& s) {
    make_view<Bytes / 4>(job, view, s);
  }
};
SCRL_WIDEST(make_view, (const Job& job, int64_t view, Scratch& s), (job, view, s), Views)

constexpr int kLargestSize = 1 << 14;  // of a view: its pixels are counted in 32 bits
constexpr int kLargestCrop = 1 << 24;  // a side: so are the places of its pixels in lanes (host/resample.h)

// Whether the crop's last pixel lies in the buffer, with sizes that no product of them overflows.
bool inside(const ViewRow& row, int64_t offset, int64_t width, int64_t bytes) {
  if (row.y < 0 || row.x < 0 || row.h < 1 || row.w < 1 || row.h > kLargestCrop || row.w > kLargestCrop) return false;
  if (offset < 0 || offset > bytes || width > bytes / 3 || int64_t{row.x} + row.w > width) return false;
  const int64_t before = (bytes - offset) / 3 - row.x - row.w;  // pixels before the crop's last row, at most
  return before >= 0 && int64_t{row.y} + row.h - 1 <= before / width;
}

void augment_views(py::array_t<uint8_t, py::array::c_style> buffer, py::array_t<int64_t, py::array::c_style> offsets,
                   py::array_t<int64_t, py::array::c_style> widths, py::buffer rows, uintptr_t out, int64_t out_step,
                   int size, int format, bool channels_last, std::array<float, 3> scale, std::array<float, 3> shift,
                   int solarize_threshold, int gaussian_taps, int threads) {
  const py::buffer_info table = rows.request();
  if (table.itemsize != sizeof(ViewRow) || table.ndim != 1 || (table.size > 1 && table.strides[0] != table.itemsize)) {
    throw py::type_error("rows must be a contiguous array of VIEW_DTYPE");
  }
  if (size < 1 || size > kLargestSize) throw py::value_error("size must lie in 1.." + std::to_string(kLargestSize));
  if (format < kFloat32 || format > kUint8) throw py::value_error("format is none of the four");
  if (offsets.ndim() != 1 || widths.ndim() != 1 || offsets.size() != widths.size()) {
    throw py::value_error("offsets and widths must be of one length");
  }
  for (int64_t view = 0; view < table.size; ++view) {
    const ViewRow& row = static_cast<const ViewRow*>(table.ptr)[view];
    if (row.image < 0 || row.image >= offsets.size() ||
        !inside(row, offsets.data()[row.image], widths.data()[row.image], buffer.size())) {
      throw py::value_error("table row " + std::to_string(view) + ": the crop lies outside its image");
    }
    if (row.blur == kResizeBlur ? !(row.blur_amount >= 1) : row.blur == kGaussianBlur && !(row.blur_amount > 0)) {
      throw py::value_error("table row " + std::to_string(view) + ": blur_amount is out of range");
    }
  }
  const Job job{buffer.data(),
                offsets.data(),
                widths.data(),
                static_cast<const ViewRow*>(table.ptr),
                reinterpret_cast<uint8_t*>(out),
                out_step,
                size,
                static_cast<Format>(format),
                channels_last,
                {scale, shift},
                solarize_threshold,
                gaussian_taps};
  py::gil_scoped_release release;
  parallel_for(table.size, 1, threads, [&job](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    Scratch* volatile mine = &scratch;  // found once: compilers know the address of a thread's variable by a call only
    for (int64_t view = begin; view < end; ++view) make_view(job, view, *mine);
    streamed();
  });
}

}  // namespace

void bind_augment_views(py::module_& m) {
  m.def("augment_views", &augment_views, py::arg("buffer"), py::arg("offsets"), py::arg("widths"), py::arg("rows"),
        py::arg("out"), py::arg("out_step"), py::arg("size"), py::arg("format"), py::arg("channels_last"),
        py::arg("scale"), py::arg("shift"), py::arg("solarize_threshold"), py::arg("gaussian_taps"),
        py::arg("threads"));
}

}  // namespace scrl_fast::host
