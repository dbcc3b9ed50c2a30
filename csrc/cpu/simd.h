// Vectors as wide as the processor has them, read from and written to any of the tensor dtypes.
//
// Code is a template over the width in bytes: 64 (AVX-512), 32 (AVX2) or 16 (SSE, NEON). SCRL_WIDEST makes a function
// of it for each width and one that calls the widest that the processor has. One fixed width for all would be simpler,
// but gcc keeps vectors wider than the processor's in memory: RoIAlign is 4 to 8 times slower then. Mark whatever is
// called with SCRL_INLINE: a callee that is not inlined would be compiled for the baseline only.
#pragma once
#include <algorithm>
#include <cstdlib>

#include "cpu/lanes.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // everything here is inlined: there is no call whose ABI could change
#endif

// SCRL_WIDEST(scale, (float* x, int64_t n), (x, n), scale_by<float>) defines scale(x, n), which calls
// scale_by<float, Bytes>(x, n) with the widest vectors.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__) && \
    !defined(SCRL_NO_MULTIVERSION)
#define SCRL_WIDEST(name, parameters, arguments, ...)                                            \
  static __attribute__((target("arch=x86-64-v4"))) void name##_64 parameters {                   \
    __VA_ARGS__::template run<64> arguments;                                                     \
  }                                                                                              \
  static __attribute__((target("arch=x86-64-v3"))) void name##_32 parameters {                   \
    __VA_ARGS__::template run<32> arguments;                                                     \
  }                                                                                              \
  static void name##_16 parameters { __VA_ARGS__::template run<16> arguments; }                  \
  void name parameters {                                                                         \
    const int bytes = scrl::simd_bytes();                                                        \
    bytes == 64 ? name##_64 arguments : bytes == 32 ? name##_32 arguments : name##_16 arguments; \
  }
#else
#define SCRL_WIDEST(name, parameters, arguments, ...) \
  void name parameters { __VA_ARGS__::template run<16> arguments; }
#endif

namespace scrl {

// Bytes of the widest vectors that this processor and SCRL_WIDEST have; the environment variable SCRL_FAST_SIMD_BYTES
// lowers it, so that every width can be tested on one machine.
inline int simd_bytes() {
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
  static const int bytes = [] {
    const int widest = __builtin_cpu_supports("x86-64-v4") ? 64 : __builtin_cpu_supports("x86-64-v3") ? 32 : 16;
    const char* at_most = std::getenv("SCRL_FAST_SIMD_BYTES");
    return at_most ? std::min(widest, std::atoi(at_most)) : widest;
  }();
  return bytes;
#else
  return 16;
#endif
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

}  // namespace scrl
