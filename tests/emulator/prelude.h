// What nvcc and NVRTC know without being told, for g++; included before everything else.
#pragma once

#include <map>  // these have __noinline__ of their own
#include <memory>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(bytes) alignas(bytes)
#define __restrict__ __restrict

// A function that is compiled once for all kernels: whoever includes it may inline it, and does not compile it.
#ifdef EMULATOR_RUNTIME
#define EMULATED
#else
#define EMULATED extern inline __attribute__((gnu_inline, noinline))
#endif
