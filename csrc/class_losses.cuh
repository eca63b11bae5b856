// Cross-entropy and Dice of softmax_c(logit[c] / temperature), per region of a region map.
//
//   ce[r]   = mean over the kept voxels of region r of -sum_c y[c] log p[c]
//   dice[r] = 1 - mean_c (2 I + s) / (P + Y + s)
//   I = sum p[c] y[c],  P = sum p[c]^2,  Y = sum y[c]^2,  s = DICE_SMOOTH
//
// P and Y are sums of p[c] and y[c] where the denominator is not squared; Dice's mean may begin with a later class.
//
// Sums of a region: number of kept voxels, I [C], P [C], Y [C]. The sums of all regions come first, then the
// cross-entropy of every region.
#pragma once

#include "class_losses_regions.h"
#include "device_math.cuh"
#include "device_sums.cuh"

namespace semiseg {

__host__ __device__ constexpr int64_t region_sums(int64_t regions, int64_t C) {
  return regions * (statistics_per_region(C) + 1);
}

// P is the sum of p[c] in_size(p[c]), Y that of y[c] in_size(y[c]).
__device__ __forceinline__ float in_size(bool squared, float p) { return squared ? p : 1.f; }

struct ClassSoftmax {
  Temperature temperature;
  float top, sum, inverse_sum;  // sum: of exp((logit - top) / temperature)

  __device__ __forceinline__ float probability(float logit) const {
    return temperature.exponential(logit - top) * inverse_sum;
  }
  // Minus the logarithm of the probability but for that of the sum.
  __device__ __forceinline__ float below_top(float logit) const { return (top - logit) * temperature.inverse; }
};

// logits(c) of a voxel whose largest is `top`.
template <class Tile, class Voxel, class Logits>
__device__ __forceinline__ ClassSoftmax class_softmax(const Tile& tile, const Voxel& x, const Logits& logits, float top,
                                                      const Temperature& temperature) {
  float sum = 0;
#pragma unroll
  for (int c = x.lane; c < tile.C; c += Tile::LANES) sum += temperature.exponential(logits(c) - top);
  sum = x.sum(sum);
  return {temperature, top, sum, reciprocal(sum)};
}

struct HardTarget {
  static constexpr bool ONE_CLASS = true;
  int label;
  __device__ __forceinline__ float operator()(int c) const { return c == label ? 1.f : 0.f; }
  // y[c] x, and no NaN of another class.
  __device__ __forceinline__ float times(int c, float x) const { return c == label ? x : 0.f; }
};

__device__ __forceinline__ HardTarget hard_target(const Voxels& labels, const Span& span, int offset, int C) {
  return {offset < span.n ? load_label(labels, span.image, span.first + offset, C) : -1};
}

// sum_c y[c] (logarithm + below_top[c])
template <class Tile, class Voxel, class Logits, class Target>
__device__ __forceinline__ float cross_entropy(const Tile& tile, const Voxel& x, const ClassSoftmax& softmax,
                                               const Logits& logits, const Target& target, float logarithm) {
  float sum = 0;
#pragma unroll
  for (int c = x.lane; c < tile.C; c += Tile::LANES)
    sum += target.times(c, logarithm + softmax.below_top(logits(c)));
  return x.sum(sum);
}

// The sums of narrow tiles, whose class count is known: two regions at most, every thread its voxels, those of a few
// tiles in float32.
constexpr int MOST_NARROW_REGIONS = 2;

template <class Tile>
struct NarrowRegionStatistics {
  static constexpr int MOST_REGIONS = MOST_NARROW_REGIONS, C = Tile::C, STATISTICS = 1 + 3 * C;

  int regions;
  bool squared;
  ColumnSums columns;
  float recent[MOST_REGIONS][STATISTICS], ce[MOST_REGIONS];
  LogarithmSum<C> logarithms[MOST_REGIONS];  // which `ce` lacks

  __host__ __device__ __forceinline__ NarrowRegionStatistics(Arena& shared, const Tile&, int regions, bool squared)
      : regions(regions), squared(squared), columns(shared, int(region_sums(regions, C))) {}

  __device__ __forceinline__ void start(const Partials&, int64_t) {
    columns.start();
    clear();
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < MOST_REGIONS; ++r) {
      ce[r] = 0;
      logarithms[r] = {};
#pragma unroll
      for (int i = 0; i < STATISTICS; ++i) recent[r][i] = 0;
    }
  }

