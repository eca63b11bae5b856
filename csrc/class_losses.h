// Cross-entropy and Dice of softmax_c(logit[c] / temperature), per region of a region map.
//
//   ce[r]   = mean over the kept voxels of region r of -sum_c y[c] log p[c]
//   dice[r] = 1 - mean_c (2 I + s) / (P + Y + s),  I = sum p[c] y[c],  P = sum p[c]^2,  Y = sum y[c]^2,  s = DICE_SMOOTH
//
// P and Y are sums of p[c] and y[c] where the denominator is not squared; Dice's mean may begin with a later class.
//
// Statistics of a region: number of kept voxels, I [C], P [C], Y [C].
#pragma once

#include "class_losses_regions.h"
#include "tiles.h"

namespace semiseg::SEMISEG_LEVEL {

struct HardTarget {
  vint label;
  INLINE vfloat times(int64_t c, vfloat x) const { return label == int32_t(c) ? x : vfloat{}; }
  INLINE vfloat square(int64_t c) const { return times(c, broadcast(1.f)); }
  INLINE vfloat total(int64_t) const { return broadcast(1.f); }
};

struct SoftTarget {
  const float* rows;  // [C, pitch], at the vector's first voxel
  int64_t pitch;
  INLINE vfloat value(int64_t c) const { return load(rows + c * pitch); }
  // 0 times infinity is 0 here.
  INLINE vfloat times(int64_t c, vfloat x) const { return value(c) == 0 ? vfloat{} : value(c) * x; }
  INLINE vfloat square(int64_t c) const { return value(c) * value(c); }
  INLINE vfloat total(int64_t C) const {
    vfloat sum{};
    for (int64_t c = 0; c < C; ++c) sum += value(c);
    return sum;
  }
};

// P is the sum of p[c] in_size(p[c]).
INLINE vfloat in_size(bool squared, vfloat p) { return squared ? p : broadcast(1.f); }

// exponentials[c] = exp((logit[c] - max) / temperature). Returns max.
template <class Shape>
INLINE vfloat softmax_exponentials(const Shape& shape, const float* logits, float* exponentials, int64_t pitch,
                                   float inverse_temperature) {
  vfloat top = load(logits);
  for (int64_t c = 1; c < shape.C; ++c) top = maximum(load(logits + c * pitch), top);
  for (int64_t c = 0; c < shape.C; ++c)
    store(exponentials + c * pitch, exp_nonpositive((load(logits + c * pitch) - top) * inverse_temperature));
  return top;
}

template <class Shape>
INLINE vfloat sum_of_classes(const Shape& shape, const float* rows, int64_t pitch) {
  vfloat sum = load(rows);
  for (int64_t c = 1; c < shape.C; ++c) sum += load(rows + c * pitch);
  return sum;
}

// Adds one vector of voxels, of which the `kept` count, to the statistics of their regions, and their cross-entropy to
// sums[ce_sums + region].
template <class Shape, class Target>
INLINE void add_class_statistics(const Shape& shape, const Target& target, const float* logits,
                                 const float* exponentials, int64_t pitch, vfloat top, float inverse_temperature,
                                 bool squared, vint kept, vint region, int64_t regions, int64_t ce_sums,
                                 RunningSums& sums) {
  const vfloat sum = sum_of_classes(shape, exponentials, pitch);
  const vfloat inverse = 1 / sum, log_sum = log_positive(sum);
  vfloat ce{};
  for (int64_t c = 0; c < shape.C; ++c)
    ce += target.times(c, log_sum + (top - load(logits + c * pitch)) * inverse_temperature);
  const int64_t C = shape.C;
  for (int64_t r = 0; r < regions; ++r) {
    const int64_t base = r * statistics_per_region(C);
    const vint here = regions == 1 ? kept : kept & (region == int32_t(r));
    sums.add(ce_sums + r, here ? ce : vfloat{});
    sums.add(base, here ? broadcast(1.f) : vfloat{});
    for (int64_t c = 0; c < C; ++c) {
      const vfloat p = here ? load(exponentials + c * pitch) * inverse : vfloat{};
      sums.add(base + 1 + c, here ? target.times(c, p) : vfloat{});
      sums.add(base + 1 + C + c, p * in_size(squared, p));
      const vfloat y = squared ? target.square(c) : target.times(c, broadcast(1.f));
      sums.add(base + 1 + 2 * C + c, here ? y : vfloat{});
    }
  }
}

INLINE void class_losses(const double* statistics, const double* ce_sums, int64_t regions, int64_t C,
                         int64_t first_class, float* ce, float* dice) {
  for (int64_t r = 0; r < regions; ++r) {
    const Statistics s = statistics_of(statistics, r, C);
    ce[r] = over_voxels(s, ce_sums[r]);
    dice[r] = dice_loss(s, first_class, C);
  }
}

// Derivatives by the region's sums: d loss / d p[c] = by_overlap[r, c] y[c] + by_size[r, c] in_size(p[c]).
struct ClassGradient {
  int64_t regions, C;
  Buffer<float> ce;          // [regions]
  Buffer<float> by_overlap;  // [regions, C]
  Buffer<float> by_size;     // [regions, C]
  bool squared;

