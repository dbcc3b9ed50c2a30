// One loop, compiled for several instruction sets, the widest that the processor has chosen when the library loads.
//
// Mark the function that holds the loop with SCRL_MULTIVERSION and the templates it calls with SCRL_INLINE (a callee
// that is not inlined would be compiled for the baseline only). It must be a plain function, not a template and not a
// lambda: the callback given to parallel_for calls it.
#pragma once

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__) && \
    !defined(SCRL_NO_MULTIVERSION)
#define SCRL_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SCRL_MULTIVERSION
#endif
#define SCRL_INLINE inline __attribute__((always_inline))
#define SCRL_RESTRICT __restrict__
