#pragma once

#include "voxels.h"

namespace semiseg {

struct ClusterMean {
  Voxels z;                 // [B, d, *S]
  const float* prototypes;  // [C, K, d]
  int64_t C, K;
  Voxels labels, weight;    // [B, *S]; weight may be absent
  bool unit_length, require_agreement;
  int threads;
  float* cluster_sum;     // [C, K, d]
  double* cluster_count;  // [C, K]
  int64_t highest_label;
};

}  // namespace semiseg
