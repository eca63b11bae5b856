#pragma once

#include "voxels.h"

namespace semiseg {

struct BatchNormReLUStatistics {
  Voxels x;  // [B, C, *S], dense
  int threads;
  double *mean, *variance;  // [C]; the variance is the mean square
};

struct BatchNormReLUParameters {
  const double *mean, *variance;           // [C], see BatchNormReLUStatistics
  const float *weight, *bias;              // [C]
  float *running_mean, *running_variance;  // [C], updated in place
  const double* count;                     // voxels of all processes; null: those of x
  int64_t voxels, channels;                // of x
  double momentum, epsilon;
  float* parameters;  // [3, C]: mean, scale, bias
  double* exact;      // [2, C]: what the rounded mean lacks, 1 / sqrt(variance + epsilon)
};

struct BatchNormReLU {
  Voxels x;                          // [B, C, *S], dense
  const float *mean, *scale, *bias;  // [C], see batch_norm_relu_cpu.cpp
  float negative_slope;
  int threads;
};

struct BatchNormReLUForward : BatchNormReLU {
  Voxels y;  // as x
};

struct BatchNormReLUSums : BatchNormReLU {
  Voxels grad_y;  // as x
  double* sums;   // [2, C], of g and of g (x - mean)
};

struct BatchNormReLUCorrection {
  const double *sums, *joined;     // [2, C], see BatchNormReLUSums: of this process, and of all
  const double* exact;             // [2, C], see BatchNormReLUParameters
  const double* count;             // likewise
  int64_t voxels, channels;        // likewise
  float* correction;               // [2, C]: offset, tilt
  float *grad_weight, *grad_bias;  // [C]
};

struct BatchNormReLUBackward : BatchNormReLU {
  Voxels grad_y, grad_x;       // as x
  const float *offset, *tilt;  // [C]
};

}  // namespace semiseg
