// Lists of tensors on the GPU: one launch covers many of them, cut into chunks of one size.
//
// The table of tensors travels as a kernel argument (32 KB since CUDA 12.1), so there is nothing to upload, to cache or
// to keep alive for CUDA graphs: a captured launch holds its own copy.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "host_device.h"

namespace scrl::cuda {

constexpr int kThreads = 256;
// Elements a chunk: eight 16-byte loads of float32 a thread, and eight chunks a block for ResNet-50 on an H100. Norms
// are summed chunk by chunk, so their bits do not depend on the number of blocks.
constexpr int kChunk = 8192;
#if CUDART_VERSION >= 12010
constexpr int kArgumentBytes = 32764;
#else
constexpr int kArgumentBytes = 4096;
#endif

template <class T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T narrow(accumulate_t<T> x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  if constexpr (std::is_same_v<T, accumulate_t<T>>) return x;
}

// Neighbours that one instruction moves.
template <class T, int count>
struct alignas(count * sizeof(T)) Pack {
  T values[count];
};

// Calls step(i, width) for the elements i < count of a chunk that this thread owns: packs of 16 bytes where the
// tensor's pointers allow it (aligned), one element at a time where not and at the end.
template <class T, class Step>
__device__ __forceinline__ void for_each_pack(int count, bool aligned, const Step& step) {
  constexpr int wide = 16 / sizeof(T);
  int i = threadIdx.x;
  if (aligned) {
    const int packs_end = count - count % wide;
    for (int k = threadIdx.x * wide; k < packs_end; k += kThreads * wide) step(k, std::integral_constant<int, wide>{});
    i += packs_end;
  }
  for (; i < count; i += kThreads) step(i, std::integral_constant<int, 1>{});
}

template <int count, class T>
__device__ __forceinline__ Pack<T, count> load(const T* from) {
  return *reinterpret_cast<const Pack<T, count>*>(from);
}
// Of memory that nobody writes while the kernel runs: such loads may overtake stores.
template <int count, class T>
__device__ __forceinline__ Pack<T, count> load_read_only(const T* from) {
  if constexpr (count == 1) {
    return {__ldg(from)};
  } else {
    static_assert(sizeof(Pack<T, count>) == sizeof(uint4));
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(from));
    return *reinterpret_cast<const Pack<T, count>*>(&bits);
  }
}
template <int count, class T>
__device__ __forceinline__ void store(T* to, const Pack<T, count>& pack) {
  *reinterpret_cast<Pack<T, count>*>(to) = pack;
}

// To global memory. Packs of 16 bytes by one instruction: what is an assignment in C++ the compiler may take apart.
// Doubles stay as they are: nobody waits for them, and the instruction costs them registers.
template <int count, class T>
__device__ __forceinline__ void store_global(T* to, const Pack<T, count>& pack) {
  if constexpr (sizeof(Pack<T, count>) == sizeof(uint4) && sizeof(T) < 8)
    __stwb(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(&pack));
  else
    store(to, pack);
}

template <class... Pointers>
__device__ __forceinline__ bool all_aligned(Pointers... pointers) {
  return (reinterpret_cast<uintptr_t>(pointers) | ...) % 16 == 0;
}

struct Chunk {
  int64_t begin;
  int count;
};
__device__ __forceinline__ Chunk chunk_of(int64_t place, int64_t size) {
  const int64_t begin = place * kChunk;
  return {begin, static_cast<int>(min(int64_t{kChunk}, size - begin))};
}

// The chunks [begin, end) of block blockIdx.x out of gridDim.x.
struct Share {
  int begin, end;
};
__device__ __forceinline__ Share share_of_block(int chunks) {
  return {static_cast<int>(int64_t{blockIdx.x} * chunks / gridDim.x),
          static_cast<int>((int64_t{blockIdx.x} + 1) * chunks / gridDim.x)};
}

// Tensor of a chunk: the last one whose first chunk is not behind it.
__device__ __forceinline__ int tensor_of_chunk(const int* first_chunk, int tensors, int chunk) {
  int low = 0, high = tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first_chunk[middle] <= chunk)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// A factor, and perhaps a tensor on the GPU that it multiplies: one element for all places or one for each.
struct Number {
  double factor = 1;
  const void* tensor = nullptr;
  bool wide = false, by_place = false;

  __device__ double at(int place) const {
    if (!tensor) return factor;
    place = by_place ? place : 0;
    return factor * (wide ? static_cast<const double*>(tensor)[place] : static_cast<const float*>(tensor)[place]);
  }
};

}  // namespace scrl::cuda