  ClassGradient(const double* statistics, int64_t regions, int64_t C, bool squared, int64_t first_class,
                const float* grad_ce, const float* grad_dice)
      : regions(regions), C(C), ce(regions), by_overlap(regions * C), by_size(regions * C), squared(squared) {
    for (int64_t r = 0; r < regions; ++r) {
      const Statistics s = statistics_of(statistics, r, C);
      if (grad_ce != nullptr) ce[r] = over_voxels(s, grad_ce[r]);
      for (int64_t c = first_class; grad_dice != nullptr && c < C; ++c) {
        const DiceGradient gradient = dice_gradient(s, c, C - first_class, squared, grad_dice[r]);
        by_overlap[r * C + c] = gradient.by_overlap;
        by_size[r * C + c] = gradient.by_size;
      }
    }
  }
};

INLINE vfloat of_region(const float* table, int64_t stride, int64_t regions, vint region) {
  vfloat value = broadcast(table[0]);
  for (int64_t r = 1; r < regions; ++r) value = region == int32_t(r) ? broadcast(table[r * stride]) : value;
  return value;
}

// Overwrites the exponentials with d loss / d logit, 0 where a voxel is not kept.
template <class Shape, class Target>
INLINE void class_gradient(const Shape& shape, const ClassGradient& a, const Target& target, float* exponentials,
                           int64_t pitch, float inverse_temperature, vint kept, vint region) {
  const int64_t C = shape.C;
  const vfloat inverse = 1 / sum_of_classes(shape, exponentials, pitch);
  vfloat mean{};  // sum_c p[c] d loss / d p[c]
  for (int64_t c = 0; c < C; ++c) {
    const vfloat p = load(exponentials + c * pitch) * inverse;
    const vfloat by_overlap = of_region(a.by_overlap + c, C, a.regions, region);
    const vfloat by_size = of_region(a.by_size + c, C, a.regions, region);
    mean += p * (target.times(c, by_overlap) + by_size * in_size(a.squared, p));
  }
  const vfloat ce = of_region(a.ce, 1, a.regions, region), total = target.total(C);
  for (int64_t c = 0; c < C; ++c) {
    const vfloat p = load(exponentials + c * pitch) * inverse;
    const vfloat by_overlap = of_region(a.by_overlap + c, C, a.regions, region);
    const vfloat by_size = of_region(a.by_size + c, C, a.regions, region);
    const vfloat by_p = target.times(c, by_overlap) + by_size * in_size(a.squared, p);
    const vfloat by_logit = p * (by_p - mean) + ce * (p * total - target.times(c, broadcast(1.f)));
    store(exponentials + c * pitch, kept ? by_logit * inverse_temperature : vfloat{});
  }
}

}  // namespace semiseg::SEMISEG_LEVEL
