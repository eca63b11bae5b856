#pragma once

#include "voxels.h"

namespace semiseg {

struct MaskedClassMean {
  Voxels z;       // [B, d, *S], absent in backward
  Voxels weight;  // [B, C, *S]
  int threads;
  double* total;  // [C], sums of the weights, written forward
  float* mean;    // [C, d]; in backward its gradient
  Voxels grad_z;  // [B, d, *S], backward only
};

}  // namespace semiseg
