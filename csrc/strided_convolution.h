#pragma once

#include <cstdint>

namespace semiseg {

// Fine voxels, and coarse ones of which each stands for 2 x 2 x 2 or, in images, 2 x 2 of them.
struct StridedConvolution {
  int64_t B, D, H, W;    // coarse; D is 1 for images
  bool volume;           // three axes, else two
  int64_t I, O;          // channels of fine and of coarse voxels, multiples of 16
  int64_t out_stride, in_stride, tap_stride;  // of a weight [O, I, *2], in elements
  int threads;
};

// Coarse voxels from fine ones or, transposed, fine from coarse.
struct StridedConvolutionForward : StridedConvolution {
  const float* x;
  const float* weight;  // [O, I, *2]
  const float* bias;    // [channels written], may be absent
  float negative_slope;  // of the ReLU of the result; 1 for none
  const float* added;    // to fine results behind the ReLU, in their shape; may be absent
  float* y;
};

struct StridedConvolutionWeight : StridedConvolution {
  const float* fine;    // [B, *2S, I]
  const float* coarse;  // [B, *S, O]
  float* grad_weight;   // [O, I, *2]
};

}  // namespace semiseg
