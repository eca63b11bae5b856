#pragma once

#include "voxels.h"

namespace semiseg {

struct LinearClassifier {
  Voxels x;             // [B, d, *S]
  const float* matrix;  // [B, C, d + 1], weights and, last, bias
  int64_t C;
  int threads;
  Voxels logits;       // [B, C, *S]; in backward their gradient
  Voxels grad_x;       // [B, d, *S], backward only
  float* grad_matrix;  // [B, C, d + 1], backward only
};

}  // namespace semiseg
