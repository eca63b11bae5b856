// Cross-entropy and Dice of softmax_c(logit[c] / temperature), per region; see class_losses.h.
#include "class_losses.h"
#include "kernels.h"

namespace semiseg::SEMISEG_LEVEL {

namespace {

template <int CLASSES>
struct FixedClasses {
  static constexpr int64_t C = CLASSES;
};
struct AnyClasses {
  int64_t C;
};

template <class Run>
void with_classes(int64_t C, const Run& run) {
  if (C == 2) return run(FixedClasses<2>{});
  if (C == 4) return run(FixedClasses<4>{});
  run(AnyClasses{C});
}

struct ClassTile {
  Buffer<float> logits, exponentials, target;  // [C, pitch]
  Buffer<int32_t> label, region;               // [pitch]
  RunningSums sums;

  ClassTile(int64_t C, int64_t pitch, int64_t statistics)
      : logits(C * pitch), exponentials(C * pitch), target(C * pitch), label(pitch), region(pitch), sums(statistics) {}
};

struct Highest {
  int64_t label = -1, region = -1;
};

Highest load_inputs(const DiceCE& a, const Span& span, int64_t pitch, ClassTile& tile) {
  load_tile(a.logits, span, tile.logits, pitch);
  if (a.soft_target.present) load_tile(a.soft_target, span, tile.target, pitch);
  return {load_labels(a.labels, span, tile.label), load_labels(a.regions, span, tile.region)};
}

// With a soft target every voxel that is not padding is kept.
template <class Run>
INLINE void with_target(const DiceCE& a, const ClassTile& tile, int64_t pitch, int64_t v, const Run& run) {
  if (a.soft_target.present) return run(SoftTarget{tile.target + v, pitch});
  run(HardTarget{load(tile.label + v)});
}

Tiling tiling_of(const DiceCE& a, int64_t sums) {
  return {a.logits.batch, a.logits.voxels, 3 * a.logits.channels, sums};
}

template <class Shape>
void forward(const Shape& shape, DiceCE& a) {
  const int64_t C = a.logits.channels, statistics = a.num_regions * statistics_per_region(C);
  const int64_t sums = statistics + a.num_regions;  // the last: cross-entropy
  Buffer<double> total(sums);
  const float inverse_temperature = 1 / a.temperature;
  const Tiling tiling = tiling_of(a, sums);
  const int64_t pitch = tiling.pitch;
  Highest highest;
  for_chunks<ClassTile>(
      tiling, a.threads, total, sums, [&] { return ClassTile(C, pitch, sums); },
      [&](ClassTile& tile, int64_t chunk, double* partial) {
        Highest seen;
        for (int64_t t = tiling.first_tile(chunk); t < tiling.last_tile(chunk); ++t) {
          const Span span = tiling.span(t);
          const Highest here = load_inputs(a, span, pitch, tile);
          seen = {maximum(seen.label, here.label), maximum(seen.region, here.region)};
          for (int64_t v = 0; v < span.padded; v += WIDTH) {
            float* exponentials = tile.exponentials + v;
            const vfloat top =
                softmax_exponentials(shape, tile.logits + v, exponentials, pitch, inverse_temperature);
            with_target(a, tile, pitch, v, [&](const auto& target) {
              add_class_statistics(shape, target, tile.logits + v, exponentials, pitch, top, inverse_temperature,
                                   a.squared, load(tile.label + v) >= 0, load(tile.region + v), a.num_regions,
                                   statistics, tile.sums);
            });
            tile.sums.next_vector();
          }
        }
        tile.sums.finish(partial);
#pragma omp critical(semiseg_highest)
        highest = {maximum(highest.label, seen.label), maximum(highest.region, seen.region)};
      });
  a.highest_label = highest.label;
  a.highest_region = highest.region;
  for (int64_t i = 0; i < statistics; ++i) a.statistics[i] = total[i];
  class_losses(total, total + statistics, a.num_regions, C, a.first_class, a.ce, a.dice);
}

template <class Shape>
void backward(const Shape& shape, const DiceCE& a) {
  const int64_t C = a.logits.channels;
  const float inverse_temperature = 1 / a.temperature;
  const ClassGradient by_statistics(a.statistics, a.num_regions, C, a.squared, a.first_class, a.ce, a.dice);
  const bool streaming = streams(a.grad_logits);
  const Tiling tiling = tiling_of(a, 0);
  const int64_t pitch = tiling.pitch;
  for_chunks<ClassTile>(
      tiling, a.threads, nullptr, 0, [&] { return ClassTile(C, pitch, 0); },
      [&](ClassTile& tile, int64_t chunk, double*) {
        for (int64_t t = tiling.first_tile(chunk); t < tiling.last_tile(chunk); ++t) {
          const Span span = tiling.span(t);
          load_inputs(a, span, pitch, tile);
          for (int64_t v = 0; v < span.padded; v += WIDTH) {
            float* exponentials = tile.exponentials + v;
            softmax_exponentials(shape, tile.logits + v, exponentials, pitch, inverse_temperature);
            with_target(a, tile, pitch, v, [&](const auto& target) {
              class_gradient(shape, by_statistics, target, exponentials, pitch, inverse_temperature,
                             load(tile.label + v) >= 0, load(tile.region + v));
            });
          }
          store_tile(a.grad_logits, span, tile.exponentials, pitch, streaming);
        }
      });
}

}  // namespace

void dice_ce_forward(DiceCE& a) {
  with_classes(a.logits.channels, [&](const auto& shape) { forward(shape, a); });
}

void dice_ce_backward(const DiceCE& a) {
  with_classes(a.logits.channels, [&](const auto& shape) { backward(shape, a); });
}

}  // namespace semiseg::SEMISEG_LEVEL
