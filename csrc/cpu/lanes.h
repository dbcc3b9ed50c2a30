// Sixteen float32 (or eight float64) lanes, read from and written to any of the tensor dtypes.
//
// Vectors of the compiler, not intrinsics: the same source becomes AVX-512, AVX2, SSE or NEON, inside whichever
// SCRL_MULTIVERSION clone calls it, and adds up in the same order in all of them. Conversions from and to the 16-bit
// dtypes are integer arithmetic, rounding to nearest even, so that they need no instruction beyond the baseline.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/vectorize.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // everything here is inlined: there is no call whose ABI could change
#endif

namespace scrl {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

using f32x16 = float __attribute__((vector_size(64)));
using f64x8 = double __attribute__((vector_size(64)));
using u32x16 = uint32_t __attribute__((vector_size(64)));
using u16x16 = uint16_t __attribute__((vector_size(32)));

template <class Storage>
using accumulate_t = std::conditional_t<std::is_same_v<Storage, double>, double, float>;
template <class Storage>
using lanes_t = std::conditional_t<std::is_same_v<Storage, double>, f64x8, f32x16>;
template <class Storage>
inline constexpr int64_t lane_count = std::is_same_v<Storage, double> ? 8 : 16;

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

// memcpy of a whole vector is one unaligned move
template <class Storage>
SCRL_INLINE lanes_t<Storage> load(const Storage* from) {
  if constexpr (sizeof(Storage) == 2) {
    u16x16 bits;
    std::memcpy(&bits, from, sizeof(bits));
    return widen(bits, Storage{});
  } else {
    lanes_t<Storage> value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  }
}

template <class Storage>
SCRL_INLINE void store(Storage* to, lanes_t<Storage> value) {
  if constexpr (sizeof(Storage) == 2) {
    u16x16 bits = narrow(value, Storage{});
    std::memcpy(to, &bits, sizeof(bits));
  } else {
    std::memcpy(to, &value, sizeof(value));
  }
}

// count < lane_count elements; the lanes behind them are zero
template <class Storage>
SCRL_INLINE lanes_t<Storage> load_tail(const Storage* from, int64_t count) {
  Storage padded[lane_count<Storage>] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
  return load(padded);
}

template <class Storage>
SCRL_INLINE void store_tail(Storage* to, lanes_t<Storage> value, int64_t count) {
  Storage padded[lane_count<Storage>];
  store(padded, value);
  for (int64_t i = 0; i < count; ++i) to[i] = padded[i];
}

// Sum of all lanes, halves added to halves: the same tree everywhere.
SCRL_INLINE float horizontal_sum(f32x16 value) {
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

SCRL_INLINE double horizontal_sum(f64x8 value) {
  using f64x4 = double __attribute__((vector_size(32)));
  f64x4 four[2];
  std::memcpy(four, &value, sizeof(value));
  four[0] += four[1];
  return (four[0][0] + four[0][2]) + (four[0][1] + four[0][3]);
}

}  // namespace scrl

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
