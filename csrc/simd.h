// Vectors of one x86-64 level: as wide as its registers, written with GCC's vector extensions.
//
// Kernel sources are compiled once per level and linked together, so what they include must not emit shared inline
// functions (a std:: template compiled for AVX-512 could be the copy the linker keeps for all levels).
#pragma once

#include <cstdint>
#include <cstring>

#include "rounding.h"
#include "voxels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace semiseg::SEMISEG_LEVEL {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
constexpr int HALF = WIDTH / 2;

typedef float vfloat __attribute__((vector_size(WIDTH * 4)));
typedef int32_t vint __attribute__((vector_size(WIDTH * 4)));
typedef float unaligned_vfloat __attribute__((vector_size(WIDTH * 4), aligned(4)));
typedef int32_t unaligned_vint __attribute__((vector_size(WIDTH * 4), aligned(4)));
typedef uint16_t vhalf __attribute__((vector_size(WIDTH * 2)));
typedef uint8_t vbyte __attribute__((vector_size(WIDTH)));
typedef double vdouble __attribute__((vector_size(WIDTH * 4)));  // half as many lanes

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

#define INLINE inline __attribute__((always_inline))

template <class To, class From>
INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class Vector, class Element>
INLINE Vector read(const Element* p) {
  Vector v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class Vector, class Element>
INLINE void write(Element* p, Vector v) {
  memcpy(p, &v, sizeof v);
}

INLINE vfloat broadcast(float x) { return x - vfloat{}; }  // 0 + x is not x where x is -0
INLINE vint broadcast(int32_t x) { return vint{} + x; }

// a > b ? a : b, so b where either is NaN
INLINE vfloat maximum(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
INLINE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }

INLINE vfloat square_root(vfloat x) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#else
  for (int i = 0; i < WIDTH; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// x = low + high
INLINE vdouble low_half(vfloat x) {
#if defined(__AVX512F__)
  return _mm512_cvtps_pd(_mm512_castps512_ps256(x));
#elif defined(__AVX2__)
  return _mm256_cvtps_pd(_mm256_castps256_ps128(x));
#else
  return vdouble{x[0], x[1]};
#endif
}

INLINE vdouble high_half(vfloat x) {
#if defined(__AVX512F__)
  return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
#elif defined(__AVX2__)
  return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
#else
  return vdouble{x[2], x[3]};
#endif
}

// Half precision. Every load gives float32; stores round to nearest even.

// Typed, not by memcpy: the compiler then knows that a row's store changes no pointer.
INLINE vfloat load(const float* p) { return *reinterpret_cast<const unaligned_vfloat*>(p); }
INLINE void store(float* p, vfloat v) { *reinterpret_cast<unaligned_vfloat*>(p) = v; }
INLINE vint load(const int32_t* p) { return *reinterpret_cast<const unaligned_vint*>(p); }
INLINE void store(int32_t* p, vint v) { *reinterpret_cast<unaligned_vint*>(p) = v; }

INLINE vfloat load(const uint8_t* p) {
  return __builtin_convertvector(__builtin_convertvector(read<vbyte>(p), vint), vfloat);
}

INLINE vfloat load(const bfloat16* p) {
  return bit_cast<vfloat>(__builtin_convertvector(read<vhalf>(p), vint) << 16);
}

INLINE void store(bfloat16* p, vfloat v) {
  const vint bits = bit_cast<vint>(v);
  const vint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  write(p, __builtin_convertvector(v == v ? rounded : broadcast(int32_t(0x7fc0)), vhalf));
}

INLINE vfloat load(const float16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(read<__m256i>(p));
#elif defined(__AVX2__) && defined(__F16C__)
  return _mm256_cvtph_ps(read<__m128i>(p));
#else
  const vint half = __builtin_convertvector(read<vhalf>(p), vint);
  const vint magnitude = (half & 0x7fff) << 13;
  // Scaling by 2^112 moves the exponent's bias, subnormal numbers included.
  const vfloat scaled = bit_cast<vfloat>(magnitude) * 0x1p112f;
  const vint special = bit_cast<vint>(scaled) | 0x7f800000;
  const vint value = magnitude >= (0x7c00 << 13) ? special : bit_cast<vint>(scaled);
  return bit_cast<vfloat>(value | ((half & 0x8000) << 16));
#endif
}

INLINE void store(float16* p, vfloat v) {
#if defined(__AVX512F__)
  write(p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
  write(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  const vint bits = bit_cast<vint>(v);
  const vint sign = (bits >> 16) & 0x8000;
  const vint magnitude = bits & 0x7fffffff;
  const vint normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 lines a subnormal number's last bit up with the last bit of the sum.
  const vint subnormal = bit_cast<vint>(bit_cast<vfloat>(magnitude) + 0.5f) - 0x3f000000;
  const vint finite = magnitude < (113 << 23) ? subnormal : normal;
  const vint infinite = magnitude > 0x7f800000 ? broadcast(int32_t(0x7e00)) : broadcast(int32_t(0x7c00));
  write(p, __builtin_convertvector((magnitude < 0x477ff000 ? finite : infinite) | sign, vhalf));
#endif
}

// Streaming stores spare the read of a line that is wholly written; they pay once the result exceeds what the caches, which
// other processes share, keep until it is read.
constexpr int64_t STREAMING_BYTES = 8 << 20;

INLINE bool streams(const void* p, int64_t bytes) {
  return bytes >= STREAMING_BYTES && reinterpret_cast<uintptr_t>(p) % 64 == 0;
}

INLINE void stream(float* p, vfloat v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, v);
#else
  store(p, v);
#endif
}
template <class T>
INLINE void stream(T* p, vfloat v) {
  store(p, v);
}

// e^x for x <= 0, to about 1 unit in the last place; arguments below -87 count as -87. NaN stays NaN.
INLINE vfloat exp_nonpositive(vfloat x) {
  constexpr float LOWEST = -87.f, LOG2_E = 1.44269504f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
  constexpr float ROUND = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  x = maximum(broadcast(LOWEST), x);
  const vfloat shifted = x * LOG2_E + ROUND;
  const vfloat n = shifted - ROUND;
  const vfloat r = (x - n * LN2_HIGH) - n * LN2_LOW;
  vfloat q = 0.00139504892f * r + 0.0083688898f;
  q = q * r + 0.041666206f;
  q = q * r + 0.166665182f;
  q = q * r + 0.5f;
  const vfloat power = bit_cast<vfloat>((bit_cast<vint>(shifted) << 23) + 0x3f800000);  // 2^n
  return (1 + (r + r * r * q)) * power;
}

// ln x for normal positive x, to about 1 unit in the last place. NaN stays NaN.
INLINE vfloat log_positive(vfloat x) {
  constexpr int32_t SQRT_HALF = 0x3f3504f3;
  constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
  const vint exponent = (bit_cast<vint>(x) - SQRT_HALF) >> 23;
  const vfloat n = __builtin_convertvector(exponent, vfloat);
  const vfloat f = bit_cast<vfloat>(bit_cast<vint>(x) - (exponent << 23)) - 1;  // in [sqrt(1/2) - 1, sqrt(2) - 1)
  vfloat q = -0.0763442963f * f + 0.127615497f;
  q = q * f + -0.131601945f;
  q = q * f + 0.142017618f;
  q = q * f + -0.166233569f;
  q = q * f + 0.200012267f;
  q = q * f + -0.250008225f;
  q = q * f + 0.333333313f;
  const vfloat square = f * f;
  const vfloat tail = square * f * q + n * LN2_LOW - 0.5f * square;
  const vfloat result = n * LN2_HIGH + (f + tail);
  return x == x ? result : x;
}

template <int STEP, int... LANE>
INLINE void swap_blocks(vfloat& a, vfloat& b) {
#if defined(__clang__)
  const vfloat low = __builtin_shufflevector(a, b, (LANE & STEP ? LANE - STEP + WIDTH : LANE)...);
  b = __builtin_shufflevector(a, b, (LANE & STEP ? LANE + WIDTH : LANE + STEP)...);
#else
  const vfloat low = __builtin_shuffle(a, b, vint{(LANE & STEP ? LANE - STEP + WIDTH : LANE)...});
  b = __builtin_shuffle(a, b, vint{(LANE & STEP ? LANE + WIDTH : LANE + STEP)...});
#endif
  a = low;
}

template <int STEP>
INLINE void transpose_step(vfloat* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; ++i) {
    if (i & STEP) continue;
#if defined(__AVX512F__)
    swap_blocks<STEP, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(rows[i], rows[i + STEP]);
#elif defined(__AVX2__)
    swap_blocks<STEP, 0, 1, 2, 3, 4, 5, 6, 7>(rows[i], rows[i + STEP]);
#else
    swap_blocks<STEP, 0, 1, 2, 3>(rows[i], rows[i + STEP]);
#endif
  }
}

// rows[i][j] <- rows[j][i]
INLINE void transpose(vfloat (&rows)[WIDTH]) {
  transpose_step<1>(rows);
  transpose_step<2>(rows);
  if constexpr (WIDTH > 4) transpose_step<4>(rows);
  if constexpr (WIDTH > 8) transpose_step<8>(rows);
}

}  // namespace semiseg::SEMISEG_LEVEL
