// What csrc/cuda/ptx.cuh has in PTX, in terms of the emulator.
#pragma once

#include "../emulator.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace modmoe {

inline void cp_async_16(void* shared, const void* global, bool valid) {
  emulator::copy_async(shared, valid ? global : nullptr, 16);
}

inline void cp_async_commit() { emulator::commit_copies(); }

template <int kNewest>
void cp_async_wait(EMULATOR_SITE) {
  emulator::wait_copies(kNewest, site);
}

template <bool kTransposed>
void load_matrices(unsigned (&fragment)[4], const void* row, EMULATOR_SITE) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulator::fault("ldmatrix: address is not a multiple of 16");
  const emulator::Lanes<const uint16_t*> rows =
      emulator::exchange(0xffffffffu, static_cast<const uint16_t*>(row), site);
  const int i = emulator::lane_id() / 4, j = emulator::lane_id() % 4 * 2;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const uint16_t* const* at = rows.value + 8 * matrix;
    const unsigned low = kTransposed ? at[j][i] : at[i][j];
    const unsigned high = kTransposed ? at[j + 1][i] : at[i][j + 1];
    fragment[matrix] = high << 16 | low;
  }
}

template <typename T>
struct Pair {  // a register with two elements
  float value[2];
  explicit Pair(unsigned bits = 0) {
    const T low{static_cast<uint16_t>(bits)}, high{static_cast<uint16_t>(bits >> 16)};
    value[0] = to_float(low);
    value[1] = to_float(high);
  }
  static float to_float(__half x) { return __half2float(x); }
  static float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
};

template <typename T>
void mma_16x8x16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], EMULATOR_SITE) {
  struct Operands {
    Pair<T> a[4], b[2];
  };
  const emulator::Lanes<Operands> lanes = emulator::exchange(
      0xffffffffu,
      Operands{{Pair<T>(a[0]), Pair<T>(a[1]), Pair<T>(a[2]), Pair<T>(a[3])}, {Pair<T>(b[0]), Pair<T>(b[1])}}, site);
  for (int i = 0; i < 4; ++i) {
    const int row = emulator::lane_id() / 4, column = emulator::lane_id() % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const Pair<T>& left = lanes.value[row * 4 + k % 8 / 2].a[i / 2 + k / 8 * 2];
      const Pair<T>& right = lanes.value[column * 4 + k % 8 / 2].b[k / 8];
      c[i] += left.value[k % 2] * right.value[k % 2];
    }
  }
}

}  // namespace modmoe
