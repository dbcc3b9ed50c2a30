// From levels to the result: solarise, normalise, convert, interleave channels.
#pragma once
#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>

#include "host/levels.h"
#include "host/stream.h"

namespace scrl_fast::host {

enum Format : int { kFloat32, kBFloat16, kFloat16, kUint8 };

constexpr int element_bytes(Format format) { return format == kFloat32 ? 4 : format == kUint8 ? 1 : 2; }

// Bits of the nearest number of the format, ties to even, in the low half of each word; all values are finite.
template <int L, Format format>
SCRL_INLINE Words<L> to_bits(Floats<L> value) {
  const auto bits = (Words<L>)value;
  if constexpr (format == kFloat32) return bits;
  if constexpr (format == kBFloat16) return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  // float16: below 2^-14 adding 0.5 puts the last bit of a float where subnormals end, and rounds
  const Words<L> size = bits & 0x7fffffffu, infinite = Words<L>{} + 0x7c00u;
  const Words<L> normal = (size + 0xfffu + (size >> 13 & 1u) - 0x38000000u) >> 13;
  const Words<L> small = (Words<L>)((Floats<L>)size + 0.5f) - 0x3f000000u;
  const Words<L> half = (Ints<L>)size < 0x38800000 ? small : ((Ints<L>)normal < 0x7c00 ? normal : infinite);
  return half | (bits >> 16 & 0x8000u);
}

template <int L, int k, int parts>
SCRL_INLINE void store_lane(const Words<L>* rows, uint8_t* out, int stride) {
  typedef uint32_t Four __attribute__((vector_size(16), aligned(1), may_alias));
#pragma GCC unroll 3
  for (int part = 0; part < parts; ++part) {
    const Words<L> row = rows[4 * part + k % 4];
    constexpr int l = k / 4 * 4;
    Four* to = reinterpret_cast<Four*>(out + k * stride + 16 * part);  // auto would lose aligned(1)
#if defined(__clang__) || __GNUC__ >= 12
    *to = __builtin_shufflevector(row, row, l, l + 1, l + 2, l + 3);
#else
    *to = Four{row[l], row[l + 1], row[l + 2], row[l + 3]};
#endif
  }
}

// out[k * count + m] = rows[m][k] for words m < count, lanes k < L. Written in sixteen bytes, lane after lane: what is
// too much in one lane is overwritten by the next, and up to kOverrun bytes behind the last lane are spoilt.
constexpr int kOverrun = 8;
template <int L, int count, int... k>
SCRL_INLINE void store_lanes(Words<L>* rows, uint8_t* out, std::integer_sequence<int, k...>) {
  constexpr int parts = (count + 3) / 4;
#pragma GCC unroll 3
  for (int part = 0; part < parts; ++part) transpose<L, 4>(rows + 4 * part);
  (store_lane<L, k, parts>(rows, out, 4 * count), ...);
}

// The same for four words or a multiple of four, in whole vectors and without spoiling anything.
template <int L, int count>
SCRL_INLINE void store_vectors(Words<L>* rows, uint8_t* out) {
  constexpr int parts = count / 4, quads = L / 4;  // sixteen bytes each: in a lane's words, in a vector
#pragma GCC unroll 3
  for (int part = 0; part < parts; ++part) transpose<L, 4>(rows + 4 * part);
  // rows[4 p + m] now holds part p of lanes m, m + 4, ...; n = parts * m + p counts sixteen bytes of every four lanes
#pragma GCC unroll 12
  for (int n = 0; n < 4 * parts; n += quads) {
    Words<L> block[quads];
#pragma GCC unroll 4
    for (int i = 0; i < quads; ++i) block[i] = rows[(n + i) % parts * 4 + (n + i) / parts];
    if constexpr (quads >= 2) {
#pragma GCC unroll 2
      for (int i = 0; i < quads; i += 2) exchange<L, 4>(block[i], block[i + 1], std::make_integer_sequence<int, L>());
    }
    if constexpr (quads == 4) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) exchange<L, 8>(block[i], block[i + 2], std::make_integer_sequence<int, L>());
    }
#pragma GCC unroll 4
    for (int j = 0; j < quads; ++j) store_words<L>(out + 16 * (4 * parts * j + n), block[j]);
  }
}

