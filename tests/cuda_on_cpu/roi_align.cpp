// Runs the kernels of csrc/cuda/roi_align_*.h on numbers from a file; tests/test_cuda_on_cpu.py writes and reads them.
#include <cstring>
#include <fstream>
#include <string>

#include "cuda/roi_align_backward.h"
#include "cuda/roi_align_tile.h"

namespace scrl::roi {
uint4 tile_memory[48 * 1024 / sizeof(uint4)];

namespace {
using cuda_on_cpu::launch;

struct Case {  // as test_cuda_on_cpu.py packs it
  int64_t packs, backward, aligned, sampling_ratio, images, channels, height, width, count, pooled_height, pooled_width;
  int64_t stride[4], map_elements;
  double scale;
};

template <class T>
std::vector<T> read(std::istream& in, int64_t count) {
  std::vector<T> values(count);
  in.read(reinterpret_cast<char*>(values.data()), count * sizeof(T));
  return values;
}

template <class T, int V, class R>
void forward(const std::string& kernel, const T* map, const Strides& stride, const Workspace<R>& w, T* out,
             const Sizes& s) {
  if (kernel == "pool") return launch(pool_blocks<V>(s), kWarp * kWarps, [&] { pool<T, V>(map, stride, w, out, s); });
  if (kernel == "staged")
    return launch(pool_staged_blocks<V>(s), kWarp * kWarps, [&] { pool_staged<T, V>(map, stride, w, out, s); });
  if (kernel == "planes")
    return launch(pool_planes_blocks(s), kWarp * kWarps, [&] { pool_planes<T>(map, stride, w, out, s); });
  if (stride.channel == 1)
    launch(pool_tile_blocks<V>(s), kWarp * kTileWarps, [&] { pool_tile<T, V, false>(map, stride, w, out, s); });
  else
    launch(pool_tile_blocks<V>(s), kWarp * kTileWarps, [&] { pool_tile<T, V, true>(map, stride, w, out, s); });
}

template <class T, int V, class R>
void backward(const std::string& kernel, const T* grad, const Strides& stride, const Workspace<R>& w, T* out,
              const Sizes& s) {
  if (kernel == "pool" || kernel == "staged") {
    Reach reach{nullptr, nullptr, Reach::words_of(s)};
    std::vector<unsigned> rows(s.height * reach.words, ~0u), columns(Reach::tiles_of(s) * reach.words, ~0u);
    reach.rows = rows.data(), reach.columns = columns.data();
    launch(mark_reach_blocks(s), kWarp * kWarps, [&] { mark_reach<R>(w, reach, s); });
    launch(pool_backward_blocks<V>(s), kWarp * kWarps, [&] { pool_backward<T, V>(grad, w, reach, out, stride, s); });
  } else if (stride.channel == 1)
    launch(pool_tile_backward_blocks<V>(s), kWarp * kTileWarps,
           [&] { pool_tile_backward<T, V, false>(grad, w, out, stride, s, bins_in_table<T, V, false>(s)); });
  else
    launch(pool_tile_backward_blocks<V>(s), kWarp * kTileWarps,
           [&] { pool_tile_backward<T, V, true>(grad, w, out, stride, s, bins_in_table<T, V, true>(s)); });
}

// Every array has its own memory, so that the sanitizer sees where it ends.
template <class T>
void run(const std::string& kernel, const Case& c, std::istream& in, std::ostream& result) {
  using R = accumulate_t<T>;
  const Sizes s{static_cast<int>(c.count),       static_cast<int>(c.images), static_cast<int>(c.channels),
                static_cast<int>(c.height),      static_cast<int>(c.width),  static_cast<int>(c.pooled_height),
                static_cast<int>(c.pooled_width)};
  const Strides stride{c.stride[0], c.stride[1], c.stride[2], c.stride[3]};
  const auto boxes = read<R>(in, c.count * 5);
  const int64_t pooled = c.count * c.channels * c.pooled_height * c.pooled_width;
  const auto from = read<T>(in, c.backward ? pooled : c.map_elements);
  std::vector<T> to(c.backward ? c.map_elements : pooled);
  std::memset(to.data(), 0xff, to.size() * sizeof(T));  // NaN

  Workspace<R> w{{nullptr, nullptr, s.height, s.pooled_height}, {nullptr, nullptr, s.width, s.pooled_width}};
  std::vector<R> y(c.count * w.y.strip_length(), NAN), x(c.count * w.x.strip_length(), NAN);
  std::vector<Bin> y_bins(c.count * c.pooled_height), x_bins(c.count * c.pooled_width);
  std::vector<int> image(c.count), order(c.count, -1), first(c.images + 1);
  int unsorted = 0;
  w.y.strips = y.data(), w.x.strips = x.data(), w.y.bins = y_bins.data(), w.x.bins = x_bins.data();
  w.image = image.data(), w.order = order.data(), w.first = first.data(), w.unsorted = &unsorted;
  launch(box_weights_blocks(s, 128), 128,
         [&] { box_weights<R>(boxes.data(), w, s, static_cast<R>(c.scale), c.sampling_ratio, c.aligned != 0); });
  launch(take_order_blocks(s, 128), 128, [&] { take_order<R>(w, s.images, s.count); });
  if (s.count > 0) launch(c.images + 1, kWarp * kWarps, [&] { group_by_image<R>(w, s.images, s.count); });
  std::memset(tile_memory, 0xff, sizeof(tile_memory));
  constexpr int V = kPack<T>;
  if (c.backward)
    c.packs ? backward<T, V>(kernel, from.data(), stride, w, to.data(), s)
            : backward<T, 1>(kernel, from.data(), stride, w, to.data(), s);
  else
    c.packs ? forward<T, V>(kernel, from.data(), stride, w, to.data(), s)
            : forward<T, 1>(kernel, from.data(), stride, w, to.data(), s);
  result.write(reinterpret_cast<const char*>(to.data()), to.size() * sizeof(T));
}
}  // namespace
}  // namespace scrl::roi

// Arguments: dtype, kernel, input file, output file.
int main(int, char** arguments) {
  const std::string dtype = arguments[1], kernel = arguments[2];
  std::ifstream in(arguments[3], std::ios::binary);
  std::ofstream out(arguments[4], std::ios::binary);
  scrl::roi::Case c;
  in.read(reinterpret_cast<char*>(&c), sizeof(c));
  if (dtype == "float32") scrl::roi::run<float>(kernel, c, in, out);
  if (dtype == "float64") scrl::roi::run<double>(kernel, c, in, out);
  if (dtype == "bfloat16") scrl::roi::run<__nv_bfloat16>(kernel, c, in, out);  // float16 differs in rounding only
  return out.good() ? 0 : 1;
}
