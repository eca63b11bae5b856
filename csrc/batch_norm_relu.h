#pragma once

#include "voxels.h"

namespace semiseg {

struct BatchNormReLUStatistics {
  Voxels x;  // [B, C, *S], dense
  int threads;
  double *mean, *variance;  // [C]; the variance is the mean square
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

struct BatchNormReLUBackward : BatchNormReLU {
  Voxels grad_y, grad_x;       // as x
  const float *offset, *tilt;  // [C]
};

}  // namespace semiseg
