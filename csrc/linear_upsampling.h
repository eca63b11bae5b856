#pragma once

#include "voxels.h"

namespace semiseg {

struct LinearUpsampling {
  Voxels x, y;  // [B, C, *S] and [B, C, *2S], dense, of one memory format; in backward their gradients
  int64_t depth, height, width;  // S; the depth of images is 1, and is not doubled
  bool volumes;
};

}  // namespace semiseg
