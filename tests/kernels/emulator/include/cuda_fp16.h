// Stand-in for the CUDA header of this name.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const unsigned sign = (x.bits & 0x8000u) << 16;
  const unsigned rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000u | (rest & 0x3ff) << 13);
  // Exponent and fraction moved to a float's places; the product mends the exponent's bias, subnormals included.
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest << 13) * 0x1p112f));
}

inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (x != x) return {static_cast<uint16_t>(sign | 0x7e00)};
  const float size = std::fabs(x);
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};  // halfway to what would be the next number
  int exponent = 0;
  std::frexp(size, &exponent);
  const int binade = exponent < -13 ? -13 : exponent;  // subnormals have the step of the smallest normal binade
  const int steps =
      static_cast<int>(std::nearbyint(std::ldexp(size, 11 - binade)));    // 1024..2048, or less; ties to even
  const int bits = steps < 1024 ? steps : ((binade + 13) << 10) + steps;  // 2048 carries into the exponent
  return {static_cast<uint16_t>(sign | bits)};
}
