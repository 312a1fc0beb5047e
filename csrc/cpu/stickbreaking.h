// Stick-breaking attention on the CPU: forward and backward in tiles of rows, one thread per strip of tiles.
//
//   A_ij  = sigmoid(z_ij) prod_{j<l<=i} (1 - sigmoid(z_il)),   z = scale * q k^T
//   out_i = sum_j A_ij v_j,   rem_i = prod_{l<=i} (1 - sigmoid(z_il))
//   dz_ij = a_ij - sigmoid(z_ij) * (rem_i drem_i + sum_{l<=j} a_il),   a_ij = A_ij <dout_i, v_j>
//
// A row is a query of one head; all query heads that share a key/value head lie side by side, row = t * groups + g. In
// a tile the rows are the lanes of vectors and the keys are walked one by one, newest first: the scan along keys, which
// is what makes this attention slow elsewhere, is then one multiplication per vector and needs no shuffle.
//
// Keys and values may be stored in another type than T, in which everything is computed: a bf16 cache is converted block
// by block as it is read, and what early stop leaves out not at all.
//
// The file knows no torch. Letters: B batch, T queries, S keys, D head dim; tensors are given by pointer and strides.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "simd.h"
#include "tile_gemm.h"

namespace modmoe {

// Small, because sticks are looked at once per block, to stop early; a multiple of NarrowTile::kRows. The benchmark of
// trained weights counts blocks of this size.
constexpr int kKeyBlock = 24;

// A (B, heads, length, D) tensor whose last dimension is contiguous; strides count elements.
template <typename T>
struct Heads {
  T* data;
  int64_t batch_stride, head_stride, row_stride;

  T* at(int64_t b, int64_t head, int64_t row = 0) const {
    return data + b * batch_stride + head * head_stride + row * row_stride;
  }
};

template <typename T, typename Stored = T>
struct Attention {
  int64_t batch, query_heads, kv_heads, queries, keys, dim;
  Heads<const T> q;
  Heads<const Stored> k, v;
  const bool* key_mask;           // (B, S), or null: all keys
  const int64_t* document_start;  // (B, T), or null: from key 0
  const int64_t* lengths;         // (B), keys of each sequence, whose queries are the last T of them; or null: S
  T scale;
  bool attend_current;
  T stop_below;  // a tile whose sticks are all shorter reads no older keys; 0: read all

  int64_t groups() const { return query_heads / kv_heads; }
  int64_t rows() const { return queries * groups(); }
  int64_t problems() const { return batch * kv_heads; }
};

// Up to `kRows` rows of one key/value head, and what each may see. `Wide` vectors of `Bytes` bytes hold the rows.
template <typename T, int Bytes, int Wide, typename Stored = T>
struct Tile {
  using S = Simd<T, Bytes>;
  using V = typename S::V;
  using I = typename S::I;
  static constexpr int kRows = Wide * S::kLanes;

  static constexpr int kLanes = S::kLanes;
  using Lane = typename S::Int;

  const Attention<T, Stored>& p;
  int64_t b, kv_head, row0;
  int count;
  int64_t query[kRows], head[kRows];  // of each row
  I first[Wide], last[Wide];          // keys that each row may see; none (last = -1) in lanes without a row
  int64_t oldest, newest;     // over all rows
  int64_t clear_from, clear_to;  // keys that every row may see

  Tile(const Attention<T, Stored>& problem, int64_t n, int64_t tile)
      : p(problem), b(n / problem.kv_heads), kv_head(n % problem.kv_heads), row0(tile * kRows) {
    count = int(std::min<int64_t>(kRows, p.rows() - row0));
    oldest = clear_to = p.keys;
    newest = -1, clear_from = 0;
    Lane from[kRows], to[kRows];
    std::fill_n(from, kRows, 0), std::fill_n(to, kRows, -1);
    int64_t t = row0 / p.groups(), group = row0 % p.groups();
    const int64_t before = (p.lengths ? p.lengths[b] : p.keys) - p.queries;
    for (int r = 0; r < count; ++r) {
      query[r] = t, head[r] = kv_head * p.groups() + group;
      // At most S, which means none: the lanes of float tiles hold 32 bits.
      if (p.document_start) from[r] = Lane(std::clamp<int64_t>(p.document_start[b * p.queries + t], 0, p.keys));
      to[r] = Lane(before + t - !p.attend_current);
      oldest = std::min<int64_t>(oldest, from[r]), newest = std::max<int64_t>(newest, to[r]);
      clear_from = std::max<int64_t>(clear_from, from[r]), clear_to = std::min<int64_t>(clear_to, to[r]);
      if (++group == p.groups()) group = 0, ++t;
    }
    std::memcpy(first, from, sizeof first), std::memcpy(last, to, sizeof last);
  }

