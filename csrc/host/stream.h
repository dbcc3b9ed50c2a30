// Results past the caches: a batch of views is larger than they are, nobody reads it at once, and a plain store would
// first fetch the line that it fills. That fetch was half of the cost of writing a view.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "host/levels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <xmmintrin.h>
#define SCRL_STREAMS
#endif

namespace scrl_fast::host {

constexpr int kLine = 64;  // bytes

// `bytes` of memory that is in the first cache, to any place. Other threads may read them after streamed().
template <int L>
SCRL_INLINE void stream(uint8_t* to, const uint8_t* from, int64_t bytes) {
#if defined(SCRL_STREAMS)
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<uintptr_t>(to) % kLine);
  std::memcpy(to, from, head);
  int64_t at = head;
  for (; at + 4 * L <= bytes; at += 4 * L) {
    // no intrinsic: one of a width needs its instruction set where it is written, a template gets it where it is called
    const Words<L> words = load_words<L>(from + at);
#if defined(__clang__)
    __builtin_nontemporal_store(words, reinterpret_cast<Words<L>*>(to + at));
#else
    if constexpr (L == 4) {
      asm volatile("movntdq %1, %0" : "=m"(*reinterpret_cast<Words<L>*>(to + at)) : "x"(words));
    } else {
      asm volatile("vmovntdq %1, %0" : "=m"(*reinterpret_cast<Words<L>*>(to + at)) : "v"(words));
    }
#endif
  }
  std::memcpy(to + at, from + at, bytes - at);
#else
  std::memcpy(to, from, bytes);
#endif
}

inline void streamed() {
#if defined(SCRL_STREAMS)
  _mm_sfence();
#endif
}

}  // namespace scrl_fast::host
