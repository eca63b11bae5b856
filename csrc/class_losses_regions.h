// Between the passes over the voxels: the class losses of a region, and their derivatives, of its statistics in float64.
#pragma once

#include "dice_ce.h"

// Static, as every x86-64 level needs one of its own.
#ifdef SEMISEG_LEVEL
#define SEMISEG_REGION static inline
#else
#include <cuda_runtime.h>
#define SEMISEG_REGION static __device__ __forceinline__
#endif

namespace semiseg {

// Of a region, see class_losses.h.
struct Statistics {
  double voxels;
  const double *overlap, *predicted, *target;  // [C]
};

SEMISEG_REGION Statistics statistics_of(const double* statistics, int64_t region, int64_t C) {
  const double* s = statistics + region * statistics_per_region(C);
  return {s[0], s + 1, s + 1 + C, s + 1 + 2 * C};
}

// Of a class.
SEMISEG_REGION double dice_numerator(const Statistics& s, int64_t c) { return 2 * s.overlap[c] + DICE_SMOOTH; }
SEMISEG_REGION double dice_denominator(const Statistics& s, int64_t c) {
  return s.predicted[c] + s.target[c] + DICE_SMOOTH;
}

// Of a sum over the region's voxels, or a derivative by their mean for one by their sum.
SEMISEG_REGION float over_voxels(const Statistics& s, double x) { return s.voxels == 0 ? 0.f : float(x / s.voxels); }

SEMISEG_REGION float dice_loss(const Statistics& s, int64_t first_class, int64_t C) {
  double sum = 0;
  for (int64_t c = first_class; c < C; ++c) sum += dice_numerator(s, c) / dice_denominator(s, c);
  return float(1 - sum / double(C - first_class));
}

// d loss / d p[c] = by_overlap y[c] + by_size in_size(p[c])
struct DiceGradient {
  float by_overlap, by_size;
};

// Of one of the `classes` in Dice's mean.
SEMISEG_REGION DiceGradient dice_gradient(const Statistics& s, int64_t c, int64_t classes, bool squared,
                                          float grad_dice) {
  const double denominator = dice_denominator(s, c);
  const double scale = -2 * double(grad_dice) / (double(classes) * denominator);
  const double by_size = -scale * dice_numerator(s, c) / denominator;
  // 0 of a loss that is not differentiated, also where its sums are NaN.
  return {grad_dice == 0 ? 0.f : float(scale), grad_dice == 0 ? 0.f : float(by_size * (squared ? 1 : 0.5))};
}

}  // namespace semiseg

#undef SEMISEG_REGION
