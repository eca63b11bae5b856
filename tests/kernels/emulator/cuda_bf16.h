// bfloat16: storage and conversions. Arithmetic is left out on purpose: kernels compute in float.
#pragma once

#include "cuda_runtime.h"

struct __align__(2) __nv_bfloat16 {
  unsigned short bits;

  __nv_bfloat16() = default;
  __nv_bfloat16(float value);
  operator float() const { return __uint_as_float(unsigned(bits) << 16); }
};

inline float __bfloat162float(__nv_bfloat16 value) { return value; }

inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  __nv_bfloat16 value;
  value.bits = bits;
  return value;
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }

inline __nv_bfloat16 __float2bfloat16_rn(float value) {  // to the nearest, of two the even one
  const unsigned bits = __float_as_uint(value);
  if (value != value) return __ushort_as_bfloat16(0x7FFF);
  return __ushort_as_bfloat16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }
inline __nv_bfloat16::__nv_bfloat16(float value) : __nv_bfloat16(__float2bfloat16_rn(value)) {}

using nv_bfloat16 = __nv_bfloat16;

#define EMULATED_HALF __nv_bfloat16
#define EMULATED_HALF2 __nv_bfloat162
#define EMULATED_NAME(before, after) before##bfloat16##after
#include "emulated_pairs.h"
using nv_bfloat162 = __nv_bfloat162;
