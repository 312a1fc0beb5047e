// Products of one expert's matrix with rows that may lie anywhere, which are therefore given by pointers.
//
// The weight w is (out, in), row after row. The file knows no torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "simd.h"
#include "tile_gemm.h"

namespace modmoe {

// Left factors of `gemm` whose rows (or, transposed, columns) are given by pointers.
template <typename T>
struct RowsAt {
  const T* const* rows;
  int64_t from;

  T operator()(int m, int64_t k) const { return rows[m][from + k]; }
  RowsAt from_row(int64_t m) const { return {rows + m, from}; }
};

template <typename T>
struct ColumnsAt {
  const T* const* rows;
  int64_t from;

  T operator()(int m, int64_t k) const { return rows[k][from + m]; }
  ColumnsAt from_row(int64_t m) const { return {rows, from + m}; }
};

// One thread's products, and its scratch memory. Widths are multiples of a vector's lanes.
template <typename T>
class ExpertGemm {
  using S = Simd<T, kVectorBytes>;
  using V = typename S::V;
  static constexpr int kLanes = S::kLanes;
  static constexpr int kVectors = WideTile::kVectors;
  static constexpr int kTile = WideTile::kRows;
  static constexpr int64_t kPanelRow = kVectors * kVectorBytes;
  static constexpr int64_t kDepth = 512;  // of a packed block: 128 kB with AVX-512
  static constexpr int64_t kFewRows = 2;  // not worth packing

 public:
  static constexpr int64_t kColumns = kVectors * kLanes;  // of a packed block
  static constexpr int64_t kMaxRows = 512;                // at once in `multiply`

  // y_r = scale_r * w x_r. The lanes are rows: w is read number by number where it lies, x and y are transposed.
  void multiply_transposed(const T* const* x, T* const* y, const T* scale, int64_t rows, const T* w, int64_t in,
                           int64_t out) {
    for (int64_t r = 0; r < rows; r += kColumns) {
      const int64_t count = std::min(kColumns, rows - r);
      if (count <= kFewRows)
        for (int64_t i = r; i < rows; ++i) dot_rows(x[i], y[i], scale[i], w, in, out);
      else
        multiply_columns(x + r, y + r, scale + r, int(count), w, in, out);
    }
  }

  // u_r = w^T dy_r; then dots_r = <u_r, x_r> and dx_r = scale_r * u_r, each if not null. At most kMaxRows rows.
  void multiply(const T* const* dy, int64_t rows, const T* w, int64_t in, int64_t out, const T* const* x, T* dots,
                T* const* dx, const T* scale) {
    if (dots) std::fill_n(dots, rows, T(0));
    for (int64_t i = 0; i < in; i += kColumns) {
      const int width = int(std::min(kColumns, in - i) / kLanes);
      for (int64_t k = 0; k < out; k += kDepth) {
        const int64_t depth = std::min(kDepth, out - k);
        for (int64_t j = 0; j < depth; ++j) pack_row(w + (k + j) * in + i, T(1), panel() + j * width, width);
        gemm<WideTile>(RowsAt<T>{dy, k}, panel(), width, result(), width, rows, width, depth, k > 0,
                       next_block(w, in, out, i, k, calls(rows, depth)));
      }
      for (int64_t r = 0; r < rows; ++r) {
        const V* u = result() + r * width;
        if (dots) dots[r] += dot(u, x[r] + i, width);
        if (dx)
          for (int v = 0; v < width; ++v) store(dx[r] + i + v * kLanes, u[v] * scale[r]);
      }
    }
  }

  // gradient[o] = sum_r dy_r[o] scale_r x_r for o in [from, to); rows of `gradient` begin at multiples of a vector.
  void outer(const T* const* dy, const T* const* x, const T* scale, int64_t rows, T* gradient, int64_t in, int64_t from,
             int64_t to) {
    for (int64_t i = 0; i < in; i += kColumns) {
      const int width = int(std::min(kColumns, in - i) / kLanes);
      for (int64_t r = 0; r < rows; r += kDepth) {
        const int64_t depth = std::min(kDepth, rows - r);
        for (int64_t j = 0; j < depth; ++j) pack_row(x[r + j] + i, scale[r + j], panel() + j * width, width);
        gemm<WideTile>(ColumnsAt<T>{dy + r, from}, panel(), width, reinterpret_cast<V*>(gradient + from * in + i),
                       in / kLanes, to - from, width, depth, r > 0,
                       Prefetch<true>(gradient + (from + kTile) * in + i, r ? 0 : to - from - kTile, kPanelRow,
                                      in * sizeof(T), calls(to - from, depth)));
      }
    }
  }

