// Kernels with one mistake each: what the emulator must find.
#include <cuda_runtime.h>

#include "ptx.cuh"

using emulator::launch;

namespace modmoe {

__global__ void divergent_barriers() {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void early_return() {
  if (threadIdx.x == 3) return;
  __shfl_sync(0xffffffffu, 1, 0);
  if (threadIdx.x < 32) __syncthreads();
  if (threadIdx.x == 40) __syncwarp();
}

__global__ void deadlock() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else if (threadIdx.x == 32) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

__global__ void race(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = values[63 - threadIdx.x];
}

// Lanes of one warp exchange through shared memory, and a shuffle does not order that.
__global__ void race_in_a_warp(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = threadIdx.x;
  __shfl_sync(0xffffffffu, 1, 0);
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

// The second write of `value` races with reads of the first one.
__global__ void write_after_read(int* out) {
  __shared__ int value;
  for (int i = 0; i < 2; ++i) {
    if (threadIdx.x == 0) value = i;
    __syncthreads();
    out[i * blockDim.x + threadIdx.x] = value;
  }
}

__global__ void blocks_race(int* out) { out[0] = blockIdx.x; }

__global__ void uninitialised(int* out) {
  __shared__ int values[64];
  if (threadIdx.x > 0) values[threadIdx.x] = 0;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void out_of_bounds(int* out) { out[threadIdx.x + 1] = 0; }

__global__ void copy_not_awaited(int* out) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  if (threadIdx.x == 0) {
    cp_async_16(shared_memory, out, true);
    cp_async_commit();
  }
  __syncthreads();
  out[threadIdx.x] = shared_memory[0];
}

__global__ void correct(int* out) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  int* values = reinterpret_cast<int*>(shared_memory);
  if (threadIdx.x % 4 == 0) {
    cp_async_16(values + threadIdx.x, out + threadIdx.x, true);
    cp_async_commit();
    cp_async_wait<0>();
  }
  __syncthreads();
  out[threadIdx.x] = values[63 - threadIdx.x];
}

}  // namespace modmoe

#define ENTRY(kernel, blocks, ...)                                  \
  extern "C" void kernel(int* out, size_t size) {                   \
    emulator::expose(out, size * sizeof(int));                      \
    launch(blocks, 64, 1024, [=] { modmoe::kernel(__VA_ARGS__); }); \
  }
ENTRY(divergent_barriers, 1)
ENTRY(early_return, 1)
ENTRY(deadlock, 1)
ENTRY(race, 1, out)
ENTRY(race_in_a_warp, 1, out)
ENTRY(write_after_read, 1, out)
ENTRY(blocks_race, 2, out)
ENTRY(uninitialised, 1, out)
ENTRY(out_of_bounds, 1, out)
ENTRY(copy_not_awaited, 1, out)
ENTRY(correct, 1, out)
