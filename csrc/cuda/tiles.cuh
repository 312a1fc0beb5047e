// Matrix products of a block: operands copied tile by tile to shared memory, sums in registers.
//
// A product is C (M x N) = sum over k of A (M x k) B (k x N). 16-bit types multiply on tensor cores, float with
// ordinary fused multiply-adds; sums are float.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "numeric.cuh"
#include "ptx.cuh"

namespace modmoe {

// What a block computes, kRows x kColumns sums in steps of kDepth, and what each of its warps does of it.
template <int kRows_, int kColumns_, int kDepth_, int kWarpRows_, int kWarpColumns_>
struct Shape {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kDepth = kDepth_;
  static constexpr int kWarpRows = kWarpRows_, kWarpColumns = kWarpColumns_;
  static constexpr int kThreads = (kRows / kWarpRows) * (kColumns / kWarpColumns) * 32;
};

// Depths are 64 and 128 bytes. Wide tiles read each operand least often; narrow ones suit experts with few rows.
template <typename T>
using WideShape = Shape<128, 128, 64 / sizeof(T), sizeof(T) == 2 ? 64 : 32, sizeof(T) == 2 ? 32 : 64>;
template <typename T>
using NarrowShape = Shape<32, 64, 128 / sizeof(T), 32, 16>;

// One operand's tile in shared memory: kOuter rows of A, or columns of B, by kDepth. kDepthMajor says which of the two
// is contiguous in global memory, and so in the tile: if not the depth, the tile lies there transposed.
template <typename T, int kOuter, int kDepth_, bool kDepthMajor_>
struct OperandTile {
  static constexpr bool kDepthMajor = kDepthMajor_;
  static constexpr int kDepth = kDepth_;
  static constexpr int kRows = kDepthMajor ? kOuter : kDepth;
  static constexpr int kColumns = kDepthMajor ? kDepth : kOuter;
  static constexpr int kStride = kColumns + 16 / sizeof(T);  // eight rows fall on eight different 16-byte banks
  static constexpr int kSize = kRows * kStride;
  __device__ static constexpr int index(int outer, int k) {
    return kDepthMajor ? outer * kStride + k : k * kStride + outer;
  }
};

// Copies rows to a tile: row r begins at row_start(r), null for zeros, and has elements [column, width) to give.
template <typename Tile, int kThreads, typename T, typename RowStart>
__device__ inline void copy_tile(T* tile, RowStart row_start, int column, int width, bool vectorized) {
  constexpr int kVector = 16 / sizeof(T);
  constexpr int kVectorsPerRow = Tile::kColumns / kVector;
#pragma unroll
  for (int i = threadIdx.x; i < Tile::kRows * kVectorsPerRow; i += kThreads) {
    const int row = i / kVectorsPerRow;
    const int offset = i % kVectorsPerRow * kVector;
    const int left = width - column - offset;
    const T* from = row_start(row);
    T* to = tile + row * Tile::kStride + offset;
    if (vectorized) {
      cp_async_16(to, from + column + offset, from != nullptr && left > 0);
    } else {
      for (int j = 0; j < kVector; ++j)
        to[j] = from != nullptr && j < left ? from[column + offset + j] : from_float<T>(0.0f);
    }
  }
}

// Runs load(stage, step) kStages - 1 steps ahead of multiply(stage). Afterwards the stages may be overwritten.
template <int kStages, typename Load, typename Multiply>
__device__ inline void pipeline(int num_steps, Load load, Multiply multiply) {
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < num_steps) load(step, step);
    cp_async_commit();
  }
  for (int step = 0; step < num_steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this step has arrived, and nobody still reads the stage that is loaded next
    const int next = step + kStages - 1;
    if (next < num_steps) load(next % kStages, next);
    cp_async_commit();
    multiply(step % kStages);
  }
  __syncthreads();
}

template <typename T>
__device__ inline unsigned scale_pair(unsigned pair, float low, float high) {
  T elements[2];
  memcpy(elements, &pair, sizeof(pair));
  elements[0] = from_float<T>(to_float(elements[0]) * low);
  elements[1] = from_float<T>(to_float(elements[1]) * high);
  memcpy(&pair, elements, sizeof(pair));
  return pair;
}

