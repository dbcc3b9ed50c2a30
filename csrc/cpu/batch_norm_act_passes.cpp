#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/batch_norm_act.h"
#include "cpu/simd.h"

namespace scrl::norm {
namespace {

// y = (x - mean) * scale + bias. The mean is taken off first: a mean far from zero would cost digits in
// x * scale + (bias - mean * scale). Forward and backward share this line, so that both see the same ReLU.
template <class Vector>
SCRL_INLINE Vector normalized(const Vector& x, const Vector& mean, const Vector& scale, const Vector& bias) {
  return (x - mean) * scale + bias;
}

// The walk of one pass, from the first channel of a row to its last. Body::step<rows, tail>(place, channel, count) does
// `rows` rows at one vector of channels. Short rows go four at a time, so that values a channel are loaded once for
// them. Long rows go one by one: four at a time take twice as long from 128 float32 channels on, since the processor's
// prefetcher then has four streams to follow.
constexpr int64_t kShortRow = 128;

template <class Body, int64_t L>
SCRL_INLINE void walk(const Body& body, int64_t first, int64_t last, int64_t channels) {
  const int64_t whole = channels / L * L, rest = channels - whole;
  int64_t row = first;
  for (; channels < kShortRow && row + 4 <= last; row += 4) {
    for (int64_t c = 0; c < whole; c += L) body.template step<4, false>(row * channels + c, c, L);
    if (rest) body.template step<4, true>(row * channels + whole, whole, rest);
  }
  for (; row < last; ++row) {
    for (int64_t c = 0; c < whole; c += L) body.template step<1, false>(row * channels + c, c, L);
    if (rest) body.template step<1, true>(row * channels + whole, whole, rest);
  }
}

template <class Storage, int Bytes>
struct Access {
  using Lanes = Simd<Storage, Bytes>;
  using Number = typename Lanes::Number;
  using Vector = typename Lanes::Vector;

  template <bool tail>
  static SCRL_INLINE void load(Vector& to, const Storage* from, int64_t count) {
    if constexpr (tail)
      to = Lanes::load_tail(from, count);
    else
      to = Lanes::load(from);
  }
  template <bool tail>
  static SCRL_INLINE void store(Storage* to, const Vector& value, int64_t count) {
    if constexpr (tail)
      Lanes::store_tail(to, value, count);
    else
      Lanes::store(to, value);
  }
  static SCRL_INLINE void get(Vector& to, const void* values, int64_t channel) {
    std::memcpy(&to, static_cast<const Number*>(values) + channel, sizeof(to));
  }
  static SCRL_INLINE void put(void* values, int64_t channel, const Vector& value) {
    std::memcpy(static_cast<Number*>(values) + channel, &value, sizeof(value));
  }
};

// Adds up two values of each element over rows: in pairs within a group of four, group after group.
template <class Vector, int rows>
SCRL_INLINE void add_up(Vector& sum, const Vector* each) {
  if constexpr (rows == 4)
    sum += (each[0] + each[1]) + (each[2] + each[3]);
  else
    sum += each[0];
}

template <class Storage>
struct Statistics {
  template <int Bytes>
  struct Sums {
    using A = Access<Storage, Bytes>;
    using Vector = typename A::Vector;
    const Storage* input;
    const void* shift;
    void *sum, *square;
    int64_t channels;

    template <int rows, bool tail>
    SCRL_INLINE void step(int64_t place, int64_t c, int64_t count) const {
      Vector s, q, m, d[rows], dd[rows];
      A::get(s, sum, c), A::get(q, square, c), A::get(m, shift, c);
      for (int k = 0; k < rows; ++k) {
        A::template load<tail>(d[k], input + place + k * channels, count);
        d[k] -= m;
        dd[k] = d[k] * d[k];
      }
      add_up<Vector, rows>(s, d), add_up<Vector, rows>(q, dd);
      A::put(sum, c, s), A::put(square, c, q);
    }
  };

