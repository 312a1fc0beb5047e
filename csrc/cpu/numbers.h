// How numbers of a type are multiplied and summed.
//
// A lane takes one *word* at a time: kStep numbers that are neighbours along the sum.
#pragma once

#include <cstdint>

#include "simd.h"

// bf16 is taken on processors with AVX512-BF16, which multiplies it in pairs, and without AMX tiles, which have several
// times that arithmetic: there, torch's own products use them.
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define MODMOE_TAKES_BF16 1
#include <immintrin.h>
#else
#define MODMOE_TAKES_BF16 0
#endif

namespace modmoe {

template <typename T>
struct Numbers {
  using Sum = T;
  using Word = T;
  using V = typename Simd<T, kVectorBytes>::V;
  static constexpr int kStep = 1;

  // As many numbers as there are lanes.
  static V read(const T* from) { return load<V>(from); }
  static void write(T* to, V v) { store(to, v); }

  // Words of rows that are `stride` apart.
  static V words(const T* row, int64_t) { return load<V>(row); }
  // Words of the first of `count` rows, from column `at` on, times the rows' factors.
  static V words(const T* const* rows, int64_t, int64_t at, const T* factors) {
    return load<V>(rows[0] + at) * factors[0];
  }
  static void multiply_add(V& sum, V a, V b) { sum += a * b; }
};

#if MODMOE_TAKES_BF16

struct Pair {
  BFloat16 first, second;
};

template <>
struct Numbers<BFloat16> {
  using Sum = float;
  using Word = Pair;
  using V = Simd<float, kVectorBytes>::V;  // sums, or the bits of words
  static constexpr int kStep = 2;

  static V read(const BFloat16* from) { return as<V>(_mm512_slli_epi32(widened(load<__m256i>(from)), 16)); }
  static void write(BFloat16* to, V v) { store(to, rounded(v)); }

  static V words(const BFloat16* row, int64_t stride) {
    return paired(load<__m256i>(row), load<__m256i>(row + stride));
  }
  static V words(const BFloat16* const* rows, int64_t count, int64_t at, const float* factors) {
    const __m256i first = rounded(read(rows[0] + at) * factors[0]);
    return paired(first, count > 1 ? rounded(read(rows[1] + at) * factors[1]) : __m256i{});
  }
  static void multiply_add(V& sum, V a, V b) {
    sum = as<V>(_mm512_dpbf16_ps(as<__m512>(sum), as<__m512bh>(a), as<__m512bh>(b)));
  }

 private:
  template <class To, class From>
  static To as(From x) {
    return bit_cast<To>(x);
  }
  static __m512i widened(__m256i x) { return _mm512_cvtepu16_epi32(x); }
  static __m256i rounded(V v) { return as<__m256i>(_mm512_cvtneps_pbh(as<__m512>(v))); }
  static V paired(__m256i first, __m256i second) {
    return as<V>(_mm512_or_si512(widened(first), _mm512_slli_epi32(widened(second), 16)));
  }
};

// As `multiply_add` of tile_gemm.h.
inline void multiply_add(Numbers<BFloat16>::V& sum, Pair factor, Numbers<BFloat16>::V row) {
  Numbers<BFloat16>::multiply_add(sum, bit_cast<Numbers<BFloat16>::V>(_mm512_set1_epi32(bit_cast<int>(factor))), row);
}

#endif

}  // namespace modmoe
