// One loop, compiled for several instruction sets, the widest that the processor has chosen when the library loads.
//
// Mark the function that holds the loop with SCRL_MULTIVERSION and the templates it calls with SCRL_INLINE (a callee
// that is not inlined would be compiled for the baseline only). It must be a plain function, not a template and not a
// lambda: the callback given to parallel_for calls it. Vectors wider than the baseline's go into and out of what it
// calls itself by reference: clang refuses them by value there, since that call would have another ABI in each body.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <type_traits>

// gcc, and clang since it knows x86-64-v3 and x86-64-v4 in all the places where they are named below. gcc 11 cannot
// choose by them yet: there "fma" stands for v3, and not "avx2", which would round once more.
#if defined(__x86_64__) && defined(__linux__) && !defined(SCRL_NO_MULTIVERSION)
#if defined(__clang__) ? __clang_major__ >= 18 : defined(__GNUC__)
#define SCRL_TARGETS
#endif
#endif

#if !defined(SCRL_TARGETS)
#define SCRL_MULTIVERSION
#elif !defined(__clang__) && __GNUC__ < 12
#define SCRL_MULTIVERSION __attribute__((target_clones("avx512f", "fma", "default")))
#define SCRL_HAS_LEVEL_4 (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
#define SCRL_HAS_LEVEL_3 (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#else
#define SCRL_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define SCRL_HAS_LEVEL_4 __builtin_cpu_supports("x86-64-v4")
#define SCRL_HAS_LEVEL_3 __builtin_cpu_supports("x86-64-v3")
#endif
#define SCRL_INLINE inline __attribute__((always_inline))
#define SCRL_RESTRICT __restrict__

// SCRL_SHUFFLE(a, b, places...): a vector like a, of the elements at those places of a and, numbered on, of b.
#if defined(__clang__)
#define SCRL_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SCRL_SHUFFLE(a, b, ...) \
  __builtin_shuffle(a, b, typename scrl::PlacesOf<sizeof(a), sizeof((a)[0])>::Type{__VA_ARGS__})
#endif

// The same for templates over the width of their vectors in bytes: 64 (AVX-512), 32 (AVX2) or 16 (SSE, NEON).
// SCRL_WIDEST(scale, (float* x, int64_t n), (x, n), Scale<float>) defines scale(x, n), which calls
// Scale<float>::run<bytes>(x, n) with the widest vectors.
#if defined(SCRL_TARGETS)
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
#if defined(__AVX512BW__)
#define SCRL_WIDTH 64
#elif defined(__AVX2__)
#define SCRL_WIDTH 32
#else
#define SCRL_WIDTH 16
#endif
#define SCRL_WIDEST(name, parameters, arguments, ...) \
  void name parameters { __VA_ARGS__::template run<SCRL_WIDTH> arguments; }
#endif

namespace scrl {

template <size_t Bytes, size_t Each>
struct PlacesOf {
  typedef std::conditional_t<Each == 4, int32_t, int64_t> Type __attribute__((vector_size(Bytes)));
};

#if defined(SCRL_TARGETS)
// Bytes of the widest vectors that this processor and SCRL_WIDEST have; the environment variable SCRL_FAST_SIMD_BYTES
// lowers it, so that every width can be tested on one machine.
inline int simd_bytes() {
  static const int bytes = [] {
    const int widest = SCRL_HAS_LEVEL_4 ? 64 : SCRL_HAS_LEVEL_3 ? 32 : 16;
    const char* at_most = std::getenv("SCRL_FAST_SIMD_BYTES");
    return at_most ? std::min(widest, std::atoi(at_most)) : widest;
  }();
  return bytes;
}
#endif

}  // namespace scrl