  // Sums are taken about the mean of the block's first rows, since a sum of squares about zero would lose the digits
  // of a variance that is small beside the mean.
  template <int Bytes>
  static SCRL_INLINE void run(const Pass& p, int64_t first_block, int64_t last_block) {
    using Number = typename Access<Storage, Bytes>::Number;
    std::vector<Number> memory(3 * p.padded);
    Number *shift = memory.data(), *sum = shift + p.padded, *square = sum + p.padded;
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t first = block * p.rows_a_block, last = std::min(p.rows, first + p.rows_a_block);
      const int64_t few = std::min<int64_t>(8, last - first);
      std::fill(memory.begin(), memory.end(), Number(0));
      Sums<Bytes> look{static_cast<const Storage*>(p.input), sum, shift, square, p.channels};  // shift is still zero
      look.shift = sum, look.sum = shift;
      walk<Sums<Bytes>, Access<Storage, Bytes>::Lanes::lanes>(look, first, first + few, p.channels);
      for (int64_t c = 0; c < p.padded; ++c) shift[c] /= few, square[c] = 0;
      Sums<Bytes> sums{static_cast<const Storage*>(p.input), shift, sum, square, p.channels};
      walk<Sums<Bytes>, Access<Storage, Bytes>::Lanes::lanes>(sums, first, last, p.channels);
      Number* mean = static_cast<Number*>(p.partials) + 2 * block * p.padded;
      Number* deviations = mean + p.padded;
      const Number rows = static_cast<Number>(last - first);
      for (int64_t c = 0; c < p.padded; ++c) {
        mean[c] = shift[c] + sum[c] / rows;
        const Number m2 = square[c] - sum[c] * (sum[c] / rows);
        deviations[c] = m2 < 0 ? Number(0) : m2;  // NaN stays
      }
    }
  }
};

template <class Storage, bool relu, bool residual>
struct ApplyRows {
  template <int Bytes>
  struct Body {
    using A = Access<Storage, Bytes>;
    using Vector = typename A::Vector;
    const Storage *input, *other;
    Storage* result;
    const void *means, *scales, *biases;
    int64_t channels;
    explicit SCRL_INLINE Body(const Pass& p)
        : input(static_cast<const Storage*>(p.input)),
          other(static_cast<const Storage*>(p.residual)),
          result(static_cast<Storage*>(p.result)),
          means(p.mean),
          scales(p.scale),
          biases(p.bias),
          channels(p.channels) {}

    template <int rows, bool tail>
    SCRL_INLINE void step(int64_t place, int64_t c, int64_t count) const {
      Vector mean, scale, bias;
      A::get(mean, means, c), A::get(scale, scales, c), A::get(bias, biases, c);
      for (int k = 0; k < rows; ++k) {
        const int64_t at = place + k * channels;
        Vector y;
        A::template load<tail>(y, input + at, count);
        y = normalized(y, mean, scale, bias);
        if constexpr (residual) {
          Vector z;
          A::template load<tail>(z, other + at, count);
          y += z;
        }
        if constexpr (relu) y = y < Vector{} ? Vector{} : y;  // NaN passes through
        A::template store<tail>(result + at, y, count);
      }
    }
  };
};

template <class Storage, bool relu, bool masked_by_output, bool write>
struct SumRows {
  template <int Bytes>
  struct Body {
    using A = Access<Storage, Bytes>;
    using Vector = typename A::Vector;
    const Storage *input, *output, *grad;
    Storage* result;
    const void *means, *scales, *biases;
    void *sum, *cross;
    int64_t channels;
    SCRL_INLINE Body(const Pass& p, void* sum, void* cross)
        : input(static_cast<const Storage*>(p.input)),
          output(static_cast<const Storage*>(p.output)),
          grad(static_cast<const Storage*>(p.grad)),
          result(static_cast<Storage*>(p.result)),
          means(p.mean),
          scales(p.scale),
          biases(p.bias),
          sum(sum),
          cross(cross),
          channels(p.channels) {}

    template <int rows, bool tail>
    SCRL_INLINE void step(int64_t place, int64_t c, int64_t count) const {
      Vector mean, scale, bias, s, q, dy[rows], cc[rows];
      A::get(mean, means, c), A::get(s, sum, c), A::get(q, cross, c);
      if constexpr (relu && !masked_by_output) A::get(scale, scales, c), A::get(bias, biases, c);
      for (int k = 0; k < rows; ++k) {
        const int64_t at = place + k * channels;
        Vector x;
        A::template load<tail>(x, input + at, count);
        A::template load<tail>(dy[k], grad + at, count);
        if constexpr (relu) {
          Vector y;
          if constexpr (masked_by_output)
            A::template load<tail>(y, output + at, count);
          else
            y = normalized(x, mean, scale, bias);
          dy[k] = y <= Vector{} ? Vector{} : dy[k];
        }
        if constexpr (write) A::template store<tail>(result + at, dy[k], count);
        cc[k] = dy[k] * (x - mean);
      }
      add_up<Vector, rows>(s, dy), add_up<Vector, rows>(q, cc);
      A::put(sum, c, s), A::put(cross, c, q);
    }
  };
};

template <class Storage, bool relu>
struct BackwardRows {
  template <int Bytes>
  struct Body {
    using A = Access<Storage, Bytes>;
    using Vector = typename A::Vector;
    const Storage *input, *grad;
    Storage* result;
    const void *means, *scales, *biases, *slopes, *offsets;
    int64_t channels;
    explicit SCRL_INLINE Body(const Pass& p)
        : input(static_cast<const Storage*>(p.input)),
          grad(static_cast<const Storage*>(p.grad)),
          result(static_cast<Storage*>(p.result)),
          means(p.mean),
          scales(p.scale),
          biases(p.bias),
          slopes(p.slope),
          offsets(p.offset),
          channels(p.channels) {}

