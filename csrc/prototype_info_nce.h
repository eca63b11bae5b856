#pragma once

#include "voxels.h"

namespace semiseg {

struct PrototypeInfoNCE {
  Voxels z;                 // [B, d, *S]
  const float* prototypes;  // [C, K, d]
  int64_t C, K;
  Voxels labels, weight;    // [B, *S], may be absent
  float temperature;
  bool normalize;
  int32_t ignore_prototype;  // flat index, -1 for none
  int threads;
  double* denominator;  // [1], sum of the kept voxels' weights, written forward
  float* loss;          // [1]; in backward its gradient
  Voxels grad_z;        // [B, d, *S], backward only
  int64_t highest_label;
};

}  // namespace semiseg
