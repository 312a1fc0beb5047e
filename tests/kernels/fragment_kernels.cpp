// ldmatrix and mma alone, by one warp whose registers are in memory, lane by lane: see test_fragments.py.
#include <cuda_runtime.h>

#include "ptx.cuh"

namespace modmoe {

// The rows of four 8 x 8 matrices, one after another.
template <bool kTransposed>
__global__ void load(const uint4* rows, unsigned (*registers)[4]) {
  __shared__ uint4 shared[32];
  shared[threadIdx.x] = rows[threadIdx.x];
  __syncwarp();
  load_matrices<kTransposed>(registers[threadIdx.x], shared + threadIdx.x);
}

template <typename T>
__global__ void multiply(const unsigned (*a)[4], const unsigned (*b)[2], float (*c)[4]) {
  mma_16x8x16<T>(c[threadIdx.x], a[threadIdx.x], b[threadIdx.x]);
}

}  // namespace modmoe

template <typename... Pointers>
void launch_warp(void (*kernel)(Pointers...), Pointers... memory) {
  (emulator::expose(memory, 32 * sizeof(*memory)), ...);
  emulator::launch(1, 32, 0, [=] { kernel(memory...); });
}

extern "C" {
void load_plain(const uint4* rows, unsigned (*registers)[4]) { launch_warp(modmoe::load<false>, rows, registers); }
void load_transposed(const uint4* rows, unsigned (*registers)[4]) { launch_warp(modmoe::load<true>, rows, registers); }
void multiply_float16(const unsigned (*a)[4], const unsigned (*b)[2], float (*c)[4]) {
  launch_warp(modmoe::multiply<__half>, a, b, c);
}
void multiply_bfloat16(const unsigned (*a)[4], const unsigned (*b)[2], float (*c)[4]) {
  launch_warp(modmoe::multiply<__nv_bfloat16>, a, b, c);
}
}
