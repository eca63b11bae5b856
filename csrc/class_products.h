// Between classes and channels, both ways: a vector of channels for every voxel, mixed from the classes' vectors
// by the voxel's shares, and a vector of channels for every class, summed over the voxels by the same shares.
#pragma once

#include "panels.h"

namespace semiseg::SEMISEG_LEVEL {

// The matrix of mixed[j, v] = sum_c vectors[c, j] share[c, v], for `multiply`.
inline Panels mixing_panels(const float* vectors,  // [C, d]
                            int64_t C, int64_t d) {
  return {vectors, d, C, 1, d};
}

// The rows to plan tiles for. Wide voxels are gone through a few channels at a time, and the longer a tile, the rarer
// are the additions of its lanes.
inline int64_t planned_rows(int64_t C, int64_t d) { return C + minimum(d, int64_t(28)); }

// sum[c, j] = sum_v share[c, v] x[j, v]
//
// A block of sums is that of two classes and half a vector of channels, so that its transpose adds up its lanes.
struct ClassSums {
  static constexpr int64_t VECTORS = 16;  // summed in float32 before float64 takes over

  int64_t C, d, stride;
  Buffer<double> sums;  // [C rounded up to pairs, stride]

  ClassSums(int64_t C, int64_t d) : C(C), d(d), stride(channel_rows(d)), sums(class_rows(C) * stride) {}

  // How many rows there have to be in memory; those beyond C and d are of no account.
  static int64_t class_rows(int64_t C) { return round_up(C, 2); }
  static int64_t channel_rows(int64_t d) { return round_up(d, HALF); }

  void add(const float* share, const float* x, int64_t pitch, int64_t padded, Prefetch prefetch) {
    for (int64_t j = 0; j < d; j += HALF) {
      prefetch.step();
      for (int64_t c = 0; c < C; c += 2)
        for (int64_t v = 0; v < padded; v += VECTORS * WIDTH)
          add_block(share + c * pitch, x + j * pitch, pitch, v, minimum(v + VECTORS * WIDTH, padded),
                    sums + c * stride + j);
    }
  }

  // The tile that comes next, to be fetched while this one is added.
  Prefetch prefetch(const Voxels& x, const Span& next) const { return {x, next, ceil_div(d, HALF)}; }

  // Adds the sums to out [C, d] and starts anew.
  void finish(double* out) {
    for (int64_t c = 0; c < C; ++c)
      for (int64_t j = 0; j < d; ++j) out[c * d + j] += sums[c * stride + j];
    memset(sums, 0, class_rows(C) * stride * sizeof(double));
  }

 private:
  INLINE void add_block(const float* share, const float* x, int64_t pitch, int64_t v, int64_t end, double* out) const {
    vfloat sum[WIDTH] = {};
    for (; v < end; v += WIDTH) {
      const vfloat first = load(share + v), second = load(share + pitch + v);
#pragma GCC unroll 8
      for (int j = 0; j < HALF; ++j) {
        const vfloat row = load(x + j * pitch + v);
        sum[j] += first * row;
        sum[HALF + j] += second * row;
      }
    }
    transpose(sum);
    vdouble low{}, high{};
    for (int lane = 0; lane < WIDTH; ++lane) {
      low += low_half(sum[lane]);
      high += high_half(sum[lane]);
    }
    write(out, read<vdouble>(out) + low);
    write(out + stride, read<vdouble>(out + stride) + high);
  }
};

}  // namespace semiseg::SEMISEG_LEVEL
