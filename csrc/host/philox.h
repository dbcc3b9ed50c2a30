// Counter-based random numbers: Philox4x32-10. A number depends on its counter and key alone, never on what was drawn
// before it, so any thread can draw any of them. Source: Salmon et al., SC 2011; the constants are theirs. The Python
// twin is scrl_fast/philox.py.
#pragma once

#include <cstdint>

#include "../cpu/vectorize.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(SCRL_NO_MULTIVERSION)
#define SCRL_PHILOX_X86
#include <immintrin.h>
#endif

namespace scrl_fast::host {

constexpr uint32_t kPhiloxMultiply0 = 0xD2511F53, kPhiloxMultiply2 = 0xCD9E8D57;
constexpr uint32_t kPhiloxBump0 = 0x9E3779B9, kPhiloxBump1 = 0xBB67AE85;

struct Words {
  uint32_t value[4];
};

inline Words philox4x32(Words counter, uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter.value[0], c1 = counter.value[1], c2 = counter.value[2], c3 = counter.value[3];
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{kPhiloxMultiply0} * c0, b = uint64_t{kPhiloxMultiply2} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ key0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ key1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    key0 += kPhiloxBump0;
    key1 += kPhiloxBump1;
  }
  return {{c0, c1, c2, c3}};
}

// Eight counters at once that differ in their first word. Each word comes in the low half of 64 bits, the high half is
// left as it falls: the widening multiplication then needs no shuffle (5.5 -> 1.3 ns a counter against what the
// compiler makes of a loop, Xeon with AVX-512).
struct alignas(64) WideWords {
  uint64_t value[4][8];
};

using PhiloxEight = void (*)(const uint32_t (&first)[8], Words counter, uint32_t key0, uint32_t key1, WideWords& out);

inline void philox_eight(const uint32_t (&first)[8], Words counter, uint32_t key0, uint32_t key1, WideWords& out) {
  for (int lane = 0; lane < 8; ++lane) {
    counter.value[0] = first[lane];
    const Words words = philox4x32(counter, key0, key1);
    for (int i = 0; i < 4; ++i) out.value[i][lane] = words.value[i];
  }
}

#ifdef SCRL_PHILOX_X86
__attribute__((target("avx512f"))) inline void philox_eight_avx512(const uint32_t (&first)[8], Words counter,
                                                                   uint32_t key0, uint32_t key1, WideWords& out) {
  const __m512i multiply0 = _mm512_set1_epi64(kPhiloxMultiply0), multiply2 = _mm512_set1_epi64(kPhiloxMultiply2);
  __m512i c0 = _mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)));
  __m512i c1 = _mm512_set1_epi64(counter.value[1]), c2 = _mm512_set1_epi64(counter.value[2]);
  __m512i c3 = _mm512_set1_epi64(counter.value[3]);
  for (int round = 0; round < 10; ++round, key0 += kPhiloxBump0, key1 += kPhiloxBump1) {
    const __m512i a = _mm512_mul_epu32(c0, multiply0), b = _mm512_mul_epu32(c2, multiply2);
    const int exclusive_or = 0x96;
    c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(b, 32), c1, _mm512_set1_epi64(key0), exclusive_or);
    c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(a, 32), c3, _mm512_set1_epi64(key1), exclusive_or);
    c1 = b, c3 = a;
  }
  _mm512_store_si512(out.value[0], c0), _mm512_store_si512(out.value[1], c1);
  _mm512_store_si512(out.value[2], c2), _mm512_store_si512(out.value[3], c3);
}

__attribute__((target("avx2"))) inline void philox_eight_avx2(const uint32_t (&first)[8], Words counter, uint32_t key0,
                                                              uint32_t key1, WideWords& out) {
  const __m256i multiply0 = _mm256_set1_epi64x(kPhiloxMultiply0), multiply2 = _mm256_set1_epi64x(kPhiloxMultiply2);
  for (int half = 0; half < 8; half += 4) {
    __m256i c0 = _mm256_cvtepu32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(first + half)));
    __m256i c1 = _mm256_set1_epi64x(counter.value[1]), c2 = _mm256_set1_epi64x(counter.value[2]);
    __m256i c3 = _mm256_set1_epi64x(counter.value[3]);
    uint32_t k0 = key0, k1 = key1;
    for (int round = 0; round < 10; ++round, k0 += kPhiloxBump0, k1 += kPhiloxBump1) {
      const __m256i a = _mm256_mul_epu32(c0, multiply0), b = _mm256_mul_epu32(c2, multiply2);
      c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(b, 32), c1), _mm256_set1_epi64x(k0));
      c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(a, 32), c3), _mm256_set1_epi64x(k1));
      c1 = b, c3 = a;
    }
    const __m256i words[4] = {c0, c1, c2, c3};
    for (int i = 0; i < 4; ++i) _mm256_store_si256(reinterpret_cast<__m256i*>(out.value[i] + half), words[i]);
  }
}
#endif

// The fastest form for this processor.
inline PhiloxEight philox_eight_here() {
#ifdef SCRL_PHILOX_X86
  if (__builtin_cpu_supports("avx512f")) return philox_eight_avx512;
  if (__builtin_cpu_supports("avx2")) return philox_eight_avx2;
#endif
  return philox_eight;
}

}  // namespace scrl_fast::host
