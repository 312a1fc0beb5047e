// Small matrix products whose right factor and result are rows of vectors; the left factor is read number by number.
#pragma once

#include <algorithm>

#include "simd.h"

namespace modmoe {

// A left factor: element (m, k) is data[m * stride + k], or data[k * stride + m] when transposed.
template <typename T, bool Transposed>
struct Left {
  const T* data;
  int64_t stride;

  T operator()(int m, int64_t k) const { return Transposed ? data[k * stride + m] : data[m * stride + k]; }
  Left from_row(int64_t m) const { return {data + (Transposed ? m : m * stride), stride}; }
  Left from_step(int64_t k) const {
    static_assert(Transposed, "of columns");
    return {data + k * stride, stride};
  }
};

// How much of a result the registers hold at once. 8 rows of 2 vectors take half of 32 registers, 4 rows half of 16;
// 6 rows of 4 (or 2) vectors take three quarters and load less.
#if defined(__AVX512F__) || defined(__aarch64__)
struct NarrowTile {
  static constexpr int kRows = 8, kVectors = 2;
};
struct WideTile {
  static constexpr int kRows = 6, kVectors = 4;
};
#else
struct NarrowTile {
  static constexpr int kRows = 4, kVectors = 2;
};
struct WideTile {
  static constexpr int kRows = 6, kVectors = 2;
};
#endif

// A product calls its prefetch once per so many steps of a tile.
constexpr int kStepsPerCall = 16;

struct NoPrefetch {
  void operator()() {}
};

// Walks through rows of memory that will soon be read (or written), some cache lines per call: processors see streams
// of addresses coming, but not where the next tile or the next matrix begins.
template <bool ForWriting>
class Prefetch {
  static constexpr int64_t kLine = 64;

 public:
  // The walk ends after `calls` calls or earlier.
  Prefetch(const void* data, int64_t rows, int64_t row_bytes, int64_t stride_bytes, int64_t calls)
      : row_(static_cast<const char*>(data)), rows_(rows), row_bytes_(row_bytes), stride_(stride_bytes),
        lines_((rows * ((row_bytes + kLine - 1) / kLine) + calls - 1) / std::max<int64_t>(calls, 1)) {}

  void operator()() {
    for (int64_t line = 0; line < lines_ && rows_ > 0; ++line) {
      __builtin_prefetch(row_ + at_, ForWriting, 2);
      at_ += kLine;
      if (at_ >= row_bytes_) at_ = 0, row_ += stride_, --rows_;
    }
  }

 private:
  const char* row_;
  int64_t rows_, row_bytes_, stride_, lines_, at_ = 0;
};

// Overloaded for other left factors than numbers.
template <class V, typename T>
inline void multiply_add(V& sum, T factor, V row) {
  sum += factor * row;
}

// One tile of M rows and N vectors, held in registers over the whole sum.
template <int M, int N, class V, class A, class P>
inline void gemm_tile(A a, const V* b, int64_t b_row, V* c, int64_t c_row, int64_t depth, bool accumulate,
                      P& prefetch) {
  V sum[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[m][n] = accumulate ? c[m * c_row + n] : V{};
  for (int64_t k = 0; k < depth; ++k) {
    if (k % kStepsPerCall == 0) prefetch();
    const V* row = b + k * b_row;
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const auto factor = a(m, k);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) multiply_add(sum[m][n], factor, row[n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) c[m * c_row + n] = sum[m][n];
}

// M rows, in tiles of N vectors and then of half as many.
template <int M, int N, class V, class A, class P>
inline void gemm_rows(A a, const V* b, int64_t b_row, V* c, int64_t c_row, int width, int64_t depth, bool accumulate,
                      P& prefetch) {
  int n = 0;
  for (; n + N <= width; n += N) gemm_tile<M, N>(a, b + n, b_row, c + n, c_row, depth, accumulate, prefetch);
  if constexpr (N > 1)
    if (n < width) gemm_rows<M, N / 2>(a, b + n, b_row, c + n, c_row, width - n, depth, accumulate, prefetch);
}

// c (rows x width vectors) = or += a (rows x depth) * b (depth x width vectors); b_row and c_row count vectors.
template <class Shape, class V, class A, class P = NoPrefetch>
void gemm(A a, const V* b, int64_t b_row, V* c, int64_t c_row, int64_t rows, int width, int64_t depth, bool accumulate,
          P prefetch = {}) {
  constexpr int M = Shape::kRows, N = Shape::kVectors;
  int64_t m = 0;
  for (; m + M <= rows; m += M)
    gemm_rows<M, N>(a.from_row(m), b, b_row, c + m * c_row, c_row, width, depth, accumulate, prefetch);
  for (; m + 2 <= rows; m += 2)
    gemm_rows<2, N>(a.from_row(m), b, b_row, c + m * c_row, c_row, width, depth, accumulate, prefetch);
  if (m < rows) gemm_rows<1, N>(a.from_row(m), b, b_row, c + m * c_row, c_row, width, depth, accumulate, prefetch);
}

}  // namespace modmoe
