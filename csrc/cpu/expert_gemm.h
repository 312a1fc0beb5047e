// Products of one expert's matrix with rows that may lie anywhere, which are therefore given by pointers.
//
// The weight w is (out, in), row after row. The file knows no torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "numbers.h"
#include "simd.h"
#include "tile_gemm.h"

namespace modmoe {

// Left factors of `gemm`: rows that are given by pointers, in words, and columns of such rows, where words are numbers.
template <typename T>
struct RowsAt {
  using Word = typename Numbers<T>::Word;
  const T* const* rows;
  int64_t from;

  Word operator()(int m, int64_t k) const { return load<Word>(rows[m] + from + k * Numbers<T>::kStep); }
  RowsAt from_row(int64_t m) const { return {rows + m, from}; }
};

template <typename T>
struct ColumnsAt {
  const T* const* rows;
  int64_t from;

  T operator()(int m, int64_t k) const { return rows[k][from + m]; }
  ColumnsAt from_row(int64_t m) const { return {rows, from + m}; }
  ColumnsAt from_step(int64_t k) const { return {rows + k, from}; }
};

// One thread's products, and its scratch memory. Widths are multiples of a vector's numbers.
template <typename T>
class ExpertGemm {
  using N = Numbers<T>;
  using Sum = typename N::Sum;
  using Word = typename N::Word;
  using S = Simd<Sum, kVectorBytes>;
  using V = typename S::V;
  static constexpr int kLanes = S::kLanes;
  static constexpr int64_t kStep = N::kStep;
  static constexpr int kVectors = WideTile::kVectors;
  static constexpr int kTile = WideTile::kRows;
  static constexpr int64_t kDepth = 512;  // words of a packed block: 128 kB with AVX-512
  static constexpr int64_t kFewRows = 2;  // not worth packing
  static constexpr int64_t kPairs = int64_t(1) << 19;  // numbers packed in pairs at once, about: 1 MB

 public:
  static constexpr int64_t kColumns = kVectors * kLanes;  // of a packed block
  static constexpr int64_t kMaxRows = 512;                // at once in `multiply`

  // y_r = scale_r * w x_r. The lanes are rows: w is read number by number where it lies, x and y are transposed.
  void multiply_transposed(const T* const* x, T* const* y, const Sum* scale, int64_t rows, const T* w, int64_t in,
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
  void multiply(const T* const* dy, int64_t rows, const T* w, int64_t in, int64_t out, const T* const* x, Sum* dots,
                T* const* dx, const Sum* scale) {
    if (dots) std::fill_n(dots, rows, Sum(0));
    for (int64_t i = 0; i < in; i += kColumns) {
      const int width = int(std::min(kColumns, in - i) / kLanes);
      for (int64_t k = 0; k < out; k += kDepth * kStep) {
        const int64_t depth = std::min(kDepth, (out - k) / kStep);
        for (int64_t j = 0; j < depth; ++j)
          for (int v = 0; v < width; ++v)
            panel()[j * width + v] = N::words(w + (k + j * kStep) * in + i + v * kLanes, in);
        gemm<WideTile>(RowsAt<T>{dy, k}, panel(), width, result(), width, rows, width, depth, k > 0,
                       next_block(w, in, out, i, k, calls(rows, depth)));
      }
      for (int64_t r = 0; r < rows; ++r) {
        const V* u = result() + r * width;
        if (dots) dots[r] += dot(u, x[r] + i, width);
        if (dx)
          for (int v = 0; v < width; ++v) N::write(dx[r] + i + v * kLanes, u[v] * scale[r]);
      }
    }
  }

  // gradient[o] = sum_r dy_r[o] scale_r x_r for o in [from, to); rows of `gradient` begin at multiples of a vector.
  void outer(const T* const* dy, const T* const* x, const Sum* scale, int64_t rows, T* gradient, int64_t in,
             int64_t from, int64_t to) {
    if constexpr (kStep == 1) {
      outer(ColumnsAt<T>{dy, from}, x, scale, rows, gradient + from * in, in, to - from);
    } else {
      const int64_t step = std::clamp<int64_t>(kPairs / rows, 8 * kTile, kMaxRows);
      for (int64_t o = from; o < to; o += step) {
        const int64_t height = std::min(step, to - o);
        outer(pair_columns(dy, rows, o, height), x, scale, rows, gradient + o * in, in, height);
      }
    }
  }

 private:
  // As above, for `height` rows of the gradient; at most kMaxRows if sums are not of type T, and so taken in `result`.
  template <class Columns>
  void outer(Columns dy, const T* const* x, const Sum* scale, int64_t rows, T* gradient, int64_t in, int64_t height) {
    constexpr bool kDirect = std::is_same_v<T, Sum>;
    for (int64_t i = 0; i < in; i += kColumns) {
      const int width = int(std::min(kColumns, in - i) / kLanes);
      V* const sums = kDirect ? reinterpret_cast<V*>(gradient + i) : result();
      const int64_t sums_row = kDirect ? in / kLanes : width;
      for (int64_t r = 0; r < rows; r += kDepth * kStep) {
        const int64_t depth = std::min(kDepth, (rows - r + kStep - 1) / kStep);
        for (int64_t j = 0, at = r; j < depth; ++j, at += kStep)
          for (int v = 0; v < width; ++v)
            panel()[j * width + v] = N::words(x + at, rows - at, i + v * kLanes, scale + at);
        gemm<WideTile>(dy.from_step(r / kStep), panel(), width, sums, sums_row, height, width, depth, r > 0,
                       Prefetch<true>(gradient + kTile * in + i, r ? 0 : height - kTile, kColumns * sizeof(T),
                                      in * sizeof(T), calls(height, depth)));
      }
      if (!kDirect)
        for (int64_t o = 0; o < height; ++o)
          for (int v = 0; v < width; ++v) N::write(gradient + o * in + i + v * kLanes, sums[o * width + v]);
    }
  }

  // Columns [from, from + height) of the rows, as pairs of rows; the last may lack its second.
  Left<Word, true> pair_columns(const T* const* rows, int64_t count, int64_t from, int64_t height) {
    pairs_.resize((count + 1) / 2 * height);
    for (int64_t r = 0; r < count; r += 2) {
      const T* const first = rows[r] + from;
      const T* const second = r + 1 < count ? rows[r + 1] + from : nullptr;
      for (int64_t o = 0; o < height; ++o) pairs_[r / 2 * height + o] = {first[o], second ? second[o] : T{}};
    }
    return {pairs_.data(), height};
  }

  // As multiply_transposed, for at most kColumns rows.
  void multiply_columns(const T* const* x, T* const* y, const Sum* scale, int rows, const T* w, int64_t in,
                        int64_t out) {
    const int width = (rows + kLanes - 1) / kLanes;
    for (int64_t o = 0; o < out; o += kDepth) {
      const int64_t height = std::min(kDepth, out - o);
      for (int64_t k = 0; k < in; k += kDepth * kStep) {
        const int64_t depth = std::min(kDepth, (in - k) / kStep);
        pack_columns(x, rows, k, depth, width);
        const Left<Word, false> matrix{reinterpret_cast<const Word*>(w + o * in + k), in / kStep};
        gemm<WideTile>(matrix, panel(), width, result(), width, height, width, depth, k > 0,
                       Prefetch<false>(w + (o + kTile) * in + k, height - kTile, depth * sizeof(Word), in * sizeof(T),
                                       calls(height, depth)));
      }
      unpack_columns(y, scale, rows, o, height, width);
    }
  }

  static void dot_rows(const T* x, T* y, Sum scale, const T* w, int64_t in, int64_t out) {
    for (int64_t o = 0; o < out; o += kLanes) {
      V sums[kLanes] = {};
      for (int64_t k = 0; k < in; k += kLanes * kStep) {
        const V part = load<V>(x + k);
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes; ++lane) N::multiply_add(sums[lane], part, load<V>(w + (o + lane) * in + k));
      }
      transpose<Sum, kVectorBytes>(sums);
      V total = sums[0];
#pragma GCC unroll 16
      for (int lane = 1; lane < kLanes; ++lane) total += sums[lane];
      N::write(y + o, total * scale);
    }
  }

