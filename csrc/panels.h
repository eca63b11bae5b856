// Small matrix products over the voxels of a tile: out[m, v] = sum_k a[m, k] in[k, v], voxels along the vector.
//
// `a` is packed into panels of a few rows, so that one panel's sums for two vectors of voxels stay in registers.
#pragma once

#include "tiles.h"

namespace semiseg::SEMISEG_LEVEL {

constexpr int64_t SUMMED_PRODUCTS = 128;  // that are added up in a row, as the sum's error grows with them

struct Panels {
  static constexpr int MOST_ROWS = WIDTH == 16 ? 12 : 6;

  int64_t rows, depth, block;
  Buffer<float> packed;  // [ceil(rows / block)][depth][block], the last block narrower

  Panels(int64_t rows, int64_t depth) : rows(rows), depth(depth), packed(rows * depth) {
    const int64_t blocks = ceil_div(rows, MOST_ROWS);
    block = ceil_div(rows, blocks);
  }
  Panels(const float* a, int64_t rows, int64_t depth, int64_t row_stride, int64_t depth_stride) : Panels(rows, depth) {
    pack(a, row_stride, depth_stride);
  }

  // a[m * row_stride + k * depth_stride]
  void pack(const float* a, int64_t row_stride, int64_t depth_stride) {
    float* p = packed;
    for (int64_t m = 0; m < rows; m += block)
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t i = m; i < minimum(m + block, rows); ++i) *p++ = a[i * row_stride + k * depth_stride];
  }
};

// What becomes of a sum before it is stored.
struct Plain {
  INLINE vfloat operator()(int64_t, vfloat sum, const float*) const { return sum; }
};
struct Affine {  // out = (sum + shrink[v] out) factor[v]
  const float *shrink, *factor;
  INLINE vfloat operator()(int64_t v, vfloat sum, const float* out) const {
    return (sum + load(shrink + v) * load(out)) * load(factor + v);
  }
};

template <int ROWS, class Finish>
void multiply_panel(const float* panel, int64_t depth, const float* in, float* out, const Finish& finish, int64_t pitch,
                    int64_t voxels) {
  for (int64_t v = 0; v < voxels; v += STEP) {
    vfloat total[ROWS][2];  // of the products before these, where there are any
    for (int64_t first = 0; first < depth; first += SUMMED_PRODUCTS) {
      const int64_t end = minimum(depth, first + SUMMED_PRODUCTS);
      vfloat sum[ROWS][2] = {};
      for (int64_t k = first; k < end; ++k) {
        const vfloat low = load(in + k * pitch + v), high = load(in + k * pitch + v + WIDTH);
#pragma GCC unroll 12
        for (int m = 0; m < ROWS; ++m) {
          const vfloat a = broadcast(panel[k * ROWS + m]);
          sum[m][0] += a * low;
          sum[m][1] += a * high;
        }
      }
#pragma GCC unroll 12
      for (int m = 0; m < ROWS; ++m) {
        if (first) {
          sum[m][0] += total[m][0];
          sum[m][1] += total[m][1];
        }
        if (end < depth) {
          total[m][0] = sum[m][0];
          total[m][1] = sum[m][1];
        } else {
          float *low = out + m * pitch + v, *high = low + WIDTH;
          store(low, finish(v, sum[m][0], low));
          store(high, finish(v + WIDTH, sum[m][1], high));
        }
      }
    }
  }
}

template <int ROWS = Panels::MOST_ROWS, class Finish>
void multiply_rows(int64_t rows, const float* panel, int64_t depth, const float* in, float* out, const Finish& finish,
                   int64_t pitch, int64_t voxels) {
  if (rows == ROWS) return multiply_panel<ROWS>(panel, depth, in, out, finish, pitch, voxels);
  if constexpr (ROWS > 1) multiply_rows<ROWS - 1>(rows, panel, depth, in, out, finish, pitch, voxels);
}

template <class Finish>
void multiply(const Panels& a, const float* in, float* out, const Finish& finish, int64_t pitch, int64_t voxels) {
  for (int64_t m = 0; m < a.rows; m += a.block) {
    const int64_t rows = minimum(a.block, a.rows - m);
    multiply_rows(rows, a.packed + m * a.depth, a.depth, in, out + m * pitch, finish, pitch, voxels);
  }
}

}  // namespace semiseg::SEMISEG_LEVEL