 private:
  // As multiply_transposed, for at most kColumns rows.
  void multiply_columns(const T* const* x, T* const* y, const T* scale, int rows, const T* w, int64_t in, int64_t out) {
    const int width = (rows + kLanes - 1) / kLanes;
    for (int64_t o = 0; o < out; o += kDepth) {
      const int64_t height = std::min(kDepth, out - o);
      for (int64_t k = 0; k < in; k += kDepth) {
        const int64_t depth = std::min(kDepth, in - k);
        pack_columns(x, rows, k, depth, width);
        gemm<WideTile>(Left<T, false>{w + o * in + k, in}, panel(), width, result(), width, height, width, depth, k > 0,
                       Prefetch<false>(w + (o + kTile) * in + k, height - kTile, depth * sizeof(T), in * sizeof(T),
                                       calls(height, depth)));
      }
      unpack_columns(y, scale, rows, o, height, width);
    }
  }

  static void dot_rows(const T* x, T* y, T scale, const T* w, int64_t in, int64_t out) {
    for (int64_t o = 0; o < out; o += kLanes) {
      V sums[kLanes] = {};
      for (int64_t k = 0; k < in; k += kLanes) {
        const V part = load<V>(x + k);
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes; ++lane) sums[lane] += part * load<V>(w + (o + lane) * in + k);
      }
      transpose<T, kVectorBytes>(sums);
      V total = sums[0];
#pragma GCC unroll 16
      for (int lane = 1; lane < kLanes; ++lane) total += sums[lane];
      store(y + o, total * scale);
    }
  }

  static T dot(const V* u, const T* x, int width) {
    V sum{};
    for (int v = 0; v < width; ++v) sum += u[v] * load<V>(x + v * kLanes);
    return sum_of_lanes<T, kVectorBytes>(sum);
  }

  static void pack_row(const T* row, T factor, V* packed, int width) {
    for (int v = 0; v < width; ++v) packed[v] = load<V>(row + v * kLanes) * factor;
  }

  // Columns [from, from + depth) of the rows -> panel (depth, width vectors): the lanes are rows, zero past the last.
  void pack_columns(const T* const* x, int rows, int64_t from, int64_t depth, int width) {
    for (int v = 0; v < width; ++v)
      for (int64_t k = 0; k < depth; k += kLanes) {
        V square[kLanes];
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes; ++lane) {
          const int r = v * kLanes + lane;
          square[lane] = r < rows ? load<V>(x[r] + from + k) : V{};
        }
        transpose<T, kVectorBytes>(square);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) panel()[(k + i) * width + v] = square[i];
      }
  }

  // The reverse, from result (height, width vectors) to columns [from, from + height) of the rows.
  void unpack_columns(T* const* y, const T* scale, int rows, int64_t from, int64_t height, int width) {
    for (int v = 0; v < width; ++v)
      for (int64_t o = 0; o < height; o += kLanes) {
        V square[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) square[i] = result()[(o + i) * width + v];
        transpose<T, kVectorBytes>(square);
        for (int lane = 0; lane < kLanes && v * kLanes + lane < rows; ++lane) {
          const int r = v * kLanes + lane;
          store(y[r] + from + o, square[lane] * scale[r]);
        }
      }
  }

  // The block of w that `multiply` packs after the one that begins at row k and column i.
  static Prefetch<false> next_block(const T* w, int64_t in, int64_t out, int64_t i, int64_t k, int64_t calls) {
    k += kDepth;
    if (k >= out) k = 0, i += kColumns;
    const int64_t rows = i < in ? std::min(kDepth, out - k) : 0;
    return {w + k * in + i, rows, kPanelRow, in * int64_t(sizeof(T)), calls};
  }

  // At least so often does a product of so many rows ask for memory.
  static int64_t calls(int64_t rows, int64_t depth) {
    return (rows + kTile - 1) / kTile * ((depth + kStepsPerCall - 1) / kStepsPerCall);
  }

  V* panel() { return scratch_.get(); }
  V* result() { return scratch_.get() + kDepth * kVectors; }

  std::unique_ptr<V[]> scratch_{new V[(kDepth + std::max(kDepth, kMaxRows)) * kVectors]};
};

// to = sum_k factors_k * rows_k over `count` rows of `width` numbers, one after the other; factors: null for ones.
template <typename T>
void weighted_sum(const T* rows, const T* factors, int64_t count, int64_t width, T* to) {
  using V = typename Simd<T, kVectorBytes>::V;
  for (int64_t i = 0; i < width; i += Simd<T, kVectorBytes>::kLanes) {
    V sum{};
    for (int64_t k = 0; k < count; ++k) sum += load<V>(rows + k * width + i) * (factors ? factors[k] : T(1));
    store(to + i, sum);
  }
}

}  // namespace modmoe