    template <int rows, bool tail>
    SCRL_INLINE void step(int64_t place, int64_t c, int64_t count) const {
      Vector mean, scale, bias, slope, offset;
      A::get(mean, means, c), A::get(scale, scales, c), A::get(slope, slopes, c), A::get(offset, offsets, c);
      if constexpr (relu) A::get(bias, biases, c);
      for (int k = 0; k < rows; ++k) {
        const int64_t at = place + k * channels;
        Vector x, dy;
        A::template load<tail>(x, input + at, count);
        A::template load<tail>(dy, grad + at, count);
        if constexpr (relu) dy = normalized(x, mean, scale, bias) <= Vector{} ? Vector{} : dy;
        dy = dy * scale - (x - mean) * slope - offset;
        A::template store<tail>(result + at, dy, count);
      }
    }
  };
};

// Blocks from the last to the first: the pass before went the other way, and the last blocks are still in the caches.
template <class Storage, int Bytes, class Body>
SCRL_INLINE void backwards(const Pass& p, int64_t first_block, int64_t last_block) {
  const Body body(p);
  for (int64_t block = last_block; block-- > first_block;) {
    const int64_t first = block * p.rows_a_block, last = std::min(p.rows, first + p.rows_a_block);
    walk<Body, Simd<Storage, Bytes>::lanes>(body, first, last, p.channels);
  }
}

template <class Storage>
struct Apply {
  template <int Bytes>
  static SCRL_INLINE void run(const Pass& p, int64_t first, int64_t last) {
    if (p.relu && p.residual)
      backwards<Storage, Bytes, typename ApplyRows<Storage, true, true>::template Body<Bytes>>(p, first, last);
    else if (p.relu)
      backwards<Storage, Bytes, typename ApplyRows<Storage, true, false>::template Body<Bytes>>(p, first, last);
    else if (p.residual)
      backwards<Storage, Bytes, typename ApplyRows<Storage, false, true>::template Body<Bytes>>(p, first, last);
    else
      backwards<Storage, Bytes, typename ApplyRows<Storage, false, false>::template Body<Bytes>>(p, first, last);
  }
};

template <class Storage>
struct BackwardSums {
  template <int Bytes, class Body>
  static SCRL_INLINE void blocks(const Pass& p, int64_t first_block, int64_t last_block) {
    using Number = typename Access<Storage, Bytes>::Number;
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t first = block * p.rows_a_block, last = std::min(p.rows, first + p.rows_a_block);
      Number* sum = static_cast<Number*>(p.partials) + 2 * block * p.padded;
      std::fill(sum, sum + 2 * p.padded, Number(0));
      const Body body(p, sum, sum + p.padded);
      walk<Body, Simd<Storage, Bytes>::lanes>(body, first, last, p.channels);
    }
  }

  template <int Bytes>
  static SCRL_INLINE void run(const Pass& p, int64_t first, int64_t last) {
    const bool write = p.result != nullptr;
    if (!p.relu)
      blocks<Bytes, typename SumRows<Storage, false, false, false>::template Body<Bytes>>(p, first, last);
    else if (!p.output && !write)
      blocks<Bytes, typename SumRows<Storage, true, false, false>::template Body<Bytes>>(p, first, last);
    else if (p.output && write)
      blocks<Bytes, typename SumRows<Storage, true, true, true>::template Body<Bytes>>(p, first, last);
  }
};

template <class Storage>
struct Backward {
  template <int Bytes>
  static SCRL_INLINE void run(const Pass& p, int64_t first, int64_t last) {
    if (p.relu)
      backwards<Storage, Bytes, typename BackwardRows<Storage, true>::template Body<Bytes>>(p, first, last);
    else
      backwards<Storage, Bytes, typename BackwardRows<Storage, false>::template Body<Bytes>>(p, first, last);
  }
};
}  // namespace

#define SCRL_ALL_DTYPES(name, pass)                                                                        \
  SCRL_WIDEST(name##_float, (const Pass& p, int64_t first, int64_t last), (p, first, last), pass<float>)   \
  SCRL_WIDEST(name##_double, (const Pass& p, int64_t first, int64_t last), (p, first, last), pass<double>) \
  SCRL_WIDEST(name##_bf16, (const Pass& p, int64_t first, int64_t last), (p, first, last), pass<bf16>)     \
  SCRL_WIDEST(name##_f16, (const Pass& p, int64_t first, int64_t last), (p, first, last), pass<f16>)       \
  Run name##_of(ScalarType dtype) {                                                                        \
    switch (dtype) {                                                                                       \
      case ScalarType::Float:                                                                              \
        return name##_float;                                                                               \
      case ScalarType::Double:                                                                             \
        return name##_double;                                                                              \
      case ScalarType::BFloat16:                                                                           \
        return name##_bf16;                                                                                \
      case ScalarType::Half:                                                                               \
        return name##_f16;                                                                                 \
      default:                                                                                             \
        STD_TORCH_CHECK(false, "batch_norm_act: dtype must be float32, float64, bfloat16 or float16");     \
    }                                                                                                      \
  }

SCRL_ALL_DTYPES(statistics, Statistics)
SCRL_ALL_DTYPES(apply, Apply)
SCRL_ALL_DTYPES(backward_sums, BackwardSums)
SCRL_ALL_DTYPES(backward, Backward)

}  // namespace scrl::norm
