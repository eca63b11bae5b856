#pragma once

#include "voxels.h"

namespace semiseg {

struct PrototypeHead {
  Voxels z;                 // [B, d, *S]
  const float* prototypes;  // [C, K, d]
  int64_t C, K;
  Voxels labels, regions;   // [B, *S]; labels may be absent, regions too
  int64_t num_regions;
  float class_temperature, temperature;
  bool squared;  // Dice's denominator, see class_losses.h
  bool normalize, positive_of_label;
  int32_t ignore_prototype;  // flat index, -1 for none
  int threads;
  // Written forward: of every region the number of voxels, I [C], P [C], Y [C] (see class_losses.h; nothing without
  // labels), then the number of voxels in InfoNCE.
  double* statistics;
};

struct PrototypeHeadForward : PrototypeHead {
  Voxels weight;  // [B, *S], of the cluster sums
  bool unit_length, require_agreement;
  Voxels similarity, index;  // [B, C, *S], may be absent
  float *ce, *dice;          // [num_regions]
  float* info_nce;           // [1]
  float* cluster_sum;        // [C, K, d]
  double* cluster_count;     // [C, K]
  int64_t highest_label, highest_region;
};

struct PrototypeHeadBackward : PrototypeHead {
  Voxels grad_similarity;             // [B, C, *S], may be absent
  const float *grad_ce, *grad_dice;   // [num_regions] or null
  const float* grad_info_nce;         // [1] or null
  Voxels grad_z;                      // [B, d, *S]
};

}  // namespace semiseg
