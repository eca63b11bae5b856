// Per cluster the weighted sum and count of the voxels assigned to it: each voxel to the nearest prototype of its
// label's class.
#pragma once

#include "prototypes.h"

namespace semiseg::SEMISEG_LEVEL {

struct ClusterSums {
  // Few clusters: every cluster's masked sum, voxels along the vector. Many: voxel by voxel.
  static constexpr int64_t MOST_DENSE = 12, MOST_DENSE_SUMS = 1024;
  static constexpr int64_t VECTORS = 16;  // summed in float32 before float64 takes over

  int64_t count, d;
  bool dense, unit_length, require_agreement;
  Buffer<int32_t> assigned;  // [pitch], class * K + prototype, -1 for none
  Buffer<float> factor;      // [pitch], what an embedding is multiplied with in the sum
  Buffer<vdouble> lanes;     // dense: [count, d + 1], the last the count
  int64_t stride;            // otherwise
  Buffer<double> sums;       // [count, stride]
  Buffer<double> counts;     // [count]

  ClusterSums(const Prototypes& p, int64_t pitch, bool unit_length, bool require_agreement)
      : count(p.count), d(p.d), dense(count <= MOST_DENSE && count * d <= MOST_DENSE_SUMS), unit_length(unit_length),
        require_agreement(require_agreement), assigned(pitch), factor(pitch), lanes(dense ? count * (d + 1) : 0),
        stride(dense ? 0 : round_up(d, WIDTH)), sums(count * stride), counts(dense ? 0 : count) {}

  template <class Shape>
  INLINE void assign(const Shape& shape, const PrototypeTile& tile, const Winner& nearest, int64_t v) {
    const vint label = load(tile.label + v);
    const vfloat weight = load(tile.weight + v);
    const vint flat = best_of_label(shape, tile, v).flat;
    vint kept = (label >= 0) & (weight != 0);
    // The nearest of all has the label's class exactly where it is the nearest of that class.
    if (require_agreement) kept &= flat == nearest.flat;
    store(assigned + v, kept ? flat : vint{} - 1);
    store(factor + v, unit_length ? weight * load(tile.inverse + v) : weight);
  }

  void add(const PrototypeTile& tile, const Span& span) {
    if (!dense) return add_one_by_one(tile, span);
    for (int64_t v = 0; v < span.padded; v += VECTORS * WIDTH) {
      const int64_t end = minimum(v + VECTORS * WIDTH, span.padded);
      int64_t i = 0;
      for (; i + CLUSTERS <= count; i += CLUSTERS) add_channels<CLUSTERS>(tile, i, v, end);
      for (; i < count; ++i) add_channels<1>(tile, i, v, end);
    }
  }

  void finish(double* sum, double* number) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j <= d; ++j) {
        double& out = j < d ? sum[i * d + j] : number[i];
        if (dense) {
          vdouble& in = lanes[i * (d + 1) + j];
          for (int lane = 0; lane < HALF; ++lane) out += in[lane];
          in = vdouble{};
        } else {
          double& in = j < d ? sums[i * stride + j] : counts[i];
          out += in;
          in = 0;
        }
      }
    }
  }

 private:
  static constexpr int CLUSTERS = WIDTH == 16 ? 6 : 3, CHANNELS = 4;

  template <int ROWS>
  INLINE void add_channels(const PrototypeTile& tile, int64_t i, int64_t v, int64_t end) {
    int64_t j = 0;
    for (; j + CHANNELS <= d; j += CHANNELS) add_block<ROWS, CHANNELS>(tile.z + j * tile.pitch, factor, tile.pitch, i, j, v, end);
    for (; j < d; ++j) add_block<ROWS, 1>(tile.z + j * tile.pitch, factor, tile.pitch, i, j, v, end);
    add_block<ROWS, 1>(tile.weight, nullptr, tile.pitch, i, d, v, end);
  }

  template <int ROWS, int COLUMNS>
  void add_block(const float* rows, const float* factors, int64_t pitch, int64_t i, int64_t j, int64_t v, int64_t end) {
    vfloat sum[ROWS][COLUMNS] = {};
    for (; v < end; v += WIDTH) {
      vint steps = load(assigned + v) - int32_t(i);  // 0 where the voxel belongs to the cluster at hand
      vfloat x[COLUMNS];
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; ++c) {
        x[c] = load(rows + c * pitch + v);
        if (factors != nullptr) x[c] *= load(factors + v);
      }
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
        const vint here = steps == 0;
        steps -= 1;
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; ++c) sum[r][c] = here ? sum[r][c] + x[c] : sum[r][c];
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < COLUMNS; ++c)
        lanes[(i + r) * (d + 1) + j + c] += low_half(sum[r][c]) + high_half(sum[r][c]);
  }

  void add_one_by_one(const PrototypeTile& tile, const Span& span) {
    for (int64_t v = 0; v < span.n; ++v)
      if (assigned[v] >= 0) counts[assigned[v]] += tile.weight[v];
    for (int64_t v = 0; v < span.padded; v += WIDTH) {
      for (int64_t j = 0; j < d; j += WIDTH) {
        vfloat rows[WIDTH];
        for (int i = 0; i < WIDTH; ++i) rows[i] = j + i < d ? load(tile.z + (j + i) * tile.pitch + v) : vfloat{};
        transpose(rows);
        for (int i = 0; i < WIDTH; ++i) {
          if (assigned[v + i] < 0) continue;
          double* sum = sums + assigned[v + i] * stride + j;
          const vfloat x = rows[i] * factor[v + i];
          write(sum, read<vdouble>(sum) + low_half(x));
          write(sum + HALF, read<vdouble>(sum + HALF) + high_half(x));
        }
      }
    }
  }
};

}  // namespace semiseg::SEMISEG_LEVEL
