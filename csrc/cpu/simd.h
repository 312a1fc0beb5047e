// Vectors of the compiler's own kind (GCC and Clang), so that one source serves every instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace modmoe {

// The widest vector registers that the target has.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// `Simd<float, 64>::V` holds 16 floats and `::I` 16 integers of the same size.
template <typename T, int Bytes>
struct Simd;

template <int Bytes>
struct Simd<float, Bytes> {
  typedef float V __attribute__((vector_size(Bytes)));
  typedef int32_t Int;
  typedef int32_t I __attribute__((vector_size(Bytes)));
  static constexpr int kLanes = Bytes / sizeof(float);
  static constexpr int kMantissaBits = 23;
  static constexpr int kExponentBias = 127;
  static constexpr int kExpTerms = 7;           // Taylor: relative error 5e-9 for |x| <= ln(2) / 2
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  static constexpr float kLowest = -87.0f;      // exp of less would be subnormal
};

template <int Bytes>
struct Simd<double, Bytes> {
  typedef double V __attribute__((vector_size(Bytes)));
  typedef int64_t Int;
  typedef int64_t I __attribute__((vector_size(Bytes)));
  static constexpr int kLanes = Bytes / sizeof(double);
  static constexpr int kMantissaBits = 52;
  static constexpr int kExponentBias = 1023;
  static constexpr int kExpTerms = 13;
  static constexpr double kRound = 6755399441055744.0;
  static constexpr double kLowest = -708.0;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct BFloat16 {
  uint16_t bits;
};

// The value of a stored number.
inline float number(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

// By halves: few instructions, and an order that does not depend on the compiler.
template <typename T, int Bytes>
inline T sum_of_lanes(typename Simd<T, Bytes>::V v) {
  if constexpr (Bytes > 16) {
    struct Halves {
      typename Simd<T, Bytes / 2>::V low, high;
    };
    const Halves halves = bit_cast<Halves>(v);
    return sum_of_lanes<T, Bytes / 2>(halves.low + halves.high);
  } else {
    T sum = v[0];
    for (int lane = 1; lane < Simd<T, Bytes>::kLanes; ++lane) sum += v[lane];
    return sum;
  }
}

// Vectors at addresses of any alignment.
template <class V, typename T>
inline V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V, typename T>
inline void store(T* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

// As many numbers as there are, up to a whole vector; zero in the other lanes.
template <class V, typename T>
inline V load_some(const T* from, int64_t count) {
  if (count * sizeof(T) == sizeof(V)) return load<V>(from);
  V v{};
  std::memcpy(&v, from, count * sizeof(T));
  return v;
}

template <class V, typename T>
inline void store_some(T* to, V v, int64_t count) {
  if (count * sizeof(T) == sizeof(V)) return store(to, v);
  std::memcpy(to, &v, count * sizeof(T));
}

// Number i of a row of vectors.
template <typename T, class V>
inline T lane_of(const V* row, int64_t i) {
  return load<T>(reinterpret_cast<const T*>(row) + i);
}

// The first (High: second) halves of a and b, by turns: a0 b0 a1 b1 ...
template <bool High, typename T, int Bytes, int... Lane>
inline typename Simd<T, Bytes>::V interleave(typename Simd<T, Bytes>::V a, typename Simd<T, Bytes>::V b,
                                             std::integer_sequence<int, Lane...>) {
  constexpr int L = Simd<T, Bytes>::kLanes, kFirst = High ? L / 2 : 0;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (kFirst + Lane / 2 + Lane % 2 * L)...);
#else
  return __builtin_shuffle(a, b, typename Simd<T, Bytes>::I{(kFirst + Lane / 2 + Lane % 2 * L)...});
#endif
}

// Transposes the square of as many vectors as one has lanes: log2(lanes) perfect shuffles.
template <typename T, int Bytes>
inline void transpose(typename Simd<T, Bytes>::V* square) {
  using V = typename Simd<T, Bytes>::V;
  constexpr int L = Simd<T, Bytes>::kLanes;
  constexpr auto kLanes = std::make_integer_sequence<int, L>();
#pragma GCC unroll 4
  for (int round = 1; round < L; round *= 2) {
    V shuffled[L];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      shuffled[2 * i] = interleave<false, T, Bytes>(square[i], square[i + L / 2], kLanes);
      shuffled[2 * i + 1] = interleave<true, T, Bytes>(square[i], square[i + L / 2], kLanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) square[i] = shuffled[i];
  }
}

// exp(x) for x <= 0, at least exp(kLowest): 2^n * exp(f) with n an integer and |f| <= ln(2) / 2.
template <typename T, int Bytes>
inline typename Simd<T, Bytes>::V exp_nonpositive(typename Simd<T, Bytes>::V x) {
  using S = Simd<T, Bytes>;
  using V = typename S::V;
  using I = typename S::I;
  constexpr T kLog2e = T(1.44269504088896340736);
  // ln(2) in two parts, the first short enough for n times it to be exact.
  constexpr T kLn2High = sizeof(T) == 4 ? T(0.693359375) : T(6.93147180369123816490e-01);
  constexpr T kLn2Low = sizeof(T) == 4 ? T(-2.12194440054690583e-4) : T(1.90821492927058770002e-10);
  const V lowest = V{} + S::kLowest;
  x = x < lowest ? lowest : x;
  const V shifted = x * kLog2e + S::kRound;
  const V n = shifted - S::kRound;
  const V f = (x - n * kLn2High) - n * kLn2Low;
  V result = V{} + T(1);
#pragma GCC unroll 16
  for (int term = S::kExpTerms; term > 0; --term) result = result * (f * (T(1) / T(term))) + T(1);
  const I exponent = bit_cast<I>(shifted) - bit_cast<I>(V{} + S::kRound) + S::kExponentBias;
  return result * bit_cast<V>(exponent << S::kMantissaBits);
}

// sigmoid(z) and 1 - sigmoid(z), each exact to rounding: the smaller as a product, the larger as its difference from 1,
// which rounds by less than 1 / (1 + e) does (the roundings of thousands of factors near 1 add up).
template <typename T, int Bytes>
inline void sigmoid(typename Simd<T, Bytes>::V z, typename Simd<T, Bytes>::V& beta, typename Simd<T, Bytes>::V& rest) {
  using V = typename Simd<T, Bytes>::V;
  const auto positive = z >= T(0);
  const V e = exp_nonpositive<T, Bytes>(positive ? -z : z);
  const V smaller = e / (T(1) + e);
  const V larger = T(1) - smaller;
  beta = positive ? larger : smaller;
  rest = positive ? smaller : larger;
}

}  // namespace modmoe
