#pragma once

#include <cstdint>

namespace semiseg {

// Images and volumes as rows of channels, and a weight [O, I, *3] of any strides, in elements.
struct Convolution {
  int64_t B, D, H, W;  // D is 1 for images
  bool volume;         // three axes, else two
  int64_t I, O;        // channels read and written, multiples of 16, or fewer than 16 read
  int64_t out_stride, in_stride, tap_stride;
  int threads;

  int64_t voxels() const { return B * D * H * W; }
  int64_t taps() const { return volume ? 27 : 9; }
};

// A weight as the matrices that x is multiplied with: one for each of a tile's points, or for each line of taps where few
// channels are read.
struct ConvolutionMatrices : Convolution {
  const float* weight;  // [O, I, *3]
  bool mirrored;        // taps in reverse: with channels exchanged, for the gradient of the input
  float* matrices;      // [count]; absent, they are only counted
  int64_t count, columns;  // of all of them; that lie next to each other, which is up to the level
  bool turned;             // the last two axes of the taps have changed places
};

struct ConvolutionForward : Convolution {
  const float* x;         // [B, *S, I]
  const float* matrices;  // of the same sides and channels, made on the same level
  const float* bias;      // [O], may be absent
  float negative_slope;   // of the ReLU of the result; 1 for none
  float* y;               // [B, *S, O]
};

struct ConvolutionWeight : Convolution {
  const float* x;      // [B, *S, I]
  const float* grad_y;  // [B, *S, O]
  float* grad_weight;  // [O, I, *3]
};

}  // namespace semiseg