  bool sees_all(int64_t from, int64_t to) const { return clear_from <= from && to - 1 <= clear_to; }

  // True if no row may see any of these keys, because they do not exist.
  bool hides_all(int64_t from, int64_t to) const {
    if (!p.key_mask) return false;
    const bool* const mask = p.key_mask + b * p.keys;
    return std::none_of(mask + from, mask + to, [](bool exists) { return exists; });
  }

  Left<T, false> keys(int64_t from, int64_t to) const { return block<false>(p.k, from, to); }
  Left<T, false> values(int64_t from, int64_t to) const { return block<false>(p.v, from, to); }
  Left<T, true> keys_by_dim(int64_t from, int64_t to) const { return block<true>(p.k, from, to); }
  Left<T, true> values_by_dim(int64_t from, int64_t to) const { return block<true>(p.v, from, to); }

  // Rows [from, to) of keys or values, where they lie; converted ones until the next call.
  template <bool Transposed>
  Left<T, Transposed> block(const Heads<const Stored>& x, int64_t from, int64_t to) const {
    if constexpr (std::is_same_v<T, Stored>) {
      return {x.at(b, kv_head, from), x.row_stride};
    } else {
      thread_local std::vector<T> converted;
      converted.resize((to - from) * p.dim);
      for (int64_t j = from; j < to; ++j) {
        const Stored* const row = x.at(b, kv_head, j);
        T* const copy = converted.data() + (j - from) * p.dim;
        for (int64_t d = 0; d < p.dim; ++d) copy[d] = number(row[d]);
      }
      return {converted.data(), p.dim};
    }
  }

  const T* row_of(const Heads<const T>& x, int r) const { return x.at(b, head[r], query[r]); }

  // (rows, D) -> columns (D, rows): the lanes are rows, zero in those without one.
  void load_columns(const Heads<const T>& x, T factor, V* columns) const {
    for (int w = 0; w < Wide; ++w)
      for (int64_t d = 0; d < p.dim; d += kLanes) {
        const int64_t width = std::min<int64_t>(kLanes, p.dim - d);
        V square[kLanes];
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes; ++lane) {
          const int r = w * kLanes + lane;
          square[lane] = r < count ? load_some<V>(row_of(x, r) + d, width) * factor : V{};
        }
        transpose<T, Bytes>(square);
        for (int64_t i = 0; i < width; ++i) columns[(d + i) * Wide + w] = square[i];
      }
  }

  void store_columns(const V* columns, T factor, const Heads<T>& x) const {
    for (int w = 0; w < Wide; ++w)
      for (int64_t d = 0; d < p.dim; d += kLanes) {
        const int64_t width = std::min<int64_t>(kLanes, p.dim - d);
        V square[kLanes] = {};
        for (int64_t i = 0; i < width; ++i) square[i] = columns[(d + i) * Wide + w] * factor;
        transpose<T, Bytes>(square);
        for (int lane = 0; lane < kLanes && w * kLanes + lane < count; ++lane) {
          const int r = w * kLanes + lane;
          store_some(x.at(b, head[r], query[r]) + d, square[lane], width);
        }
      }
  }

  // (rows, D) -> (rows, dim_vectors): the lanes are dimensions.
  void load_rows(const Heads<const T>& x, T factor, V* rows, int dim_vectors) const {
    for (int r = 0; r < count; ++r)
      for (int v = 0; v < dim_vectors; ++v)
        rows[r * dim_vectors + v] =
            load_some<V>(row_of(x, r) + v * kLanes, std::min<int64_t>(kLanes, p.dim - v * kLanes)) * factor;
  }

