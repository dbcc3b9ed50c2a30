// Marks the functions that CPU and CUDA kernels share; always inlined, so that they are compiled for the instruction
// set of the loop that calls them (csrc/cpu/vectorize.h).
#pragma once

#ifndef SCRL_HOST_DEVICE
#if defined(__CUDACC__)
#define SCRL_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define SCRL_HOST_DEVICE inline __attribute__((always_inline))
#else
#define SCRL_HOST_DEVICE inline
#endif
#endif
