// Blocks of matrix products that stay in registers, ROWS x COLUMNS, float32.
#pragma once

#include "simd.h"

namespace semiseg::SEMISEG_LEVEL {

constexpr int64_t CHANNELS = 16;  // numbers of channels are multiples of it: a cache line
constexpr int COLUMN_VECTORS = WIDTH == 4 ? 2 : CHANNELS / WIDTH;
constexpr int64_t COLUMNS = COLUMN_VECTORS * WIDTH;
constexpr int ROWS = WIDTH == 16 ? 12 : 6;
constexpr int SUM_ROWS = WIDTH == 16 ? 8 : 4;
constexpr int64_t SUMMED = 16;  // products that are added up in a row

INLINE vfloat relu(vfloat x, float negative_slope) { return x > 0 ? x : negative_slope * x; }

// out[r, c] = initial[c] + sum over the segments s and k of a[s][r, k] b[s, k, c] for N rows r and COLUMNS c, or its ReLU
template <int N, int SEGMENTS, bool RELU>
INLINE void multiply(const float* const* a, int64_t a_stride, const float* b, int64_t b_segment, int64_t K,
                     const float* initial, float negative_slope, float* out, int64_t out_stride) {
  vfloat sums[N][COLUMN_VECTORS];
#pragma GCC unroll 2
  for (int v = 0; v < COLUMN_VECTORS; ++v) {
    const vfloat first = initial ? load(initial + v * WIDTH) : vfloat{};
#pragma GCC unroll 12
    for (int r = 0; r < N; ++r) sums[r][v] = first;
  }
  for (int s = 0; s < SEGMENTS; ++s) {
    const float *row = a[s], *matrix = b + s * b_segment;
    for (int64_t k = 0; k < K; ++k) {
      vfloat columns[COLUMN_VECTORS];
#pragma GCC unroll 2
      for (int v = 0; v < COLUMN_VECTORS; ++v) columns[v] = load(matrix + k * COLUMNS + v * WIDTH);
#pragma GCC unroll 12
      for (int r = 0; r < N; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < COLUMN_VECTORS; ++v) sums[r][v] += row[r * a_stride + k] * columns[v];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < N; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < COLUMN_VECTORS; ++v) store(out + r * out_stride + v * WIDTH, RELU ? relu(sums[r][v], negative_slope) : sums[r][v]);
}

// sums[r, c] += sum over the n rows t of a[t, r] b[t, c] for SUM_ROWS r and COLUMNS c
INLINE void add_products(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t n, float* sums,
                         int64_t sums_stride) {
  vfloat total[SUM_ROWS][COLUMN_VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < SUM_ROWS; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < COLUMN_VECTORS; ++v) total[r][v] = load(sums + r * sums_stride + v * WIDTH);
  for (int64_t first = 0; first < n; first += SUMMED) {
    vfloat few[SUM_ROWS][COLUMN_VECTORS] = {};
    for (int64_t t = first; t < minimum(n, first + SUMMED); ++t) {
      vfloat columns[COLUMN_VECTORS];
#pragma GCC unroll 2
      for (int v = 0; v < COLUMN_VECTORS; ++v) columns[v] = load(b + t * b_stride + v * WIDTH);
#pragma GCC unroll 8
      for (int r = 0; r < SUM_ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < COLUMN_VECTORS; ++v) few[r][v] += a[t * a_stride + r] * columns[v];
    }
#pragma GCC unroll 8
    for (int r = 0; r < SUM_ROWS; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < COLUMN_VECTORS; ++v) total[r][v] += few[r][v];
  }
#pragma GCC unroll 8
  for (int r = 0; r < SUM_ROWS; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < COLUMN_VECTORS; ++v) store(sums + r * sums_stride + v * WIDTH, total[r][v]);
}

}  // namespace semiseg::SEMISEG_LEVEL