  int64_t remainder_at(int r) const { return (b * p.query_heads + head[r]) * p.queries + query[r]; }

  void start_sticks(V* stick) const {
    T whole[kRows];
    for (int r = 0; r < kRows; ++r) whole[r] = r < count;
    std::memcpy(stick, whole, sizeof whole);
  }

  // True if no key before `from` can still matter. Lanes without a row see no keys; their sticks may be anything.
  bool used_up(const V* stick, int64_t from) const {
    Lane done = -1;
    for (int w = 0; w < Wide; ++w) {
      const I useless = (stick[w] < p.stop_below) | (first[w] >= I{} + Lane(from)) | (last[w] < 0);
      for (int lane = 0; lane < kLanes; ++lane) done &= useless[lane];
    }
    return done;
  }

  // Break the sticks at keys [from, to), newest first. In: z, (to - from, rows). Out: weights, over z; and, if not
  // null, the sigmoids.
  void break_sticks(V* z, V* sigmoids, V* stick, int64_t from, int64_t to) const {
    if (sees_all(from, to))
      break_sticks<false>(z, sigmoids, stick, from, to);
    else
      break_sticks<true>(z, sigmoids, stick, from, to);
  }

  template <bool Ragged>
  void break_sticks(V* z, V* sigmoids, V* stick, int64_t from, int64_t to) const {
    const bool* mask = p.key_mask ? p.key_mask + b * p.keys : nullptr;
    for (int64_t j = to - 1; j >= from; --j) {
      V* row = z + (j - from) * Wide;
      const bool hidden = mask && !mask[j];
      for (int w = 0; w < Wide; ++w) {
        V beta{}, rest = V{} + T(1);
        if (!hidden) {
          sigmoid<T, Bytes>(row[w], beta, rest);
          if (Ragged) {
            const I key = I{} + Lane(j);
            const I visible = (first[w] <= key) & (key <= last[w]);
            beta = visible ? beta : V{};
            rest = visible ? rest : V{} + T(1);
          }
        }
        row[w] = beta * stick[w];
        if (sigmoids) sigmoids[(j - from) * Wide + w] = beta;
        stick[w] *= rest;
      }
    }
  }
};

