// Kernels of the grouped linear map: one matrix per expert over ragged groups of rows.
//
// No torch header here, so that the tests can also compile these kernels for the host.
// Letters: N tokens, E experts, K experts per token, S = N * K (token, slot) pairs. Sorted row r holds pair order[r];
// expert e owns sorted rows offsets[e - 1] to offsets[e], and rows from offsets[E - 1] on belong to nobody.
// Every sum is taken in a fixed order. Offsets and orders that make no sense give wrong numbers, but no access outside
// the tensors.
#pragma once

#include "tiles.cuh"

namespace modmoe {

enum class Layout : int { kToken, kPair, kSorted };  // modmoe.ops.grouped_linear.LAYOUTS

struct Plan {
  const int64_t* order;  // (S,)
  const int* offsets;    // (E,)
  int num_pairs;
  int num_experts;
  int top_k;

  __device__ int begin(int expert) const { return expert == 0 ? 0 : min(max(offsets[expert - 1], 0), num_pairs); }
  // Expert E stands for nobody.
  __device__ int end(int expert) const {
    return expert == num_experts ? num_pairs : min(max(offsets[expert], begin(expert)), num_pairs);
  }
  __device__ int pair(int sorted_row) const {
    return static_cast<int>(min(max(order[sorted_row], int64_t{0}), static_cast<int64_t>(num_pairs - 1)));
  }
  // The row of a tensor in `layout` that sorted row `sorted_row`, which holds `pair`, stands for.
  __device__ int row(Layout layout, int sorted_row, int pair) const {
    return layout == Layout::kSorted ? sorted_row : layout == Layout::kPair ? pair : pair / top_k;
  }
};

// Rows times the matrix of their expert: out = gate * in_row W, and dots = <in_row W, other_row>.
template <typename T>
struct RowsArguments {
  Plan plan;
  const T* in;         // (rows, depth) in in_layout
  const T* weight;     // (E, width, depth) or, if not kDepthMajor, (E, depth, width)
  const float* gates;  // (S,) by pair, or null
  T* out;              // (S, width) in out_layout, not kToken; or null
  const T* other;      // (rows, width) in other_layout, or null
  float* dots;         // (column tiles, S) by pair: the part of each column tile; null if other is
  Layout in_layout, out_layout, other_layout;
  int depth, width;
  bool vectorized;  // widths are multiples of 16 bytes, and tensors begin at such
};

struct RowTile {
  int expert;  // E: nobody; -1: there is no such tile
  int begin, end;
};

// An upper bound of the number of row tiles that needs no look at the offsets.
inline int64_t max_row_tiles(int64_t num_pairs, int64_t num_experts, int tile_rows) {
  const int64_t partial = num_experts + 1 < num_pairs ? num_experts + 1 : num_pairs;
  return num_pairs / tile_rows + partial;
}

// Finds the rows of a tile, tiles being counted expert by expert. By one warp; one of its lanes writes `found`.
template <int kTileRows>
__device__ inline void find_row_tile(const Plan& plan, int tile, RowTile* found) {
  const int lane = threadIdx.x % 32;
  int before = 0;
  for (int base = 0; base <= plan.num_experts; base += 32) {
    const int expert = base + lane;
    const int begin = expert <= plan.num_experts ? plan.begin(expert) : 0;
    const int end = expert <= plan.num_experts ? plan.end(expert) : 0;
    const int tiles = (end - begin + kTileRows - 1) / kTileRows;
    int prefix = tiles;
    for (int offset = 1; offset < 32; offset *= 2) {
      const int below = __shfl_up_sync(0xffffffffu, prefix, offset);
      if (lane >= offset) prefix += below;
    }
    const int index = tile - (before + prefix - tiles);
    if (index >= 0 && index < tiles) *found = {expert, begin + index * kTileRows, end};
    before += __shfl_sync(0xffffffffu, prefix, 31);
  }
  if (lane == 0 && tile >= before) *found = {-1, 0, 0};
}

template <typename T, typename Shape, bool kDepthMajor>
struct RowsKernel {
  using Product = BlockProduct<T, Shape, true, kDepthMajor>;
  static constexpr int kSharedBytes = Product::kSharedBytes + 2 * Shape::kRows * sizeof(int);
};

// Grid: row tiles times column tiles.
template <typename T, typename Shape, bool kDepthMajor>
__global__ void __launch_bounds__(Shape::kThreads) rows_kernel(const RowsArguments<T> args) {
  using Product = typename RowsKernel<T, Shape, kDepthMajor>::Product;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  __shared__ RowTile tile;
  int* pairs = reinterpret_cast<int*>(shared_memory + Product::kSharedBytes);  // of the tile's rows, -1 past its end
  int* in_rows = pairs + Shape::kRows;
  const Plan& plan = args.plan;
  const int column_tiles = (args.width + Shape::kColumns - 1) / Shape::kColumns;
  const int column_tile = blockIdx.x % column_tiles;
  const int first_column = column_tile * Shape::kColumns;

  if (threadIdx.x < 32) find_row_tile<Shape::kRows>(plan, blockIdx.x / column_tiles, &tile);
  __syncthreads();
  if (tile.expert < 0) return;
  const bool owned = tile.expert < plan.num_experts;
  for (int r = threadIdx.x; r < Shape::kRows; r += Shape::kThreads) {
    const int sorted_row = tile.begin + r;
    const int pair = sorted_row < tile.end ? plan.pair(sorted_row) : -1;
    pairs[r] = pair;
    in_rows[r] = pair < 0 ? -1 : plan.row(args.in_layout, sorted_row, pair);
  }
  __syncthreads();

  const T* weight = args.weight + static_cast<int64_t>(owned ? tile.expert : 0) * args.width * args.depth;
  auto load_step = [&](T* a, T* b, int, int step) {
    const int k = step * Shape::kDepth;
    auto row_of_in = [&](int r) -> const T* {
      return in_rows[r] < 0 ? nullptr : args.in + static_cast<int64_t>(in_rows[r]) * args.depth;
    };
    copy_tile<typename Product::TileA, Shape::kThreads>(a, row_of_in, k, args.depth, args.vectorized);
    const int weight_row = kDepthMajor ? first_column : k;
    const int weight_rows = kDepthMajor ? args.width : args.depth;
    const int weight_columns = kDepthMajor ? args.depth : args.width;
    auto row_of_weight = [&](int r) -> const T* {
      const int row = weight_row + r;
      return row < weight_rows ? weight + static_cast<int64_t>(row) * weight_columns : nullptr;
    };
    copy_tile<typename Product::TileB, Shape::kThreads>(b, row_of_weight, kDepthMajor ? k : first_column,
                                                        weight_columns, args.vectorized);
  };
  const int num_steps = owned ? (args.depth + Shape::kDepth - 1) / Shape::kDepth : 0;
  const float* sums = Product::template run<false>(shared_memory, num_steps, load_step, nullptr);

  constexpr int kThreadsPerRow = Shape::kColumns / kStoreWidth;
  static_assert(Shape::kRows * kThreadsPerRow % Shape::kThreads == 0);  // all lanes meet in the shuffles
  for (int i = threadIdx.x; i < Shape::kRows * kThreadsPerRow; i += Shape::kThreads) {
    const int r = i / kThreadsPerRow;
    const int column = i % kThreadsPerRow * kStoreWidth;
    const int count = pairs[r] < 0 ? 0 : args.width - first_column - column;
    const int sorted_row = tile.begin + r;
    float values[kStoreWidth];
#pragma unroll
    for (int j = 0; j < kStoreWidth; ++j) values[j] = sums[r * Product::kSumsStride + column + j];
    if (args.dots != nullptr) {
      float dot = 0.0f;
      if (owned && count > 0) {
        const int64_t row = plan.row(args.other_layout, sorted_row, pairs[r]);
        float others[kStoreWidth];
        load(others, args.other + row * args.width + first_column + column, count, args.vectorized);
        for (int j = 0; j < kStoreWidth; ++j) dot = fmaf(values[j], others[j], dot);
      }
      for (int offset = kThreadsPerRow / 2; offset > 0; offset /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, offset);
      if (column == 0 && pairs[r] >= 0) args.dots[static_cast<int64_t>(column_tile) * plan.num_pairs + pairs[r]] = dot;
    }
    if (args.out != nullptr && count > 0) {
      const float gate = args.gates == nullptr ? 1.0f : args.gates[pairs[r]];
      for (int j = 0; j < kStoreWidth; ++j) values[j] = owned ? values[j] * gate : 0.0f;
      const int64_t row = plan.row(args.out_layout, sorted_row, pairs[r]);
      store(args.out + row * args.width + first_column + column, values, count, args.vectorized);
    }
  }
}

// The gradient of the weights: out[e] (left_width, right_width) = sum over the rows of e of gate * left_row x
// right_row.
template <typename T>
struct OuterArguments {
  Plan plan;
  const T* left;       // (rows, left_width) in left_layout
  const T* right;      // (rows, right_width) in right_layout
  const float* gates;  // (S,) by pair, or null
  T* out;              // (E, left_width, right_width)
  Layout left_layout, right_layout;
  int left_width, right_width;
  bool vectorized;
};

template <typename T, typename Shape>
struct OuterKernel {
  using Product = BlockProduct<T, Shape, false, false>;
  static constexpr int kSharedBytes = Product::kSharedBytes + Product::kStages * Shape::kDepth * sizeof(float);
};

// Grid: experts times tiles of the matrix.
template <typename T, typename Shape, bool kGated>
__global__ void __launch_bounds__(Shape::kThreads) outer_kernel(const OuterArguments<T> args) {
  using Product = typename OuterKernel<T, Shape>::Product;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  float* scale = reinterpret_cast<float*>(shared_memory + Product::kSharedBytes);
  const Plan& plan = args.plan;
  const int column_tiles = (args.right_width + Shape::kColumns - 1) / Shape::kColumns;
  const int row_tiles = (args.left_width + Shape::kRows - 1) / Shape::kRows;
  const int expert = blockIdx.x / (row_tiles * column_tiles);
  const int first_row = blockIdx.x / column_tiles % row_tiles * Shape::kRows;
  const int first_column = blockIdx.x % column_tiles * Shape::kColumns;
  const int begin = plan.begin(expert);
  const int end = plan.end(expert);

  auto load_step = [&](T* a, T* b, int stage, int step) {
    const int first = begin + step * Shape::kDepth;
    auto row_of = [&](const T* rows, Layout layout, int width, int k) -> const T* {
      const int sorted_row = first + k;
      if (sorted_row >= end) return nullptr;
      return rows + static_cast<int64_t>(plan.row(layout, sorted_row, plan.pair(sorted_row))) * width;
    };
    copy_tile<typename Product::TileA, Shape::kThreads>(
        a, [&](int k) { return row_of(args.left, args.left_layout, args.left_width, k); }, first_row, args.left_width,
        args.vectorized);
    copy_tile<typename Product::TileB, Shape::kThreads>(
        b, [&](int k) { return row_of(args.right, args.right_layout, args.right_width, k); }, first_column,
        args.right_width, args.vectorized);
    if constexpr (kGated) {
      for (int k = threadIdx.x; k < Shape::kDepth; k += Shape::kThreads) {
        scale[stage * Shape::kDepth + k] = first + k < end ? args.gates[plan.pair(first + k)] : 0.0f;
      }
    }
  };
  const int num_steps = (end - begin + Shape::kDepth - 1) / Shape::kDepth;
  const float* sums = Product::template run<kGated>(shared_memory, num_steps, load_step, scale);

  T* out = args.out + static_cast<int64_t>(expert) * args.left_width * args.right_width;
  constexpr int kThreadsPerRow = Shape::kColumns / kStoreWidth;
  for (int i = threadIdx.x; i < Shape::kRows * kThreadsPerRow; i += Shape::kThreads) {
    const int r = i / kThreadsPerRow;
    const int column = i % kThreadsPerRow * kStoreWidth;
    const int count = first_row + r < args.left_width ? args.right_width - first_column - column : 0;
    if (count <= 0) continue;
    float values[kStoreWidth];
#pragma unroll
    for (int j = 0; j < kStoreWidth; ++j) values[j] = sums[r * Product::kSumsStride + column + j];
    store(out + static_cast<int64_t>(first_row + r) * args.right_width + first_column + column, values, count,
          args.vectorized);
  }
}

constexpr int kSumThreads = 256;

// out (N, width) = the sum over slots of rows (N * top_k, width), slot by slot. One thread, eight columns of a token.
template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    sum_slots_kernel(const T* __restrict__ rows, T* __restrict__ out, int64_t num_tokens, int top_k, int width,
                     bool vectorized) {
  const int threads_per_row = (width + kStoreWidth - 1) / kStoreWidth;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  const int64_t token = i / threads_per_row;
  if (token >= num_tokens) return;
  const int column = static_cast<int>(i % threads_per_row) * kStoreWidth;
  const int count = width - column;
  float total[kStoreWidth] = {};
  for (int slot = 0; slot < top_k; ++slot) {
    float values[kStoreWidth];
    load(values, rows + (token * top_k + slot) * width + column, count, vectorized);
#pragma unroll
    for (int j = 0; j < kStoreWidth; ++j) total[j] += values[j];
  }
  store(out + token * width + column, total, count, vectorized);
}

// out (size) = the sum over parts of (num_parts, size).
__global__ void __launch_bounds__(kSumThreads)
    sum_parts_kernel(const float* __restrict__ parts, float* __restrict__ out, int num_parts, int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i >= size) return;
  float total = 0.0f;
  for (int part = 0; part < num_parts; ++part) total += parts[part * size + i];
  out[i] = total;
}

}  // namespace modmoe
