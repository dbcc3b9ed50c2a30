// Enough of CUDA's device side to run kernels on a CPU, one block after the other: a thread is a fiber that runs until
// it waits for its warp or block. A test's stand-in for the toolkit's header of this name; slow, and strict: threads
// that wait for one that never comes stop the program.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__  // `static` says the rest: all fibers of a block share what the function keeps

using std::isfinite;
using std::max;
using std::min;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct double2 {
  double x, y;
};
struct Place {
  unsigned x;
};
inline Place blockIdx, gridDim, blockDim, threadIdx;

namespace cuda_on_cpu {

struct Barrier {
  int arrived = 0, generation = 0;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
};

constexpr int kWarp = 32, kStack = 256 << 10;
inline std::vector<Thread> threads;
inline std::vector<Barrier> warps;
inline std::vector<uint64_t> slots;  // what each lane shows the others of its warp
inline Barrier block;
inline ucontext_t scheduler;
inline const std::function<void()>* body;
inline bool moved;  // since the scheduler last looked

inline void enter() {
  (*body)();
  threads[threadIdx.x].done = moved = true;
  swapcontext(&threads[threadIdx.x].context, &scheduler);
}

inline void wait(Barrier& barrier, int count) {
  moved = true;
  const int generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0, ++barrier.generation;
    return;
  }
  const unsigned self = threadIdx.x;
  while (barrier.generation == generation) swapcontext(&threads[self].context, &scheduler);
}

inline void wait_for_warp(unsigned mask) {
  if (mask != 0xffffffffu) std::fprintf(stderr, "only whole warps are known here\n"), std::abort();
  wait(warps[threadIdx.x / kWarp], kWarp);
}

// What `value` is in every lane of the warp; calls use(slot of lane 0).
template <class T, class Use>
auto in_warp(unsigned mask, T value, const Use& use) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  __builtin_memcpy(&slots[threadIdx.x], &value, sizeof(T));
  wait_for_warp(mask);
  const auto result = use(&slots[threadIdx.x / kWarp * kWarp]);
  wait_for_warp(mask);
  return result;
}

template <class Kernel>
void launch(int64_t blocks, int threads_a_block, const Kernel& kernel) {
  const std::function<void()> call = kernel;
  body = &call;
  gridDim.x = static_cast<unsigned>(blocks), blockDim.x = threads_a_block;
  threads.resize(threads_a_block), slots.resize(threads_a_block);
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    block = {}, warps.assign(threads_a_block / kWarp, {});
    for (Thread& thread : threads) {
      if (!thread.stack) thread.stack.reset(new char[kStack]);
      thread.done = false;
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get(), thread.context.uc_stack.ss_size = kStack;
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, enter, 0);
    }
    for (bool left = true; left;) {
      left = moved = false;
      for (unsigned i = 0; i < threads.size(); ++i) {
        if (threads[i].done) continue;
        threadIdx.x = i;
        swapcontext(&scheduler, &threads[i].context);
        left = true;
      }
      if (left && !moved) std::fprintf(stderr, "block %u: threads wait for ever\n", blockIdx.x), std::abort();
    }
  }
}
}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::block, static_cast<int>(cuda_on_cpu::threads.size())); }
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return cuda_on_cpu::in_warp(mask, value, [&](const uint64_t* slots) {
    T other;
    __builtin_memcpy(&other, slots + lane, sizeof(T));
    return other;
  });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int offset) {
  const int lane = static_cast<int>(threadIdx.x) % cuda_on_cpu::kWarp + offset;
  return __shfl_sync(mask, value, lane < cuda_on_cpu::kWarp ? lane : lane - offset);
}
inline bool __syncthreads_or(bool vote) {
  cuda_on_cpu::slots[threadIdx.x] = vote;
  __syncthreads();
  const bool any = std::any_of(cuda_on_cpu::slots.begin(), cuda_on_cpu::slots.end(), [](uint64_t v) { return v != 0; });
  __syncthreads();
  return any;
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  return cuda_on_cpu::in_warp(mask, uint64_t{vote}, [](const uint64_t* slots) {
    unsigned votes = 0;
    for (int lane = 0; lane < cuda_on_cpu::kWarp; ++lane) votes |= static_cast<unsigned>(slots[lane]) << lane;
    return votes;
  });
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
template <class T>
T __ldg(const T* from) {
  return *from;
}
inline void __stwb(uint4* to, uint4 value) { *to = value; }
