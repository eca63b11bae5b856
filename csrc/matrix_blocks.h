// Matrix products in blocks that stay in registers, ROWS x COLUMNS, float32, and what becomes of their results.
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

// Calls put(r * out_stride + c, sum) for N rows r and the vectors from c on of COLUMNS, with
// sum[r, c] = initial[c] + sum over the segments s and k of a[s][r, k] b[s, k, c]
template <int N, int SEGMENTS, class Put>
INLINE void multiply(const float* const* a, int64_t a_stride, const float* b, int64_t b_segment, int64_t K,
                     const float* initial, int64_t out_stride, const Put& put) {
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
    for (int v = 0; v < COLUMN_VECTORS; ++v) put(r * out_stride + v * WIDTH, sums[r][v]);
}

// The same of the rows t to n, in `blocks` blocks of at most N rows, which differ by one row at most: in a much smaller block
// every product would wait for the sum before it.
template <int N, int SEGMENTS, class Put>
INLINE void multiply_rows(const float* const* a, int64_t a_stride, const float* b, int64_t b_segment, int64_t K,
                          const float* initial, int64_t out_stride, int64_t t, int64_t n, int64_t blocks, const Put& put) {
  for (; n - t > (N - 1) * blocks; t += N, --blocks) {
    const float* rows[SEGMENTS];
    for (int s = 0; s < SEGMENTS; ++s) rows[s] = a[s] + t * a_stride;
    multiply<N, SEGMENTS>(rows, a_stride, b, b_segment, K, initial, out_stride, put.from(t * out_stride));
  }
  if constexpr (N > 1)
    if (blocks > 0)
      multiply_rows<N - 1, SEGMENTS>(a, a_stride, b, b_segment, K, initial, out_stride, t, n, blocks, put);
}

template <int SEGMENTS, class Put>
void multiply_line(const float* const* a, int64_t a_stride, const float* b, int64_t b_segment, int64_t K,
                   const float* initial, int64_t out_stride, int64_t n, const Put& put) {
  const int64_t blocks = (n + ROWS - 1) / ROWS;
  multiply_rows<ROWS, SEGMENTS>(a, a_stride, b, b_segment, K, initial, out_stride, 0, n, blocks, put);
}

// y[at] <- sum or, if ACTIVATED, its ReLU and what there is to add.
template <bool ACTIVATED, bool STREAMED>
struct Finish {
  float* y;
  const float* added;
  float negative_slope;

  INLINE Finish from(int64_t at) const { return {y + at, added ? added + at : nullptr, negative_slope}; }

  INLINE void operator()(int64_t at, vfloat sum) const {
    if constexpr (ACTIVATED) {
      sum = relu(sum, negative_slope);
      if (added) sum += load(added + at);
    }
    if constexpr (STREAMED)
      stream(y + at, sum);
    else
      store(y + at, sum);
  }
};

// Runs work(finish) with what suits a result of that many values.
template <class Work>
INLINE void with_finish(float* y, int64_t values, float negative_slope, const float* added, const Work& work) {
  const bool activated = negative_slope != 1 || added, streamed = streams(y, values * int64_t(sizeof(float)));
  if (activated && streamed) work(Finish<true, true>{y, added, negative_slope});
  if (activated && !streamed) work(Finish<true, false>{y, added, negative_slope});
  if (!activated && streamed) work(Finish<false, true>{y, added, negative_slope});
  if (!activated && !streamed) work(Finish<false, false>{y, added, negative_slope});
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
