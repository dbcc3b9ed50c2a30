// Vectors as wide as the processor has them, read from and written to any of the tensor dtypes.
//
// Code is a template over the width in bytes, for SCRL_WIDEST (cpu/vectorize.h). One fixed width for all would be
// simpler, but gcc keeps vectors wider than the processor's in memory: RoIAlign is 4 to 8 times slower then.
#pragma once
#include "cpu/lanes.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // everything here is inlined: there is no call whose ABI could change
#endif

namespace scrl {

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

}  // namespace scrl
