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

// Eight counters; the fourth word is the same in all of them.
struct alignas(64) WideCounter {
  uint64_t first[8], second[8], third[8];
  uint32_t fourth;
};

// Their words. Each comes in the low half of 64 bits, the high half is left as it falls: the widening multiplication
// then needs no shuffle (5.5 -> 1.3 ns a counter against what the compiler makes of a loop, Xeon with AVX-512).
struct alignas(64) WideWords {
  uint64_t value[4][8];
};

// Fills out[i], i < kBlocks, from the counters whose first word is `block` + i higher. Two at once hide each other's
// latency.
using PhiloxEight = void (*)(const WideCounter& counter, uint32_t block, uint32_t key0, uint32_t key1, WideWords* out);

template <int kBlocks>
void philox_eight(const WideCounter& counter, uint32_t block, uint32_t key0, uint32_t key1, WideWords* out) {
  for (int i = 0; i < kBlocks; ++i) {
    for (int lane = 0; lane < 8; ++lane) {
      const Words words = philox4x32(
          {{static_cast<uint32_t>(counter.first[lane]) + block + static_cast<uint32_t>(i),
            static_cast<uint32_t>(counter.second[lane]), static_cast<uint32_t>(counter.third[lane]), counter.fourth}},
          key0, key1);
      for (int j = 0; j < 4; ++j) out[i].value[j][lane] = words.value[j];
    }
  }
}

#ifdef SCRL_PHILOX_X86
template <int kBlocks>
__attribute__((target("avx512f"))) void philox_eight_avx512(const WideCounter& counter, uint32_t block, uint32_t key0,
                                                            uint32_t key1, WideWords* out) {
  const __m512i multiply0 = _mm512_set1_epi64(kPhiloxMultiply0), multiply2 = _mm512_set1_epi64(kPhiloxMultiply2);
  __m512i c0[kBlocks], c1[kBlocks], c2[kBlocks], c3[kBlocks];
  for (int i = 0; i < kBlocks; ++i) {
    c0[i] = _mm512_add_epi64(_mm512_load_si512(counter.first), _mm512_set1_epi64(block + static_cast<uint32_t>(i)));
    c1[i] = _mm512_load_si512(counter.second), c2[i] = _mm512_load_si512(counter.third);
    c3[i] = _mm512_set1_epi64(counter.fourth);
  }
  const int exclusive_or = 0x96;
  for (int round = 0; round < 10; ++round, key0 += kPhiloxBump0, key1 += kPhiloxBump1) {
    for (int i = 0; i < kBlocks; ++i) {
      const __m512i a = _mm512_mul_epu32(c0[i], multiply0), b = _mm512_mul_epu32(c2[i], multiply2);
      c0[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(b, 32), c1[i], _mm512_set1_epi64(key0), exclusive_or);
      c2[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(a, 32), c3[i], _mm512_set1_epi64(key1), exclusive_or);
      c1[i] = b, c3[i] = a;
    }
  }
  for (int i = 0; i < kBlocks; ++i) {
    _mm512_store_si512(out[i].value[0], c0[i]), _mm512_store_si512(out[i].value[1], c1[i]);
    _mm512_store_si512(out[i].value[2], c2[i]), _mm512_store_si512(out[i].value[3], c3[i]);
  }
}

template <int kBlocks>
__attribute__((target("avx2"))) void philox_eight_avx2(const WideCounter& counter, uint32_t block, uint32_t key0,
                                                       uint32_t key1, WideWords* out) {
  const __m256i multiply0 = _mm256_set1_epi64x(kPhiloxMultiply0), multiply2 = _mm256_set1_epi64x(kPhiloxMultiply2);
  for (int i = 0; i < kBlocks; ++i) {
    for (int half = 0; half < 8; half += 4) {
      // Spelled out: a lambda would not have this function's target.
      __m256i c0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(counter.first + half));
      __m256i c1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(counter.second + half));
      __m256i c2 = _mm256_load_si256(reinterpret_cast<const __m256i*>(counter.third + half));
      __m256i c3 = _mm256_set1_epi64x(counter.fourth);
      c0 = _mm256_add_epi64(c0, _mm256_set1_epi64x(block + static_cast<uint32_t>(i)));
      uint32_t k0 = key0, k1 = key1;
      for (int round = 0; round < 10; ++round, k0 += kPhiloxBump0, k1 += kPhiloxBump1) {
        const __m256i a = _mm256_mul_epu32(c0, multiply0), b = _mm256_mul_epu32(c2, multiply2);
        c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(b, 32), c1), _mm256_set1_epi64x(k0));
        c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(a, 32), c3), _mm256_set1_epi64x(k1));
        c1 = b, c3 = a;
      }
      const __m256i words[4] = {c0, c1, c2, c3};
      for (int j = 0; j < 4; ++j) _mm256_store_si256(reinterpret_cast<__m256i*>(out[i].value[j] + half), words[j]);
    }
  }
}
#endif

// The fastest form for this processor.
template <int kBlocks>
PhiloxEight philox_eight_here() {
#ifdef SCRL_PHILOX_X86
  if (__builtin_cpu_supports("avx512f")) return philox_eight_avx512<kBlocks>;
  if (__builtin_cpu_supports("avx2")) return philox_eight_avx2<kBlocks>;
#endif
  return philox_eight<kBlocks>;
}

}  // namespace scrl_fast::host