// Rows that one tile holds: few where there are few, as in decoding, so that lanes are not wasted.
template <typename T, class Run>
void with_tile_size(int64_t rows, Run run) {
  if (rows * sizeof(T) <= 16)
    run(std::integral_constant<int, 16>{}, std::integral_constant<int, 1>{});
  else if (rows * sizeof(T) <= kVectorBytes)
    run(std::integral_constant<int, kVectorBytes>{}, std::integral_constant<int, 1>{});
  else
    run(std::integral_constant<int, kVectorBytes>{}, std::integral_constant<int, 2>{});
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class TileType, typename T>
void forward_tile(const TileType& tile, const Heads<T>& out, T* remainder) {
  using V = typename TileType::V;
  constexpr int kWide = TileType::kRows / TileType::S::kLanes;
  const auto& p = tile.p;
  thread_local std::vector<V> memory;
  memory.resize((2 * p.dim + kKeyBlock) * kWide);
  V* const queries = memory.data();
  V* const sum = queries + p.dim * kWide;
  V* const z = sum + p.dim * kWide;
  V stick[kWide];
  tile.load_columns(p.q, p.scale, queries);
  std::fill_n(sum, p.dim * kWide, V{});
  tile.start_sticks(stick);
  for (int64_t to = tile.newest + 1, from; to > tile.oldest; to = from) {
    from = std::max(tile.oldest, to - kKeyBlock);
    if (tile.hides_all(from, to)) continue;
    const int block = int(to - from);
    gemm<NarrowTile>(tile.keys(from, to), queries, kWide, z, kWide, block, kWide, p.dim, false);
    tile.break_sticks(z, static_cast<V*>(nullptr), stick, from, to);
    gemm<NarrowTile>(tile.values_by_dim(from, to), z, kWide, sum, kWide, int(p.dim), kWide, block, true);
    if (tile.used_up(stick, from)) break;
  }
  tile.store_columns(sum, 1, out);
  for (int r = 0; r < tile.count; ++r) remainder[tile.remainder_at(r)] = lane_of<T>(stick, r);
}

// Decoding: so few rows that they would leave most lanes empty. Here the lanes are dimensions and whole vectors of keys
// and values are read, once for all rows, which makes it as fast as memory. It needs a D that fills vectors.
template <typename T, typename Stored>
struct Few {
  using S = Simd<T, kVectorBytes>;
  using V = typename S::V;
  using TileType = Tile<T, 16, 1, Stored>;
  static constexpr int kBlock = 64;  // keys: enough to hide what a block costs beside so few rows

  static bool fits(const Attention<T, Stored>& p) { return p.rows() <= TileType::kRows && p.dim % S::kLanes == 0; }

  // z (keys, rows) = keys (keys, D) times queries (rows, D).
  static void scores(Left<T, false> keys, const V* queries, int rows, int vectors, int block, T* z) {
    for (int j = 0; j < block; ++j)
      for (int r = 0; r < rows; ++r) {
        V sum{};
        for (int d = 0; d < vectors; ++d)
          sum += load<V>(&keys.data[j * keys.stride + d * S::kLanes]) * queries[r * vectors + d];
        z[j * TileType::kRows + r] = sum_of_lanes<T, kVectorBytes>(sum);
      }
  }

  // sums (rows, D) += weights (keys, rows) times values (keys, D), `Vectors` of each row at a time.
  template <int Rows, int Vectors>
  static void add(Left<T, false> values, const T* weights, int first, int vectors, int block, V* sums) {
    V sum[Rows][Vectors];
    for (int r = 0; r < Rows; ++r)
      for (int d = 0; d < Vectors; ++d) sum[r][d] = sums[r * vectors + first + d];
    for (int j = 0; j < block; ++j)
#pragma GCC unroll 4
      for (int d = 0; d < Vectors; ++d) {
        const V value = load<V>(&values.data[j * values.stride + (first + d) * S::kLanes]);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) sum[r][d] += weights[j * TileType::kRows + r] * value;
      }
    for (int r = 0; r < Rows; ++r)
      for (int d = 0; d < Vectors; ++d) sums[r * vectors + first + d] = sum[r][d];
  }

  template <int Rows>
  static void forward(const TileType& tile, const Heads<T>& out, T* remainder) {
    const Attention<T, Stored>& p = tile.p;
    const int vectors = int(p.dim / S::kLanes);
    std::vector<V> memory(2 * Rows * vectors);
    V* const queries = memory.data();
    V* const sums = queries + Rows * vectors;
    typename TileType::V z[kBlock] = {}, stick[1];
    T* const numbers = reinterpret_cast<T*>(z);
    for (int r = 0; r < Rows; ++r)
      for (int d = 0; d < vectors; ++d)
        queries[r * vectors + d] = load<V>(tile.row_of(p.q, r) + d * S::kLanes) * p.scale;
    tile.start_sticks(stick);
    for (int64_t to = tile.newest + 1, from; to > tile.oldest; to = from) {
      from = std::max(tile.oldest, to - kBlock);
      if (tile.hides_all(from, to)) continue;
      const int block = int(to - from);
      scores(tile.keys(from, to), queries, Rows, vectors, block, numbers);
      tile.break_sticks(z, static_cast<typename TileType::V*>(nullptr), stick, from, to);
      const Left<T, false> values = tile.values(from, to);
      int d = 0;
      for (; d + 4 <= vectors; d += 4) add<Rows, 4>(values, numbers, d, vectors, block, sums);
      for (; d < vectors; ++d) add<Rows, 1>(values, numbers, d, vectors, block, sums);
      if (tile.used_up(stick, from)) break;
    }
    for (int r = 0; r < Rows; ++r) {
      std::memcpy(out.at(tile.b, tile.head[r], tile.query[r]), sums + r * vectors, p.dim * sizeof(T));
      remainder[tile.remainder_at(r)] = stick[0][r];
    }
  }

  static void forward(const TileType& tile, const Heads<T>& out, T* remainder) {
    if constexpr (TileType::kRows == 4) {
      if (tile.count == 4) return forward<4>(tile, out, remainder);
      if (tile.count == 3) return forward<3>(tile, out, remainder);
    }
    return tile.count == 2 ? forward<2>(tile, out, remainder) : forward<1>(tile, out, remainder);
  }
};

