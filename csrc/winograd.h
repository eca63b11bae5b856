// Winograd's transforms of convolutions of side 3, along one axis: neighbouring results are A^T (G g * B^T d) of the d they read.
//
// F(2, 3) has four points for two results, 4 products for 6:
//   B^T d = (d0 - d2, d1 + d2, d2 - d1, d1 - d3)
//   G g   = (g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2)
//   A^T m = (m0 + m1 + m2, m1 - m2 - m3)
// F(4, 3) has six for four, 6 products for 12: the values of polynomials at 0, +-NEAR_ROOT, +-FAR_ROOT and infinity.
// The weight's gradient is the adjoint, G^T sum (A grad_y * B^T d).
// Source: A. Lavin, S. Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016.
#pragma once

#include "simd.h"

namespace semiseg::SEMISEG_LEVEL {

// These roots round least of those that a float32 holds in a few bits.
constexpr float NEAR_ROOT = 0.625f, FAR_ROOT = 1.5f;
constexpr float NEAR_SQUARE = NEAR_ROOT * NEAR_ROOT, FAR_SQUARE = FAR_ROOT * FAR_ROOT;
// The values of the polynomials that vanish at all other roots.
constexpr float AT_ZERO = 1 / (NEAR_SQUARE * FAR_SQUARE);
constexpr float AT_NEAR = 0.5f / (NEAR_SQUARE * (NEAR_SQUARE - FAR_SQUARE));
constexpr float AT_FAR = 0.5f / (FAR_SQUARE * (FAR_SQUARE - NEAR_SQUARE));

// plus, minus <- even +- root odd
INLINE void at_roots(vfloat even, vfloat odd, float root, vfloat& plus, vfloat& minus) {
  plus = even + root * odd;
  minus = even - root * odd;
}

// d <- B^T d
INLINE void transform_input(vfloat (&d)[4]) {
  const vfloat m0 = d[0] - d[2], m1 = d[1] + d[2], m2 = d[2] - d[1], m3 = d[1] - d[3];
  d[0] = m0, d[1] = m1, d[2] = m2, d[3] = m3;
}
INLINE void transform_input(vfloat (&d)[6]) {
  const vfloat d1 = d[1], d2 = d[2], d3 = d[3], d4 = d[4];
  d[0] = (d4 - (NEAR_SQUARE + FAR_SQUARE) * d2) + NEAR_SQUARE * FAR_SQUARE * d[0];
  d[5] = (d[5] - (NEAR_SQUARE + FAR_SQUARE) * d3) + NEAR_SQUARE * FAR_SQUARE * d1;
  at_roots(d4 - FAR_SQUARE * d2, d3 - FAR_SQUARE * d1, NEAR_ROOT, d[1], d[2]);
  at_roots(d4 - NEAR_SQUARE * d2, d3 - NEAR_SQUARE * d1, FAR_ROOT, d[3], d[4]);
}

// The first two or four of m <- A^T m
INLINE void transform_result(vfloat (&m)[4]) {
  const vfloat m1 = m[1], m2 = m[2];
  m[0] += m1 + m2;
  m[1] = (m1 - m2) - m[3];
}
INLINE void transform_result(vfloat (&m)[6]) {
  const vfloat near_sum = m[1] + m[2], near_difference = NEAR_ROOT * (m[1] - m[2]);
  const vfloat far_sum = m[3] + m[4], far_difference = FAR_ROOT * (m[3] - m[4]);
  m[0] += near_sum + far_sum;
  m[1] = near_difference + far_difference;
  m[2] = NEAR_SQUARE * near_sum + FAR_SQUARE * far_sum;
  m[3] = (NEAR_SQUARE * near_difference + FAR_SQUARE * far_difference) + m[5];
}

// d <- A (d0, d1), but for the last one's sign
INLINE void transform_gradient(vfloat (&d)[4]) {
  d[3] = d[1];
  d[2] = d[0] - d[1];
  d[1] = d[0] + d[1];
}
// d <- A (d0, d1, d2, d3)
INLINE void transform_gradient(vfloat (&d)[6]) {
  const vfloat d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
  at_roots(d0 + NEAR_SQUARE * d2, d1 + NEAR_SQUARE * d3, NEAR_ROOT, d[1], d[2]);
  at_roots(d0 + FAR_SQUARE * d2, d1 + FAR_SQUARE * d3, FAR_ROOT, d[3], d[4]);
  d[5] = d3;
}

// g <- G (g0, g1, g2)
INLINE void transform_weight(vfloat (&g)[4]) {
  const vfloat outer = g[0] + g[2], inner = g[1];
  g[3] = g[2];
  g[1] = 0.5f * (outer + inner);
  g[2] = 0.5f * (outer - inner);
}
INLINE void transform_weight(vfloat (&g)[6]) {
  const vfloat g0 = g[0], g1 = g[1], g2 = g[2];
  g[0] = AT_ZERO * g0;
  at_roots(AT_NEAR * (g0 + NEAR_SQUARE * g2), AT_NEAR * g1, NEAR_ROOT, g[1], g[2]);
  at_roots(AT_FAR * (g0 + FAR_SQUARE * g2), AT_FAR * g1, FAR_ROOT, g[3], g[4]);
  g[5] = g2;
}

// The first three of s <- G^T s, with the last one's sign as transform_gradient leaves it
INLINE void transform_sums(vfloat (&s)[4]) {
  const vfloat half_sum = 0.5f * (s[1] + s[2]), half_difference = 0.5f * (s[1] - s[2]);
  s[0] += half_sum;
  s[1] = half_difference;
  s[2] = half_sum - s[3];
}
INLINE void transform_sums(vfloat (&s)[6]) {
  const vfloat near_sum = AT_NEAR * (s[1] + s[2]), near_difference = AT_NEAR * (s[1] - s[2]);
  const vfloat far_sum = AT_FAR * (s[3] + s[4]), far_difference = AT_FAR * (s[3] - s[4]);
  s[0] = AT_ZERO * s[0] + (near_sum + far_sum);
  s[1] = NEAR_ROOT * near_difference + FAR_ROOT * far_difference;
  s[2] = (NEAR_SQUARE * near_sum + FAR_SQUARE * far_sum) + s[5];
}

}  // namespace semiseg::SEMISEG_LEVEL
