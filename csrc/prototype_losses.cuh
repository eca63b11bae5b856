// What the prototype operations do with a voxel's cosines: the nearest prototypes, the positive of InfoNCE and its
// softmax, and the coefficients of the gradient. Threads that share a voxel take the classes lane, lane + LANES, ...
#pragma once

#include "device_math.cuh"
#include "prototype_tiles.cuh"

namespace semiseg {

struct Winner {
  float cosine;
  int flat;  // class * K + prototype
};

template <class Tile, class Voxel>
__device__ __forceinline__ Winner best_of_class(const Tile& tile, const Voxel& x, int c) {
  Winner best{x.cosine[c * tile.K], c * tile.K};
#pragma unroll
  for (int k = 1; k < tile.K; ++k) {
    const float cosine = x.cosine[c * tile.K + k];
    if (cosine > best.cosine) best = {cosine, c * tile.K + k};
  }
  return best;
}

// NaN is larger than any number; of equals the lower index is.
__device__ __forceinline__ bool precedes(const Winner& a, const Winner& b) {
  const bool a_nan = a.cosine != a.cosine, b_nan = b.cosine != b.cosine;
  if (a_nan || b_nan) return a_nan != b_nan ? a_nan : a.flat < b.flat;
  return a.cosine != b.cosine ? a.cosine > b.cosine : a.flat < b.flat;
}

struct Nearest {
  Winner of_all, of_label;  // of_label: of class 0 where the label is negative
};

// Also hands every class's best to seen(c, winner).
template <class Tile, class Voxel, class Seen>
__device__ __forceinline__ Nearest find_nearest(const Tile& tile, const Voxel& x, int label, const Seen& seen) {
  const int of_label = label < 0 ? 0 : label;
  Nearest nearest{{-INFINITY, INT32_MAX}, {-INFINITY, INT32_MAX}};
#pragma unroll
  for (int c = x.lane; c < tile.C; c += Tile::LANES) {
    const Winner best = best_of_class(tile, x, c);
    seen(c, best);
    if (best.cosine > nearest.of_all.cosine || c == x.lane) nearest.of_all = best;
    if (c == of_label) nearest.of_label = best;
  }
  if constexpr (Tile::LANES > 1) {
    const int owner = int(threadIdx.x) % WARP / Tile::LANES * Tile::LANES + of_label % Tile::LANES;
    nearest.of_label.cosine = __shfl_sync(ALL_LANES, nearest.of_label.cosine, owner);
    nearest.of_label.flat = __shfl_sync(ALL_LANES, nearest.of_label.flat, owner);
    for (int step = 1; step < Tile::LANES; step *= 2) {
      const Winner other{__shfl_xor_sync(ALL_LANES, nearest.of_all.cosine, step),
                         __shfl_xor_sync(ALL_LANES, nearest.of_all.flat, step)};
      if (precedes(other, nearest.of_all)) nearest.of_all = other;
    }
  }
  return nearest;
}

template <class Tile, class Voxel>
__device__ __forceinline__ Nearest find_nearest(const Tile& tile, const Voxel& x, int label) {
  return find_nearest(tile, x, label, [](int, const Winner&) {});
}

struct InfoNCE {
  Temperature temperature;
  bool normalize;
  int ignore_prototype;
};

// loss = logsumexp_i(logit[i] / temperature) - logit[positive] / temperature, logit = cosine, or z . p if not
// normalised.
struct Contrast {
  float below_top, top, sum;  // below_top: the positive, divided by temperature; sum: of exp((logit - top) / temperature)
  int positive;
  __device__ __forceinline__ float loss() const { return logf(sum) + below_top; }
};

template <class Tile, class Voxel>
__device__ __forceinline__ float logit(const Tile& tile, const Voxel& x, const InfoNCE& a, int i) {
  // Rounded as a product, never joined with a subtraction: the largest logit minus itself is 0.
  return a.normalize ? x.cosine[i] : __fmul_rn(x.cosine[i] * x.length.value, tile.length[i]);
}

template <class Tile, class Voxel>
__device__ __forceinline__ Contrast contrast(const Tile& tile, const Voxel& x, const InfoNCE& a,
                                             const Winner& nearest, const Winner& positive) {
  float top = nearest.cosine, of_positive = positive.cosine;
  if (!a.normalize) {
    top = -INFINITY;
    of_positive = 0;
#pragma unroll
    for (int c = x.lane; c < tile.C; c += Tile::LANES) {
#pragma unroll
      for (int k = 0; k < tile.K; ++k) {
        const float value = logit(tile, x, a, c * tile.K + k);
        top = value > top ? value : top;
        if (positive.flat == c * tile.K + k) of_positive = value;
      }
    }
    top = x.max(top);
    of_positive = x.sum(of_positive);
  }
  float sum = 0;
#pragma unroll
  for (int c = x.lane; c < tile.C; c += Tile::LANES)
#pragma unroll
    for (int k = 0; k < tile.K; ++k)
      sum += a.temperature.exponential(logit(tile, x, a, c * tile.K + k) - top);
  sum = x.sum(sum);
  return {(top - of_positive) * a.temperature.inverse, top, sum, positive.flat};
}

struct ClassDerivative {
  float value;  // d loss / d cosine[c, k]
  int k;        // the winner
};

// Overwrites the cosines with the coefficients of the gradient with respect to z,
//   sum_i coefficient[i] unit(p[i]) + shrink z,
// by d cosine[i] / dz = (unit(p[i]) - cosine[i] unit(z)) / |z|; cosines of embeddings shorter than EPSILON are
// constant.
// `scale` is d loss / d (the voxel's InfoNCE), 0 for none; by_class(c) is the derivative by class c's best cosine.
template <bool WITH_CONTRAST, class Tile, class Voxel, class ByClass>
__device__ __forceinline__ void gradient_coefficients(const Tile& tile, const Voxel& x, const InfoNCE& a,
                                                      const Contrast& contrast, float scale, const ByClass& by_class) {
  const float inverse = x.length.inverse, of_cosine = x.length.value == EPSILON ? 0.f : inverse;
  const float of_positive = scale * a.temperature.inverse * (a.normalize ? of_cosine : 1.f);
  const float of_others = of_positive * reciprocal(contrast.sum);
  const bool contrasted = of_positive != 0;  // also of NaN
  float along = 0;  // sum_i derivative[i] cosine[i] / |z|
#pragma unroll
  for (int c = x.lane; c < tile.C; c += Tile::LANES) {
    const ClassDerivative of_class = by_class(c);
    const float of_winner = of_cosine != 0 ? of_class.value * of_cosine : 0.f;
#pragma unroll
    for (int k = 0; k < tile.K; ++k) {
      const int i = c * tile.K + k;
      float by_cosine = k == of_class.k ? of_winner : 0.f, by_logit = 0;
      if (WITH_CONTRAST) {
        by_logit = a.temperature.exponential(logit(tile, x, a, i) - contrast.top) * of_others;
        if (i == contrast.positive) by_logit -= of_positive;
        by_logit = contrasted ? by_logit : 0.f;
        if (a.normalize) by_cosine += by_logit;
      }
      along = fmaf(by_cosine, x.cosine[i], along);
      x.cosine[i] = !WITH_CONTRAST || a.normalize ? by_cosine : by_cosine + by_logit * tile.length[i];
    }
  }
  x.set_shrink(-x.sum(along) * inverse);
}

}  // namespace semiseg