  // A voxel of region -1 is not kept.
  template <class Voxel, class Logits, class Target>
  __device__ __forceinline__ void add(const Tile& tile, const Voxel& x, const ClassSoftmax& softmax,
                                      const Logits& logits, const Target& target, int region) {
    const float logarithm = Target::ONE_CLASS ? 0 : logf(softmax.sum);
    const float voxel_ce = cross_entropy(tile, x, softmax, logits, target, logarithm);
    float p[C];
#pragma unroll
    for (int c = 0; c < C; ++c) p[c] = softmax.probability(logits(c));
#pragma unroll
    for (int r = 0; r < MOST_REGIONS; ++r) {
      if (region != r) continue;
      ce[r] += voxel_ce;
      if (Target::ONE_CLASS) ce[r] += logarithms[r].add(softmax.sum);
      recent[r][0] += 1;
#pragma unroll
      for (int c = 0; c < C; ++c) {
        recent[r][1 + c] += target.times(c, p[c]);
        recent[r][1 + C + c] = fmaf(p[c], in_size(squared, p[c]), recent[r][1 + C + c]);
        recent[r][1 + 2 * C + c] += target.times(c, in_size(squared, target(c)));
      }
    }
  }

  template <class TargetOf>
  __device__ __forceinline__ void finish_tile(bool enough, const TargetOf&) {
    if (enough) widen();
  }

  __device__ __forceinline__ void widen() {
#pragma unroll
    for (int r = 0; r < MOST_REGIONS; ++r) {
      if (r >= regions) continue;
#pragma unroll
      for (int i = 0; i < STATISTICS; ++i) columns.add(r * STATISTICS + i, recent[r][i]);
      columns.add(regions * STATISTICS + r, ce[r] + logarithms[r].rest());
    }
    clear();
  }

  __device__ void finish(const Partials& partials, int64_t first) {
    widen();
    columns.finish(partials, first);
  }
};

// The sums of wide tiles of as many voxels as a warp has lanes: the probabilities replace the first rows of the tile,
// and each warp then sums the voxels of every region for some of the classes.
template <class Tile>
struct WideRegionStatistics {
  static constexpr int64_t MOST_SHARED = 1024;  // the running sums of more regions and classes stay in the partials
  static_assert(Tile::VOXELS == WARP);

  int regions, C;
  bool squared;
  int64_t count;
  double* sums;
  int64_t stride = 1;
  float* rows;    // shared, [C, Tile::PITCH]
  float* ce;      // shared, [VOXELS]
  int* region;    // shared, [VOXELS]

  __host__ __device__ WideRegionStatistics(Arena& shared, const Tile& tile, int regions, bool squared)
      : regions(regions), C(tile.C), squared(squared), count(region_sums(regions, C)),
        sums(count <= MOST_SHARED ? shared.take<double>(count) : nullptr), rows(tile.rows),
        ce(shared.take<float>(Tile::VOXELS)), region(shared.take<int>(Tile::VOXELS)) {}

  __device__ void start(const Partials& partials, int64_t first) {
    if (count > MOST_SHARED) {
      sums = &partials.mine(first);
      stride = partials.blocks;
    }
    for (int64_t i = threadIdx.x; i < count; i += THREADS) sums[i * stride] = 0;
    __syncthreads();
  }

  template <class Voxel, class Logits, class Target>
  __device__ __forceinline__ void add(const Tile& tile, const Voxel& x, const ClassSoftmax& softmax,
                                      const Logits& logits, const Target& target, int voxel_region) const {
    const float voxel_ce = cross_entropy(tile, x, softmax, logits, target, logf(softmax.sum));
    if (x.lane == 0) {
      ce[x.offset] = voxel_ce;
      region[x.offset] = voxel_region;
    }
    // Row c may hold a logit of class c or of one before it: all lanes read before any of them writes.
    for (int first = 0; first < C; first += Tile::LANES) {
      const int c = first + x.lane;
      const float p = c < C ? softmax.probability(logits(c)) : 0.f;
      __syncwarp();
      if (c < C) rows[c * Tile::PITCH + x.offset] = p;
    }
  }

  template <class TargetOf>
  __device__ void finish_tile(bool, const TargetOf& target_of) const {
    __syncthreads();
    const int v = threadIdx.x % WARP, warp = threadIdx.x / WARP, mine = region[v];
    const auto& target = target_of(v);
    for (unsigned left = __ballot_sync(ALL_LANES, mine >= 0); left != 0;) {
      const int r = __shfl_sync(ALL_LANES, mine, __ffs(left) - 1);
      left &= ~__ballot_sync(ALL_LANES, mine == r);
      const auto add_to = [&](int64_t i, float x) {
        const float sum = warp_sum(mine == r ? x : 0.f);
        if (v == 0) sums[i * stride] += sum;
      };
      const int64_t base = r * statistics_per_region(C);
      for (int c = warp; c < C; c += WARPS) {
        const float p = rows[c * Tile::PITCH + v];
        add_to(base + 1 + c, target.times(c, p));
        add_to(base + 1 + C + c, p * in_size(squared, p));
        add_to(base + 1 + 2 * C + c, target.times(c, in_size(squared, target(c))));
      }
      if (warp == WARPS - 1) {
        add_to(base, 1);
        add_to(regions * statistics_per_region(C) + r, ce[v]);
      }
    }
    __syncthreads();
  }

