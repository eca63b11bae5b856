// Between the passes over the voxels: the numbers of a channel c, in float64.
#pragma once

#include <cmath>

#include "batch_norm_relu.h"

// Static, as every x86-64 level needs one of its own.
#ifdef SEMISEG_LEVEL
#define SEMISEG_CHANNEL static inline
#else
#include <cuda_runtime.h>
#define SEMISEG_CHANNEL static __device__ __forceinline__
#endif

namespace semiseg {

template <class Operation>
SEMISEG_CHANNEL double voxels_of_all(const Operation& a) {
  return a.count != nullptr ? *a.count : double(a.voxels);
}

SEMISEG_CHANNEL void compute_channel(const BatchNormReLUParameters& a, int64_t c) {
  const double mean = a.mean[c], variance = a.variance[c], voxels = voxels_of_all(a);
  // The passes take distances from the rounded mean; what it lacks goes into the bias, and later into the offset.
  const double rounding = mean - float(mean), inverse = 1 / sqrt(variance + a.epsilon), scale = a.weight[c] * inverse;
  a.parameters[c] = float(mean);
  a.parameters[a.channels + c] = float(scale);
  a.parameters[2 * a.channels + c] = float(a.bias[c] - scale * rounding);
  a.exact[c] = rounding;
  a.exact[a.channels + c] = inverse;
  const double kept = 1 - a.momentum, unbiased = variance * (voxels / (voxels - 1));
  a.running_mean[c] = float(kept * a.running_mean[c] + a.momentum * mean);
  a.running_variance[c] = float(kept * a.running_variance[c] + a.momentum * unbiased);
}

// Sum of g (x - mean), of sums with the rounded mean.
SEMISEG_CHANNEL double product_sum(const BatchNormReLUCorrection& a, const double* sums, int64_t c) {
  return sums[a.channels + c] - sums[c] * a.exact[c];
}

SEMISEG_CHANNEL void compute_channel(const BatchNormReLUCorrection& a, int64_t c) {
  const double rounding = a.exact[c], inverse = a.exact[a.channels + c], voxels = voxels_of_all(a);
  const double tilt = product_sum(a, a.joined, c) / voxels * inverse * inverse;
  a.correction[c] = float(a.joined[c] / voxels - tilt * rounding);
  a.correction[a.channels + c] = float(tilt);
  a.grad_weight[c] = float(product_sum(a, a.sums, c) * inverse);
  a.grad_bias[c] = float(a.sums[c]);
}

}  // namespace semiseg

#undef SEMISEG_CHANNEL