// The sums of one warp: kRows x kColumns at (row, column) of the block's.
template <typename T, int kRows, int kColumns>
struct WarpSums {
  float sums[kRows / 16][kColumns / 8][4] = {};

  // Adds the product of two tiles; if kScaled, with row k of B multiplied by scale[k].
  template <typename TileA, typename TileB, bool kScaled>
  __device__ void add(const T* a, const T* b, int row, int column, const float* scale) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < TileA::kDepth; k += 16) {
      unsigned left[kRows / 16][4];
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i) {
        const int outer = row + 16 * i + (TileA::kDepthMajor ? lane % 16 : lane / 8 % 2 * 8);
        const int inner = k + (TileA::kDepthMajor ? 0 : lane % 8) + lane / 16 * 8;
        load_matrices<!TileA::kDepthMajor>(left[i], a + TileA::index(outer, inner));
      }
      unsigned right[kColumns / 8][2];
#pragma unroll
      for (int j = 0; j < kColumns / 8; j += 2) {
        const int outer = column + 8 * j + (TileB::kDepthMajor ? lane % 8 : 0) + lane / 16 * 8;
        const int inner = k + (TileB::kDepthMajor ? lane / 8 % 2 * 8 : lane % 16);
        unsigned two[4];
        load_matrices<!TileB::kDepthMajor>(two, b + TileB::index(outer, inner));
        right[j][0] = two[0], right[j][1] = two[1], right[j + 1][0] = two[2], right[j + 1][1] = two[3];
      }
      if constexpr (kScaled) {
        const float* s = scale + k + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) {
          right[j][0] = scale_pair<T>(right[j][0], s[0], s[1]);
          right[j][1] = scale_pair<T>(right[j][1], s[8], s[9]);
        }
      }
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) mma_16x8x16<T>(sums[i][j], left[i], right[j]);
      }
    }
  }

  // Calls visit(row, column, sum) for those that this lane holds.
  template <typename Visit>
  __device__ void each(int row, int column, Visit visit) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          visit(row + 16 * i + lane / 4 + r / 2 * 8, column + 8 * j + lane % 4 * 2 + r % 2, sums[i][j][r]);
        }
      }
    }
  }
};

// In float, lane l has every fourth row from l / 8 on and every eighth column from l % 8 on.
template <int kRows, int kColumns>
struct WarpSums<float, kRows, kColumns> {
  float sums[kRows / 4][kColumns / 8] = {};

  template <typename TileA, typename TileB, bool kScaled>
  __device__ void add(const float* a, const float* b, int row, int column, const float* scale) {
    row += threadIdx.x % 32 / 8;
    column += threadIdx.x % 8;
#pragma unroll
    for (int k = 0; k < TileA::kDepth; k += 2) {
      float2 left[kRows / 4];
      float2 right[kColumns / 8];
#pragma unroll
      for (int i = 0; i < kRows / 4; ++i) left[i] = two_of<TileA>(a, row + 4 * i, k);
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) right[j] = two_of<TileB>(b, column + 8 * j, k);
      if constexpr (kScaled) {
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) right[j] = make_float2(right[j].x * scale[k], right[j].y * scale[k + 1]);
      }
#pragma unroll
      for (int i = 0; i < kRows / 4; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) {
          sums[i][j] = fmaf(left[i].x, right[j].x, sums[i][j]);
          sums[i][j] = fmaf(left[i].y, right[j].y, sums[i][j]);
        }
      }
    }
  }

  template <typename Tile>
  __device__ static float2 two_of(const float* tile, int outer, int k) {
    if constexpr (Tile::kDepthMajor) return *reinterpret_cast<const float2*>(tile + Tile::index(outer, k));
    return make_float2(tile[Tile::index(outer, k)], tile[Tile::index(outer, k + 1)]);
  }

  template <typename Visit>
  __device__ void each(int row, int column, Visit visit) const {
    row += threadIdx.x % 32 / 8;
    column += threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) visit(row + 4 * i, column + 8 * j, sums[i][j]);
    }
  }
};

