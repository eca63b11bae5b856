#pragma once

#include <cstdint>

namespace semiseg {

struct LargestComponents {
  const uint8_t* label;  // [B, Z, Y, X], an image has fewer than 2^31 voxels
  int64_t B, Z, Y, X, C;
  int threads;
  uint8_t* kept;  // [B, Z, Y, X]
};

}  // namespace semiseg
