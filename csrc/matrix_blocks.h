// Matrix products in blocks that stay in registers, ROWS x COLUMNS, float32, and what becomes of their results.
#pragma once

#include "simd.h"

namespace semiseg::SEMISEG_LEVEL {

constexpr int64_t CHANNELS = 16;  // numbers of channels are multiples of it: a cache line
constexpr int ROWS = WIDTH == 16 ? 8 : 6;
constexpr int SUM_ROWS = WIDTH == 16 ? 8 : 4;
constexpr int64_t SUMMED_PRODUCTS = 16;  // that are added up in a row
constexpr int64_t AHEAD = 512;  // values, of what is added to results

// The columns of a block in vectors: two, as every number of a row is then read once for two products.
template <int VECTORS>
struct Columns {
  static constexpr int64_t COUNT = VECTORS * WIDTH;
};

// Runs work(columns) with those of which `channels` are a multiple.
template <class Work>
INLINE void with_columns(int64_t channels, const Work& work) {
  if constexpr (WIDTH == CHANNELS) {
    if (channels % (2 * WIDTH)) return work(Columns<1>{});
  }
  work(Columns<2>{});
}

INLINE vfloat relu(vfloat x, float negative_slope) {
  // 0 times an infinity would be NaN.
  const vfloat below = negative_slope == 0 ? vfloat{} : negative_slope * x;
  return x < 0 ? below : x;
}

// A number that the compiler knows.
template <int64_t N>
struct Constant {
  INLINE constexpr operator int64_t() const { return N; }
};

// The rows of a product, each in segments: those of one segment lie `stride` apart.
template <int SEGMENTS, class Stride = int64_t>
struct Rows {
  const float* segments[SEGMENTS];
  Stride stride;
  int64_t ahead = 0;  // from a row to one that is fetched from memory meanwhile; rows lie next to each other then
  int64_t first = 0;  // of a segment, in values

  INLINE Rows from(int64_t row) const {
    Rows rows = *this;
    rows.first += row * stride;
    return rows;
  }
  INLINE int count() const { return SEGMENTS; }
  INLINE const float* segment(int s) const { return segments[s] + first; }
  INLINE void fetch(int s, int n) const {
    if (ahead)
      for (int64_t k = 0; k < n * stride; k += CHANNELS) __builtin_prefetch(segment(s) + ahead + k, 0, 2);
  }
};

// Calls put(r * out_stride + c, sum) for N rows r and the vectors from c on of the columns, with
// sum[r, c] = initial[c] + sum over the segments s and k of rows[s][r, k] b[s, k, c]
template <int N, class AnyRows, class Length, int VECTORS, class Put>
INLINE void multiply(const AnyRows& rows, Columns<VECTORS>, const float* b, int64_t b_segment, Length K,
                     const float* initial, int64_t out_stride, const Put& put) {
  vfloat sums[N][VECTORS];
#pragma GCC unroll 2
  for (int v = 0; v < VECTORS; ++v) {
    const vfloat first = initial ? load(initial + v * WIDTH) : vfloat{};
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r) sums[r][v] = first;
  }
  for (int s = 0; s < rows.count(); ++s) {
    const float *row = rows.segment(s), *matrix = b + s * b_segment;
    rows.fetch(s, N);
    for (int64_t k = 0; k < K; ++k) {
      vfloat columns[VECTORS];
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) columns[v] = load(matrix + k * Columns<VECTORS>::COUNT + v * WIDTH);
#pragma GCC unroll 8
      for (int r = 0; r < N; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) sums[r][v] += row[r * rows.stride + k] * columns[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < N; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) put(r * out_stride + v * WIDTH, sums[r][v]);
}

// The same of the rows t to n, in `blocks` blocks of at most N rows, which differ by one row at most: in a much smaller block
// every product would wait for the sum before it.
template <int N, class AnyRows, class Length, int VECTORS, class Put>
INLINE void multiply_rows(const AnyRows& rows, Columns<VECTORS> columns, const float* b, int64_t b_segment, Length K,
                          const float* initial, int64_t out_stride, int64_t t, int64_t n, int64_t blocks,
                          const Put& put) {
  for (; n - t > (N - 1) * blocks; t += N, --blocks)
    multiply<N>(rows.from(t), columns, b, b_segment, K, initial, out_stride, put.from(t * out_stride));
  if constexpr (N > 1)
    if (blocks > 0) multiply_rows<N - 1>(rows, columns, b, b_segment, K, initial, out_stride, t, n, blocks, put);
}

template <class AnyRows, class Length, int VECTORS, class Put>
void multiply_line(const AnyRows& rows, Columns<VECTORS> columns, const float* b, int64_t b_segment, Length K,
                   const float* initial, int64_t out_stride, int64_t n, const Put& put) {
  const int64_t blocks = ceil_div(n, ROWS);
  multiply_rows<ROWS>(rows, columns, b, b_segment, K, initial, out_stride, 0, n, blocks, put);
}

// y[at] <- the ReLU of a sum, and what there is to add
struct Finish {
  float* y;
  const float* added;    // may be absent
  float negative_slope;  // 1 leaves the sum as it is
  bool streamed;

  Finish(float* y, int64_t values, float negative_slope, const float* added = nullptr)
      : y(y), added(added), negative_slope(negative_slope), streamed(streams(y, values * int64_t(sizeof(float)))) {}

  INLINE Finish from(int64_t at) const {
    Finish finish = *this;
    finish.y += at;
    if (added) finish.added += at;
    return finish;
  }

  INLINE void operator()(int64_t at, vfloat sum) const {
    sum = relu(sum, negative_slope);
    if (added) {
      __builtin_prefetch(added + at + AHEAD);
      sum += load(added + at);
    }
    streamed ? stream(y + at, sum) : store(y + at, sum);
  }
};

// sums[r, c] += sum over the n rows t of a[t, r] b[t, c] for SUM_ROWS r and the columns c
template <int VECTORS>
INLINE void add_products(Columns<VECTORS>, const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t n,
                         float* sums, int64_t sums_stride) {
  for (int64_t first = 0; first < n; first += SUMMED_PRODUCTS) {
    vfloat few[SUM_ROWS][VECTORS] = {};
    for (int64_t t = first; t < minimum(n, first + SUMMED_PRODUCTS); ++t) {
      vfloat columns[VECTORS];
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) columns[v] = load(b + t * b_stride + v * WIDTH);
#pragma GCC unroll 8
      for (int r = 0; r < SUM_ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) few[r][v] += a[t * a_stride + r] * columns[v];
    }
#pragma GCC unroll 8
    for (int r = 0; r < SUM_ROWS; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) {
        float* sum = sums + r * sums_stride + v * WIDTH;
        store(sum, load(sum) + few[r][v]);
      }
  }
}

}  // namespace semiseg::SEMISEG_LEVEL