  __device__ void finish(const Partials& partials, int64_t first) const {
    if (count > MOST_SHARED) return;
    for (int64_t i = threadIdx.x; i < count; i += THREADS) partials.mine(first + i) = sums[i];
  }
};

template <class Tile>
using RegionStatistics = std::conditional_t<Tile::LANES == 1, NarrowRegionStatistics<Tile>, WideRegionStatistics<Tile>>;

// One thread for every region.
__device__ inline void class_losses(
    const double* sums,  // [region_sums]
    int64_t regions, int64_t C,
    int64_t first_class,  // of those in Dice
    float* ce,            // [regions]
    float* dice           // [regions]
) {
  for (int64_t r = threadIdx.x; r < regions; r += THREADS) {
    const Statistics s = statistics_of(sums, r, C);
    ce[r] = over_voxels(s, sums[regions * statistics_per_region(C) + r]);
    dice[r] = dice_loss(s, first_class, C);
  }
}

// Derivatives by the region's sums: d loss / d p[c] = by_overlap[r, c] y[c] + by_size[r, c] in_size(p[c]).
struct ClassGradient {
  float *ce, *by_overlap, *by_size;  // [regions], [regions, C], [regions, C]
  int regions, C, first_class;       // the first in Dice
  bool squared;

  ClassGradient(Arena& workspace, int64_t regions, int64_t C, bool squared, int64_t first_class)
      : ce(workspace.take<float>(regions)), by_overlap(workspace.take<float>(regions * C)),
        by_size(workspace.take<float>(regions * C)), regions(int(regions)), C(int(C)), first_class(int(first_class)),
        squared(squared) {}
};

static __global__ void __launch_bounds__(THREADS) class_gradient_of_sums(
    ClassGradient gradient,
    const double* statistics,  // [regions, 1 + 3 C]
    const float* grad_ce,      // [regions] or null
    const float* grad_dice     // [regions] or null
) {
  const int r = blockIdx.x, C = gradient.C;
  const Statistics s = statistics_of(statistics, r, C);
  if (threadIdx.x == 0) gradient.ce[r] = grad_ce == nullptr ? 0.f : over_voxels(s, grad_ce[r]);
  for (int c = threadIdx.x; c < C; c += THREADS) {
    DiceGradient of_class{0, 0};
    if (grad_dice != nullptr && c >= gradient.first_class)
      of_class = dice_gradient(s, c, C - gradient.first_class, gradient.squared, grad_dice[r]);
    gradient.by_overlap[int64_t(r) * C + c] = of_class.by_overlap;
    gradient.by_size[int64_t(r) * C + c] = of_class.by_size;
  }
}

inline void launch_class_gradient(const ClassGradient& gradient, const double* statistics, const float* grad_ce,
                                  const float* grad_dice, const Device& device) {
  launch(class_gradient_of_sums, dim3(gradient.regions), dim3(THREADS), 0, device.stream, gradient, statistics, grad_ce,
         grad_dice);
}

// A voxel's derivative by its logits; nothing where it is not kept (region -1).
template <class Target>
struct VoxelClassGradient {
  const ClassSoftmax& softmax;
  const Target& target;
  const float *by_overlap, *by_size;  // [C], of the voxel's region
  bool squared, kept;
  float ce, total, mean;  // total: sum_c y[c]; mean: sum_c p[c] d loss / d p[c]

  template <class Tile, class Voxel, class Logits>
  __device__ __forceinline__ VoxelClassGradient(const Tile& tile, const Voxel& x, const ClassGradient& gradient,
                                                const ClassSoftmax& softmax, const Logits& logits,
                                                const Target& target, int region)
      : softmax(softmax), target(target), squared(gradient.squared), kept(region >= 0), total(0), mean(0) {
    const int row = kept ? region : 0;
    by_overlap = gradient.by_overlap + row * gradient.C;
    by_size = gradient.by_size + row * gradient.C;
    ce = gradient.ce[row];
#pragma unroll
    for (int c = x.lane; c < tile.C; c += Tile::LANES) {
      const float p = softmax.probability(logits(c));
      mean += p * by_probability(c, p);
      total += target(c);
    }
    mean = x.sum(mean);
    total = x.sum(total);
  }

  __device__ __forceinline__ float by_probability(int c, float p) const {
    return target.times(c, by_overlap[c]) + by_size[c] * in_size(squared, p);
  }

  __device__ __forceinline__ float by_logit(int c, float logit) const {
    const float p = softmax.probability(logit);
    const float derivative = p * (by_probability(c, p) - mean) + ce * (p * total - target(c));
    return kept ? derivative * softmax.temperature.inverse : 0.f;
  }
};

}  // namespace semiseg
