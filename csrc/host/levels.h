// Levels: pixel values 0..255, bytes in memory, floats in vectors of L lanes while they are worked on.
//
// Four neighbouring bytes make one 32-bit word, and shift and mask turn a vector of words into four vectors of floats,
// its quarters: lane k of quarter q holds level 4 k + q. That order costs nothing where pixels are independent of their
// neighbours, needs no widening shuffle (compilers make those of portable code one byte at a time) and lets a picture
// be transposed four levels at a time.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/vectorize.h"

namespace scrl_fast::host {

constexpr int round_up(int value, int step) { return (value + step - 1) / step * step; }

template <int L>
struct Lanes {
  typedef float Floats __attribute__((vector_size(L * 4)));
  typedef int32_t Ints __attribute__((vector_size(L * 4)));
  typedef uint32_t Words __attribute__((vector_size(L * 4)));
  // as they lie in memory, at any address
  typedef float StoredFloats __attribute__((vector_size(L * 4), aligned(4), may_alias));
  typedef uint32_t StoredWords __attribute__((vector_size(L * 4), aligned(1), may_alias));
};
template <int L>
using Floats = typename Lanes<L>::Floats;
template <int L>
using Ints = typename Lanes<L>::Ints;
template <int L>
using Words = typename Lanes<L>::Words;

template <int L>
SCRL_INLINE Floats<L> load(const float* from) {
  return *reinterpret_cast<const typename Lanes<L>::StoredFloats*>(from);
}

template <int L>
SCRL_INLINE void store(float* to, Floats<L> value) {
  *reinterpret_cast<typename Lanes<L>::StoredFloats*>(to) = value;
}

template <int L>
SCRL_INLINE Words<L> load_words(const void* from) {
  return *static_cast<const typename Lanes<L>::StoredWords*>(from);
}

template <int L>
SCRL_INLINE void store_words(void* to, Words<L> value) {
  *static_cast<typename Lanes<L>::StoredWords*>(to) = value;
}

template <int L>
SCRL_INLINE Floats<L> to_floats(Ints<L> value) {
  return __builtin_convertvector(value, Floats<L>);
}

template <int L>
SCRL_INLINE Ints<L> to_ints(Floats<L> value) {  // towards zero
  return __builtin_convertvector(value, Ints<L>);
}

template <int L>
SCRL_INLINE Floats<L> whole(Floats<L> value) {
  return to_floats<L>(to_ints<L>(value));
}

// Clamping goes through integers: compilers know those minima and maxima in every instruction set.
template <int L>
SCRL_INLINE Ints<L> clamped(Ints<L> value, int high) {
  const Ints<L> zero = {}, most = zero + high;
  value = value > zero ? value : zero;
  return value < most ? value : most;
}

// Floats of one sign are ordered as their bits are, so this holds for value and high >= 0; below zero gives zero.
template <int L>
SCRL_INLINE Floats<L> clamped(Floats<L> value, float high) {
  const Ints<L> bits = (Ints<L>)value, zero = {}, most = (Ints<L>)(Floats<L>{} + high);
  const Ints<L> positive = bits > zero ? bits : zero;
  return (Floats<L>)(positive < most ? positive : most);
}

template <int L>
SCRL_INLINE Floats<L> larger(Floats<L> a, Floats<L> b) {  // both >= 0
  return (Floats<L>)((Ints<L>)a > (Ints<L>)b ? (Ints<L>)a : (Ints<L>)b);
}

template <int L>
SCRL_INLINE Floats<L> smaller(Floats<L> a, Floats<L> b) {  // both >= 0
  return (Floats<L>)((Ints<L>)a < (Ints<L>)b ? (Ints<L>)a : (Ints<L>)b);
}

template <int L>
SCRL_INLINE Floats<L> magnitude(Floats<L> value) {
  return (Floats<L>)((Words<L>)value & 0x7fffffffu);
}

// To the nearest level, as Pillow rounds.
template <int L>
SCRL_INLINE Ints<L> nearest_level(Floats<L> value) {
  return clamped<L>(to_ints<L>(value + 0.5f), 255);
}

template <int L>
SCRL_INLINE Floats<L> quarter(Words<L> levels, int q) {
  return to_floats<L>((Ints<L>)(levels >> (8 * q) & 255u));
}

template <int L>
SCRL_INLINE Words<L> pack(Ints<L> q0, Ints<L> q1, Ints<L> q2, Ints<L> q3) {
  return (Words<L>)(q0 | q1 << 8 | q2 << 16 | q3 << 24);
}

// 4 L levels become floats, quarter after quarter.
template <int L>
SCRL_INLINE void unpack(const uint8_t* from, float* to) {
  const Words<L> levels = load_words<L>(from);
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) store<L>(to + q * L, quarter<L>(levels, q));
}

// The way back, for floats that are whole levels.
template <int L>
SCRL_INLINE void pack(const float* from, uint8_t* to) {
  store_words<L>(to, pack<L>(to_ints<L>(load<L>(from)), to_ints<L>(load<L>(from + L)),
                             to_ints<L>(load<L>(from + 2 * L)), to_ints<L>(load<L>(from + 3 * L))));
}

// One step of a transposition: of each two by two blocks of `s` x `s` elements, those off the diagonal change places.
template <int L, int s, int... l>
SCRL_INLINE void exchange(Words<L>& a, Words<L>& b, std::integer_sequence<int, l...>) {
  const Words<L> low = SCRL_SHUFFLE(a, b, ((l & s) ? L + l - s : l)...);
  b = SCRL_SHUFFLE(a, b, ((l & s) ? L + l : l + s)...);
  a = low;
}

// Rows 0..n-1 of vectors: within blocks of n x n elements, row i of column j becomes row j of column i.
template <int L, int n, int s = 1>
SCRL_INLINE void transpose(Words<L>* rows) {
  if constexpr (s < n) {
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if (!(i & s)) exchange<L, s>(rows[i], rows[i + s], std::make_integer_sequence<int, L>());
    }
    transpose<L, n, 2 * s>(rows);
  }
}

}  // namespace scrl_fast::host