// `parallel(n, f)` calls f(0) ... f(n - 1), on at most n threads.
template <typename T, typename Stored, class Parallel>
void forward(const Attention<T, Stored>& p, const Heads<T>& out, T* remainder, int threads, Parallel parallel) {
  with_tile_size<T>(p.rows(), [&](auto bytes, auto wide) {
    using TileType = Tile<T, bytes(), wide(), Stored>;
    const int64_t units = p.problems() * divide_up(p.rows(), TileType::kRows);
    // Later rows see more keys: strips take every threads-th tile, so that all have the same work.
    parallel(threads, [&](int64_t strip) {
      for (int64_t unit = strip; unit < units; unit += threads) {
        const TileType tile(p, unit % p.problems(), unit / p.problems());
        if constexpr (std::is_same_v<TileType, typename Few<T, Stored>::TileType>)
          if (Few<T, Stored>::fits(p)) {
            Few<T, Stored>::forward(tile, out, remainder);
            continue;
          }
        forward_tile(tile, out, remainder);
      }
    });
  });
}

template <typename T>
struct Gradients {
  Heads<const T> dout;
  const T* drem;  // (B, Hq, T)
  Heads<T> dq;    // (B, Hq, T, D)
  T* dk;          // (B, Hkv, S, D), zero before, aligned to a vector
  T* dv;
};

// Adds to dk and dv, both (S, dim_vectors) with dimensions in the lanes, and writes dq.
template <class TileType, typename T>
void backward_tile(const TileType& tile, const Gradients<T>& g, typename TileType::V* dk, typename TileType::V* dv,
                   int dim_vectors) {
  using V = typename TileType::V;
  constexpr int kWide = TileType::kRows / TileType::S::kLanes;
  constexpr int kRows = TileType::kRows;
  constexpr int kLanes = TileType::S::kLanes;
  const Attention<T>& p = tile.p;
  const int64_t span = std::max<int64_t>(0, tile.newest + 1 - tile.oldest);
  thread_local std::vector<V> memory, rows;
  memory.resize((2 * p.dim + kKeyBlock) * kWide);
  rows.resize(2 * kRows * dim_vectors);
  V* const columns = memory.data();  // queries, then the gradient of the output
  V* const dq = columns + p.dim * kWide;
  V* const dweights = dq + p.dim * kWide;
  V* const query_rows = rows.data();
  V* const dout_rows = query_rows + kRows * dim_vectors;
  // Weights and sigmoids of all keys that are read: the weights need the sticks from the right, their gradient sums
  // from the left, and neither may be derived as a total minus the other (it cancels where sigmoids saturate).
  thread_local std::vector<V> weights, sigmoids;
  if (int64_t(weights.size()) < span * kWide) weights.resize(span * kWide), sigmoids.resize(span * kWide);

  tile.load_columns(p.q, p.scale, columns);
  std::fill_n(dq, p.dim * kWide, V{});
  tile.load_rows(p.q, p.scale, query_rows, dim_vectors);
  tile.load_rows(g.dout, 1, dout_rows, dim_vectors);
  V stick[kWide];
  tile.start_sticks(stick);
  int64_t stop = tile.oldest;
  for (int64_t to = tile.newest + 1, from; to > tile.oldest; to = from) {
    from = std::max(tile.oldest, to - kKeyBlock);
    V* const z = weights.data() + (from - tile.oldest) * kWide;
    gemm<NarrowTile>(tile.keys(from, to), columns, kWide, z, kWide, int(to - from), kWide, p.dim, false);
    tile.break_sticks(z, sigmoids.data() + (from - tile.oldest) * kWide, stick, from, to);
    if (tile.used_up(stick, from)) {
      stop = from;
      break;
    }
  }

  V taken[kWide];  // rem drem + sum of a over the keys so far
  T drem[kRows] = {};
  for (int r = 0; r < tile.count; ++r) drem[r] = g.drem[tile.remainder_at(r)];
  for (int w = 0; w < kWide; ++w) taken[w] = stick[w] * load<V>(drem + w * kLanes);
  tile.load_columns(g.dout, 1, columns);
  for (int64_t from = stop, to; from <= tile.newest; from = to) {
    to = std::min(tile.newest + 1, from + kKeyBlock);
    const int block = int(to - from);
    V* const w = weights.data() + (from - tile.oldest) * kWide;
    const V* const beta = sigmoids.data() + (from - tile.oldest) * kWide;
    const Left<T, false> weight_rows{reinterpret_cast<const T*>(w), kRows};
    gemm<NarrowTile>(tile.values(from, to), columns, kWide, dweights, kWide, block, kWide, p.dim, false);
    gemm<NarrowTile>(weight_rows, dout_rows, dim_vectors, dv + from * dim_vectors, dim_vectors, block, dim_vectors,
                     tile.count, true);
    for (int i = 0; i < block * kWide; ++i) {
      const V a = w[i] * dweights[i];
      taken[i % kWide] += a;
      w[i] = a - beta[i] * taken[i % kWide];  // from here on the gradient of z
    }
    gemm<NarrowTile>(weight_rows, query_rows, dim_vectors, dk + from * dim_vectors, dim_vectors, block, dim_vectors,
                     tile.count, true);
    gemm<NarrowTile>(tile.keys_by_dim(from, to), w, kWide, dq, kWide, int(p.dim), kWide, block, true);
  }
  tile.store_columns(dq, p.scale, g.dq);
}