  static Sum dot(const V* u, const T* x, int width) {
    V sum{};
    for (int v = 0; v < width; ++v) sum += u[v] * N::read(x + v * kLanes);
    return sum_of_lanes<Sum, kVectorBytes>(sum);
  }

  // Words of the rows, from column `from` on -> panel (depth, width vectors): the lanes are rows, zero past the last.
  void pack_columns(const T* const* x, int rows, int64_t from, int64_t depth, int width) {
    for (int v = 0; v < width; ++v)
      for (int64_t k = 0; k < depth; k += kLanes) {
        V square[kLanes];
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes; ++lane) {
          const int r = v * kLanes + lane;
          square[lane] = r < rows ? load<V>(x[r] + from + k * kStep) : V{};
        }
        transpose<Sum, kVectorBytes>(square);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) panel()[(k + i) * width + v] = square[i];
      }
  }

  // The reverse, from result (height, width vectors) to columns [from, from + height) of the rows.
  void unpack_columns(T* const* y, const Sum* scale, int rows, int64_t from, int64_t height, int width) {
    for (int v = 0; v < width; ++v)
      for (int64_t o = 0; o < height; o += kLanes) {
        V square[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) square[i] = result()[(o + i) * width + v];
        transpose<Sum, kVectorBytes>(square);
        for (int lane = 0; lane < kLanes && v * kLanes + lane < rows; ++lane) {
          const int r = v * kLanes + lane;
          N::write(y[r] + from + o, square[lane] * scale[r]);
        }
      }
  }

  // The block of w that `multiply` packs after the one that begins at row k and column i.
  static Prefetch<false> next_block(const T* w, int64_t in, int64_t out, int64_t i, int64_t k, int64_t calls) {
    k += kDepth * kStep;
    if (k >= out) k = 0, i += kColumns;
    const int64_t rows = i < in ? std::min(kDepth * kStep, out - k) : 0;
    return {w + k * in + i, rows, kColumns * int64_t(sizeof(T)), in * int64_t(sizeof(T)), calls};
  }

  // At least so often does a product of so many rows ask for memory.
  static int64_t calls(int64_t rows, int64_t depth) {
    return (rows + kTile - 1) / kTile * ((depth + kStepsPerCall - 1) / kStepsPerCall);
  }

  V* panel() { return scratch_.get(); }
  V* result() { return scratch_.get() + kDepth * kVectors; }

  std::unique_ptr<V[]> scratch_{new V[(kDepth + std::max(kDepth, kMaxRows)) * kVectors]};
  std::vector<Word> pairs_;
};

// to = sum_k factors_k * rows_k over `count` rows of `width` numbers, one after the other; factors: null for ones.
template <typename T>
void weighted_sum(const T* rows, const typename Numbers<T>::Sum* factors, int64_t count, int64_t width, T* to) {
  using N = Numbers<T>;
  using Sum = typename N::Sum;
  for (int64_t i = 0; i < width; i += kVectorBytes / sizeof(Sum)) {
    typename N::V sum{};
    for (int64_t k = 0; k < count; ++k) sum += N::read(rows + k * width + i) * (factors ? factors[k] : Sum(1));
    N::write(to + i, sum);
  }
}

}  // namespace modmoe
