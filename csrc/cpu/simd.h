// Vectors of the compiler, read from and written to any of the tensor dtypes.
//
// Simd<Storage, Bytes> holds float, or double for double storage. It serves two kinds of loops:
//  - as wide as the processor has it: a template over Bytes, for SCRL_WIDEST (cpu/vectorize.h). One fixed width for all
//    would be simpler, but gcc keeps vectors wider than the processor's in memory: RoIAlign is 4 to 8 times slower
//    then.
//  - FixedSimd, 64 bytes everywhere, for SCRL_MULTIVERSION: sums add up in the same order on every processor.
// Vectors, not intrinsics: the same source becomes AVX-512, AVX2, SSE or NEON. Conversions from and to the 16-bit
// dtypes are integer arithmetic, rounding to nearest even, so that they need no instruction beyond the baseline.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/vectorize.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // everything here is inlined: there is no call whose ABI could change
#endif

namespace scrl {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class Storage>
using accumulate_t = std::conditional_t<std::is_same_v<Storage, double>, double, float>;

template <class To, class From>
SCRL_INLINE To bit_copy(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// Vectors of one number of lanes: 32 bits each in so many bytes, 16 bits each in half of them.
template <size_t Bytes>
struct LanesOf {
  typedef float Floats __attribute__((vector_size(Bytes)));
  typedef uint32_t Words __attribute__((vector_size(Bytes)));
  typedef uint16_t Halves __attribute__((vector_size(Bytes / 2)));
};

template <class Halves>
SCRL_INLINE typename LanesOf<2 * sizeof(Halves)>::Floats widen(Halves bits, bf16) {
  using Lanes = LanesOf<2 * sizeof(Halves)>;
  return bit_copy<typename Lanes::Floats>(__builtin_convertvector(bits, typename Lanes::Words) << 16);
}

template <class Halves>
SCRL_INLINE typename LanesOf<2 * sizeof(Halves)>::Floats widen(Halves bits, f16) {
  using Words = typename LanesOf<2 * sizeof(Halves)>::Words;
  using Floats = typename LanesOf<2 * sizeof(Halves)>::Floats;
  Words half = __builtin_convertvector(bits, Words);
  Words exponent = half & 0x7c00u;
  Words magnitude = ((half & 0x7fffu) << 13) + (112u << 23);               // exponent bias 15 -> 127
  magnitude = exponent == 0x7c00u ? magnitude + (112u << 23) : magnitude;  // inf and NaN
  Floats subnormal = bit_copy<Floats>(magnitude + (1u << 23)) - 0x1p-14f;  // exact, without float32 subnormals
  magnitude = exponent == 0u ? bit_copy<Words>(subnormal) : magnitude;
  return bit_copy<Floats>(magnitude | ((half & 0x8000u) << 16));
}

template <class Floats>
SCRL_INLINE typename LanesOf<sizeof(Floats)>::Halves narrow(Floats value, bf16) {
  using Words = typename LanesOf<sizeof(Floats)>::Words;
  using Halves = typename LanesOf<sizeof(Floats)>::Halves;
  Words bits = bit_copy<Words>(value);
  Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  Words nan = (bits >> 16) | 0x40u;
  return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded, Halves);
}

template <class Floats>
SCRL_INLINE typename LanesOf<sizeof(Floats)>::Halves narrow(Floats value, f16) {
  using Words = typename LanesOf<sizeof(Floats)>::Words;
  using Halves = typename LanesOf<sizeof(Floats)>::Halves;
  constexpr uint32_t shift_subnormal = 126u << 23;  // 0.5: adding it moves a subnormal's bits to the bottom, rounded
  Words bits = bit_copy<Words>(value);
  Words magnitude = bits & 0x7fffffffu;
  Words normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  Floats moved = bit_copy<Floats>(magnitude) + 0.5f;
  Words subnormal = bit_copy<Words>(moved) - shift_subnormal;
  Words half = magnitude < (113u << 23) ? subnormal : normal;
  Words special = magnitude > 0x7f800000u ? Words{} + 0x7e00u : Words{} + 0x7c00u;
  half = magnitude >= (143u << 23) ? special : half;  // 65536 and above; 65520..65535 round up to infinity by carry
  return __builtin_convertvector(half | ((bits >> 16) & 0x8000u), Halves);
}

// One vector of accumulators: float, or double for double storage.
template <class Storage, int Bytes>
struct Simd {
  using Number = accumulate_t<Storage>;
  typedef Number Vector __attribute__((vector_size(Bytes)));
  using Halves = typename LanesOf<Bytes>::Halves;
  static constexpr int64_t lanes = Bytes / sizeof(Number);

  static SCRL_INLINE Vector load(const Storage* from) {  // memcpy of a whole vector is one unaligned move
    if constexpr (sizeof(Storage) == 2) {
      Halves bits;
      std::memcpy(&bits, from, sizeof(bits));
      return widen(bits, Storage{});
    } else {
      Vector value;
      std::memcpy(&value, from, sizeof(value));
      return value;
    }
  }

  static SCRL_INLINE void store(Storage* to, Vector value) {
    if constexpr (sizeof(Storage) == 2) {
      const Halves bits = narrow(value, Storage{});
      std::memcpy(to, &bits, sizeof(bits));
    } else {
      std::memcpy(to, &value, sizeof(value));
    }
  }

  // count < lanes elements; the lanes behind them are zero
  static SCRL_INLINE Vector load_tail(const Storage* from, int64_t count) {
    Storage padded[lanes] = {};
    for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
    return load(padded);
  }

  static SCRL_INLINE void store_tail(Storage* to, Vector value, int64_t count) {
    Storage padded[lanes];
    store(padded, value);
    for (int64_t i = 0; i < count; ++i) to[i] = padded[i];
  }
};

// Sixteen float32, or eight float64, lanes.
template <class Storage>
using FixedSimd = Simd<Storage, 64>;

// Sum of all lanes, halves added to halves: the same tree everywhere.
SCRL_INLINE float horizontal_sum(FixedSimd<float>::Vector value) {
  using f32x8 = float __attribute__((vector_size(32)));
  using f32x4 = float __attribute__((vector_size(16)));
  f32x8 eight[2];
  std::memcpy(eight, &value, sizeof(value));
  eight[0] += eight[1];
  f32x4 four[2];
  std::memcpy(four, &eight[0], sizeof(four));
  four[0] += four[1];
  return (four[0][0] + four[0][2]) + (four[0][1] + four[0][3]);
}

SCRL_INLINE double horizontal_sum(FixedSimd<double>::Vector value) {
  using f64x4 = double __attribute__((vector_size(32)));
  f64x4 four[2];
  std::memcpy(four, &value, sizeof(value));
  four[0] += four[1];
  return (four[0][0] + four[0][2]) + (four[0][1] + four[0][3]);
}

}  // namespace scrl
