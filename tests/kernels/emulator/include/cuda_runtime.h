// Stand-in for the CUDA header of this name: the part of CUDA C++ that the kernels use.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../emulator.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(bytes) __attribute__((aligned(bytes)))
// Thread-local storage holds nothing else in this library, so that its address range is the block's shared memory.
#define __shared__ thread_local

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

inline void __syncthreads(EMULATOR_SITE) { emulator::block_barrier(site); }
inline void __syncwarp(unsigned = 0xffffffffu, EMULATOR_SITE) { emulator::warp_barrier(site); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, EMULATOR_SITE) {
  return emulator::shuffle(mask, value, source % emulator::kLanes, site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, EMULATOR_SITE) {
  return emulator::shuffle(mask, value, emulator::lane_id() ^ bits, site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance, EMULATOR_SITE) {
  return emulator::shuffle(mask, value, emulator::lane_id() - distance, site);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, EMULATOR_SITE) {
  return emulator::reduce(mask, value, site, [](unsigned a, unsigned b) { return a > b ? a : b; });
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, EMULATOR_SITE) {
  return emulator::reduce(mask, value, site, [](unsigned a, unsigned b) { return a < b ? a : b; });
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, EMULATOR_SITE) {
  const emulator::Lanes<T> lanes = emulator::exchange(mask, value, site);
  unsigned same = 0;
  for (int lane = 0; lane < emulator::kLanes; ++lane) {
    if (lanes.has(lane) && lanes.value[lane] == value) same |= 1u << lane;
  }
  return same;
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  const emulator::Lanes<bool> lanes = emulator::exchange(mask, predicate != 0, site);
  unsigned set = 0;
  for (int lane = 0; lane < emulator::kLanes; ++lane) {
    if (lanes.has(lane) && lanes.value[lane]) set |= 1u << lane;
  }
  return set;
}

inline int atomicAdd(int* address, int value) { return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

// Driver and toolkit: what a test says they are.
using cudaError_t = const char*;
struct cudaFuncAttributes {};
constexpr cudaError_t cudaSuccess = nullptr;
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = emulator::toolkit_version, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = emulator::driver_version, cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)()) { return emulator::driver_error; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error; }
