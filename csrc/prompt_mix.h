#pragma once

#include "voxels.h"

namespace semiseg {

struct PromptMix {
  Voxels logits;      // [B, C, *S]
  const float* text;  // [C, E]
  int64_t E;
  int threads;
  Voxels prompt;       // [B, E, *S]; in backward its gradient
  Voxels grad_logits;  // [B, C, *S], backward only
  float* grad_text;    // [C, E], backward only
};

}  // namespace semiseg
