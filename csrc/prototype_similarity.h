#pragma once

#include "voxels.h"

namespace semiseg {

constexpr float EPSILON = 1e-6f;  // norms are clamped here

struct PrototypeSimilarity {
  Voxels z;                 // [B, d, *S]
  const float* prototypes;  // [C, K, d]
  int64_t C, K;
  Voxels similarity;  // [B, C, *S]; in backward its gradient
  Voxels index;       // [B, C, *S] uint8 or int16
  Voxels grad_z;      // [B, d, *S], backward only
  int threads;
};

}  // namespace semiseg
