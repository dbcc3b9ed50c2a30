// Counter-based random numbers: Philox4x32-10. A number depends on its counter and key alone, never on what was drawn
// before it, so any thread can draw any of them. Source: Salmon et al., SC 2011; the constants are theirs. The Python
// twin is scrl_fast/philox.py.
#pragma once

#include <cstdint>

#include "../cpu/vectorize.h"

namespace scrl_fast::host {

struct Words {
  uint32_t value[4];
};

SCRL_INLINE Words philox4x32(Words counter, uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter.value[0], c1 = counter.value[1], c2 = counter.value[2], c3 = counter.value[3];
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ key0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ key1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace scrl_fast::host
