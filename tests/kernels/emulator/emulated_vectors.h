// CUDA's vector types, with its alignments, and dim3.
#pragma once

#include <cstdint>

#define __align__(bytes) __attribute__((aligned(bytes)))

#define EMULATED_VECTORS(element, name, align2, align4)                                            \
  struct name##1 { element x; };                                                                   \
  struct __align__(align2) name##2 { element x, y; };                                              \
  struct name##3 { element x, y, z; };                                                             \
  struct __align__(align4) name##4 { element x, y, z, w; };                                        \
  inline name##1 make_##name##1(element x) { return {x}; }                                         \
  inline name##2 make_##name##2(element x, element y) { return {x, y}; }                           \
  inline name##3 make_##name##3(element x, element y, element z) { return {x, y, z}; }             \
  inline name##4 make_##name##4(element x, element y, element z, element w) { return {x, y, z, w}; }

EMULATED_VECTORS(signed char, char, 2, 4)
EMULATED_VECTORS(unsigned char, uchar, 2, 4)
EMULATED_VECTORS(short, short, 4, 8)
EMULATED_VECTORS(unsigned short, ushort, 4, 8)
EMULATED_VECTORS(int, int, 8, 16)
EMULATED_VECTORS(unsigned, uint, 8, 16)
EMULATED_VECTORS(long long, longlong, 16, 16)
EMULATED_VECTORS(unsigned long long, ulonglong, 16, 16)
EMULATED_VECTORS(float, float, 8, 16)
EMULATED_VECTORS(double, double, 16, 16)

#undef EMULATED_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};
