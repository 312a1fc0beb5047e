// Small matrix products whose right factor and result are rows of vectors; the left factor is read number by number.
#pragma once

#include "simd.h"

namespace modmoe {

// A left factor: element (m, k) is data[m * stride + k], or data[k * stride + m] when transposed.
template <typename T, bool Transposed>
struct Left {
  const T* data;
  int64_t stride;

  T operator()(int m, int64_t k) const { return Transposed ? data[k * stride + m] : data[m * stride + k]; }
  Left from_row(int m) const { return {data + (Transposed ? m : m * stride), stride}; }
};

// One tile of M rows and N vectors, held in registers over the whole sum.
template <int M, int N, class V, class A>
inline void gemm_tile(A a, const V* b, int64_t b_row, V* c, int64_t c_row, int64_t depth, bool accumulate) {
  V sum[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sum[m][n] = accumulate ? c[m * c_row + n] : V{};
  for (int64_t k = 0; k < depth; ++k) {
    const V* row = b + k * b_row;
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const auto factor = a(m, k);
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) sum[m][n] += factor * row[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) c[m * c_row + n] = sum[m][n];
}

template <int M, class V, class A>
inline void gemm_rows(A a, const V* b, int64_t b_row, V* c, int64_t c_row, int width, int64_t depth, bool accumulate) {
  int n = 0;
  for (; n + 2 <= width; n += 2) gemm_tile<M, 2>(a, b + n, b_row, c + n, c_row, depth, accumulate);
  if (n < width) gemm_tile<M, 1>(a, b + n, b_row, c + n, c_row, depth, accumulate);
}

// Rows of a tile: 8 of 2 vectors take half of 32 registers, 4 take half of 16; either hides the latency of a sum.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif

// c (rows x width vectors) = or += a (rows x depth) * b (depth x width vectors); b_row and c_row count vectors.
template <class V, class A>
void gemm(A a, const V* b, int64_t b_row, V* c, int64_t c_row, int rows, int width, int64_t depth, bool accumulate) {
  int m = 0;
  for (; m + kTileRows <= rows; m += kTileRows)
    gemm_rows<kTileRows>(a.from_row(m), b, b_row, c + m * c_row, c_row, width, depth, accumulate);
  for (; m + 2 <= rows; m += 2)
    gemm_rows<2>(a.from_row(m), b, b_row, c + m * c_row, c_row, width, depth, accumulate);
  if (m < rows) gemm_rows<1>(a.from_row(m), b, b_row, c + m * c_row, c_row, width, depth, accumulate);
}

}  // namespace modmoe