// values[m] for m < 4 or 12 elements of each lane, side by side.
template <int L, Format format, int elements>
SCRL_INLINE void store_elements(const Words<L>* values, uint8_t* out) {
  constexpr int each = element_bytes(format), per_word = 4 / each, count = elements / per_word;
  Words<L> rows[round_up(count, 4)] = {};
#pragma GCC unroll 12
  for (int m = 0; m < elements; ++m) rows[m / per_word] |= values[m] << (8 * each * (m % per_word));
  if constexpr (count == 1) {
    store_words<L>(out, rows[0]);
  } else if constexpr (count % 4 == 0) {
    store_vectors<L, count>(rows, out);
  } else {
    store_lanes<L, count>(rows, out, std::make_integer_sequence<int, L>());
  }
}

struct Normalization {
  std::array<float, 3> scale, shift;  // result = level * scale + shift
};

// 4 L pixels. Channels last: `out`; else out[c * plane]; in bytes. Spoils kOverrun bytes behind each of them.
template <int L, Format format, bool channels_last>
SCRL_INLINE void format_group(const uint8_t* const (&levels)[3], const Normalization& n, uint8_t* out, int64_t plane) {
  Words<L> values[12];
#pragma GCC unroll 3
  for (int c = 0; c < 3; ++c) {
    const Words<L> words = load_words<L>(levels[c]);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      Words<L>& value = values[channels_last ? 3 * q + c : 4 * c + q];
      if constexpr (format == kUint8) {
        value = words >> (8 * q) & 255u;
      } else {
        value = to_bits<L, format>(quarter<L>(words, q) * n.scale[c] + n.shift[c]);
      }
    }
  }
  if constexpr (channels_last) {
    store_elements<L, format, 12>(values, out);
  } else {
    for (int c = 0; c < 3; ++c) store_elements<L, format, 4>(values + 4 * c, out + c * plane);
  }
}

// `count` pixels that lie side by side in the planes and in the result; the planes can be read to whole groups. Made in
// pieces that stay in the first cache.
template <int L, Format format, bool channels_last>
SCRL_INLINE void format_run(const uint8_t* const (&planes)[3], int64_t count, const Normalization& n, uint8_t* out,
                            int64_t plane) {
  constexpr int kPiece = 512, kEach = (channels_last ? 3 : 1) * element_bytes(format), kParts = channels_last ? 1 : 3;
  constexpr int kPart = kPiece * kEach + kLine;
  static_assert(kOverrun <= kLine);
  alignas(kLine) uint8_t piece[kParts * kPart];
  for (int64_t start = 0; start < count; start += kPiece) {
    const int64_t pixels = std::min<int64_t>(kPiece, count - start);
    for (int64_t i = 0; i < pixels; i += 4 * L) {
      const int64_t at = start + i;
      format_group<L, format, channels_last>({planes[0] + at, planes[1] + at, planes[2] + at}, n, piece + i * kEach,
                                             kPart);
    }
    for (int part = 0; part < kParts; ++part) {
      stream<L>(out + part * plane + start * kEach, piece + part * kPart, pixels * kEach);
    }
  }
}

SCRL_INLINE void solarize(uint8_t* levels, int64_t count, int threshold) {
  if (threshold > 255) return;
  const auto least = static_cast<uint8_t>(std::max(threshold, 0));
  for (int64_t i = 0; i < count; ++i) levels[i] = levels[i] >= least ? static_cast<uint8_t>(~levels[i]) : levels[i];
}

}  // namespace scrl_fast::host