// A block's whole product: both operands' tiles in kStages stages, then the sums in the same shared memory.
template <typename T, typename Shape_, bool kDepthMajorA, bool kDepthMajorB>
struct BlockProduct {
  using Shape = Shape_;
  using TileA = OperandTile<T, Shape::kRows, Shape::kDepth, kDepthMajorA>;
  using TileB = OperandTile<T, Shape::kColumns, Shape::kDepth, kDepthMajorB>;
  static constexpr int kStages = 3;
  static constexpr int kStageSize = TileA::kSize + TileB::kSize;
  static constexpr int kSumsStride = Shape::kColumns + 8;
  static constexpr int kStagesBytes = kStages * kStageSize * sizeof(T);
  static constexpr int kSumsBytes = Shape::kRows * kSumsStride * sizeof(float);
  static constexpr int kSharedBytes = kStagesBytes > kSumsBytes ? kStagesBytes : kSumsBytes;

  // Computes sums[row * kSumsStride + column] in `shared`, for the whole block to read. load(a, b, stage, step) copies
  // the operands of a step; `scale` is null, or kStages times kDepth factors for the rows of B that load also writes.
  template <bool kScaled, typename Load>
  __device__ static const float* run(unsigned char* shared, int num_steps, Load load, const float* scale) {
    T* stages = reinterpret_cast<T*>(shared);
    const int warp = threadIdx.x / 32;
    const int row = warp % (Shape::kRows / Shape::kWarpRows) * Shape::kWarpRows;
    const int column = warp / (Shape::kRows / Shape::kWarpRows) * Shape::kWarpColumns;
    WarpSums<T, Shape::kWarpRows, Shape::kWarpColumns> warp_sums;
    pipeline<kStages>(
        num_steps,
        [&](int stage, int step) {
          T* a = stages + stage * kStageSize;
          load(a, a + TileA::kSize, stage, step);
        },
        [&](int stage) {
          const T* a = stages + stage * kStageSize;
          const float* stage_scale = kScaled ? scale + stage * Shape::kDepth : nullptr;
          warp_sums.template add<TileA, TileB, kScaled>(a, a + TileA::kSize, row, column, stage_scale);
        });
    float* sums = reinterpret_cast<float*>(shared);
    warp_sums.each(row, column, [&](int r, int c, float sum) { sums[r * kSumsStride + c] = sum; });
    __syncthreads();
    return sums;
  }
};

// Epilogues hand each thread eight neighbouring columns at a time.
constexpr int kStoreWidth = 8;

// Stores the first `count` of eight values.
template <typename T>
__device__ inline void store(T* to, const float (&values)[kStoreWidth], int count, bool vectorized) {
  alignas(16) T rounded[kStoreWidth];
#pragma unroll
  for (int i = 0; i < kStoreWidth; ++i) rounded[i] = from_float<T>(values[i]);
  if (vectorized && count >= kStoreWidth) {
#pragma unroll
    for (int i = 0; i < kStoreWidth * int{sizeof(T)} / 16; ++i) {
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(rounded)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kStoreWidth; ++i) {
      if (i < count) to[i] = rounded[i];
    }
  }
}

// Loads up to eight values, zeros after the first `count`.
template <typename T>
__device__ inline void load(float (&values)[kStoreWidth], const T* from, int count, bool vectorized) {
  alignas(16) T elements[kStoreWidth];
  if (vectorized && count >= kStoreWidth) {
#pragma unroll
    for (int i = 0; i < kStoreWidth * int{sizeof(T)} / 16; ++i) {
      reinterpret_cast<uint4*>(elements)[i] = reinterpret_cast<const uint4*>(from)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kStoreWidth; ++i) elements[i] = i < count ? from[i] : from_float<T>(0.0f);
  }
#pragma unroll
  for (int i = 0; i < kStoreWidth; ++i) values[i] = to_float(elements[i]);
}

}  // namespace modmoe