// to (count, dim) += rows of vectors, the last of which may be partly used.
template <class V, typename T>
void add_rows(const V* rows, int64_t count, int64_t dim, T* to) {
  constexpr int64_t kLanes = sizeof(V) / sizeof(T);
  for (int64_t j = 0; j < count; ++j, to += dim)
    for (int64_t d = 0; d < dim; d += kLanes, ++rows) {
      const int64_t width = std::min(kLanes, dim - d);
      store_some(to + d, load_some<V>(to + d, width) + *rows, width);
    }
}

template <typename T, class Parallel>
void backward(const Attention<T>& p, const Gradients<T>& g, int threads, Parallel parallel) {
  with_tile_size<T>(p.rows(), [&](auto bytes, auto wide) {
    using TileType = Tile<T, bytes(), wide()>;
    using V = typename TileType::V;
    constexpr int kLanes = TileType::S::kLanes;
    const int dim_vectors = int(divide_up(p.dim, kLanes));
    const int64_t tiles = divide_up(p.rows(), TileType::kRows), size = p.keys * dim_vectors;
    // All tiles of a problem add to the same dk and dv. Where there are fewer problems than threads, each is split in
    // strips with sums of their own, added in order afterwards: the same bits for the same number of threads.
    const int64_t strips = std::min(tiles, divide_up(threads, p.problems()));
    if (strips == 1 && p.dim % kLanes == 0) {
      parallel(p.problems(), [&](int64_t n) {
        V* const dk = reinterpret_cast<V*>(g.dk) + n * size;
        V* const dv = reinterpret_cast<V*>(g.dv) + n * size;
        for (int64_t i = 0; i < tiles; ++i) backward_tile(TileType(p, n, i), g, dk, dv, dim_vectors);
      });
      return;
    }
    std::vector<V> sums(2 * p.problems() * strips * size);
    parallel(p.problems() * strips, [&](int64_t unit) {
      const int64_t n = unit / strips;
      V* const dk = sums.data() + 2 * unit * size;
      for (int64_t i = unit % strips; i < tiles; i += strips)
        backward_tile(TileType(p, n, i), g, dk, dk + size, dim_vectors);
    });
    parallel(p.problems(), [&](int64_t n) {
      for (int64_t s = 0; s < strips; ++s) {
        const V* const dk = sums.data() + 2 * (n * strips + s) * size;
        add_rows(dk, p.keys, p.dim, g.dk + n * p.keys * p.dim);
        add_rows(dk + size, p.keys, p.dim, g.dv + n * p.keys * p.dim);
      }
    });
  });
}

}  // namespace modmoe
