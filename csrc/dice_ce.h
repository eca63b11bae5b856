#pragma once

#include "voxels.h"

namespace semiseg {

constexpr double DICE_SMOOTH = 1e-5;

constexpr int64_t statistics_per_region(int64_t C) { return 1 + 3 * C; }

struct DiceCE {
  Voxels logits;       // [B, C, *S]
  Voxels labels;       // [B, *S]; absent where the target is soft
  Voxels soft_target;  // [B, C, *S]; absent where the target is labels
  Voxels regions;      // [B, *S], may be absent
  int64_t num_regions;
  float temperature;
  bool squared;         // Dice's denominator, see class_losses.h
  int64_t first_class;  // of those in Dice: 1 leaves the background out
  int threads;
  double* statistics;  // [num_regions, 1 + 3 C], see class_losses.h, written forward
  float *ce, *dice;    // [num_regions]; in backward their gradients
  Voxels grad_logits;  // [B, C, *S], backward only
  int64_t highest_label, highest_region;
};

}  // namespace semiseg
