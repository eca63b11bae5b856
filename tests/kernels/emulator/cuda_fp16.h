// float16: storage and conversions. Arithmetic is left out on purpose: kernels compute in float.
#pragma once

#include "cuda_runtime.h"

struct __align__(2) __half {
  unsigned short bits;

  __half() = default;
  __half(float value);
  operator float() const;
};

inline __half __ushort_as_half(unsigned short bits) {
  __half value;
  value.bits = bits;
  return value;
}
inline unsigned short __half_as_ushort(__half value) { return value.bits; }

inline float __half2float(__half value) {
  const unsigned magnitude = value.bits & 0x7FFF, sign = unsigned(value.bits & 0x8000) << 16;
  if (magnitude < 0x0400) return copysignf(float(magnitude) * 0x1p-24f, __uint_as_float(sign));  // subnormal
  const unsigned exponent_shift = magnitude < 0x7C00 ? 127 - 15 : 255 - 31;                      // or infinite, NaN
  return __uint_as_float(sign | ((magnitude << 13) + (exponent_shift << 23)));
}

inline __half __float2half_rn(float value) {  // to the nearest, of two the even one
  const unsigned sign = __float_as_uint(value) >> 16 & 0x8000;
  const float magnitude = fabsf(value);
  if (value != value) return __ushort_as_half(0x7FFF);
  if (magnitude >= 65520) return __ushort_as_half(sign | 0x7C00);
  if (magnitude < 0x1p-14f) return __ushort_as_half(sign | unsigned(rintf(magnitude * 0x1p24f)));  // subnormal
  const unsigned bits = __float_as_uint(magnitude) - ((127 - 15) << 23);
  return __ushort_as_half(sign | ((bits + 0x0FFF + (bits >> 13 & 1)) >> 13));
}
inline __half __float2half(float value) { return __float2half_rn(value); }

inline __half::__half(float value) : __half(__float2half_rn(value)) {}
inline __half::operator float() const { return __half2float(*this); }

using half = __half;

#define EMULATED_HALF __half
#define EMULATED_HALF2 __half2
#define EMULATED_NAME(before, after) before##half##after
#include "emulated_pairs.h"
using half2 = __half2;
