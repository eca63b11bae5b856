// Everything the prototypes do in a training step, in one read of the embeddings each way.
//
//   similarity[c] = max_k unit(z) . unit(p[c, k])
//   ce, dice      of softmax_c(similarity[c] / class_temperature) against the labels, per region
//   info_nce      = mean of logsumexp_ck(logit / temperature) - logit[positive] / temperature
//   cluster sums  of the embeddings, each voxel in the nearest cluster of its label's class
#include "class_losses.h"
#include "cluster_sums.h"
#include "kernels.h"

namespace semiseg::SEMISEG_LEVEL {

namespace {

struct Common {
  InfoNCE info_nce;
  float inverse_class_temperature;
  bool shared;  // a class's exponential is the largest of its prototypes' in InfoNCE

  explicit Common(const PrototypeHead& a)
      : info_nce{1 / a.temperature, a.normalize, a.positive_of_label, a.ignore_prototype},
        inverse_class_temperature(1 / a.class_temperature),
        shared(a.normalize && a.temperature == a.class_temperature) {}
};

// exponentials[c] = exp((best[c] - max) / class_temperature)
template <class Shape>
INLINE void class_exponentials(const Shape& shape, const Common& common, bool have_info_nce, const PrototypeTile& tile,
                               float* exponentials, int64_t v) {
  const int64_t pitch = tile.pitch;
  if (!common.shared || !have_info_nce) {
    softmax_exponentials(shape, tile.best + v, exponentials, pitch, common.inverse_class_temperature);
    return;
  }
  for (int64_t c = 0; c < shape.C; ++c) {
    const float* rows = tile.exponential + c * shape.K * pitch + v;
    vfloat largest = load(rows);
    for (int64_t k = 1; k < shape.K; ++k) largest = maximum(load(rows + k * pitch), largest);
    store(exponentials + c * pitch, largest);
  }
}

// Where the sums over voxels lie: the regions' statistics, InfoNCE's voxels, InfoNCE, the regions' cross-entropies, then
// the clusters' sums and counts.
struct SumLayout {
  int64_t regions, info_nce_voxels, info_nce, ce, cluster_sum, cluster_count, count;

  explicit SumLayout(const PrototypeHead& a) {
    const int64_t clusters = a.labels.present ? a.C * a.K : 0;
    regions = a.labels.present ? a.num_regions : 0;
    info_nce_voxels = regions * statistics_per_region(a.C);
    info_nce = info_nce_voxels + 1;
    ce = info_nce + 1;
    cluster_sum = ce + regions;
    cluster_count = cluster_sum + clusters * a.z.channels;
    count = cluster_count + clusters;
  }
};

void write_results(const SumLayout& at, const double* total, const PrototypeHeadForward& a) {
  const double voxels = total[at.info_nce_voxels];
  for (int64_t i = 0; i <= at.info_nce_voxels; ++i) a.statistics[i] = total[i];
  *a.info_nce = voxels == 0 ? 0 : float(total[at.info_nce] / voxels);
  class_losses(total, total + at.ce, at.regions, a.C, 0, a.ce, a.dice);
  for (int64_t i = at.cluster_sum; i < at.cluster_count; ++i) a.cluster_sum[i - at.cluster_sum] = float(total[i]);
  for (int64_t i = at.cluster_count; i < at.count; ++i) a.cluster_count[i - at.cluster_count] = total[i];
}

struct ForwardScratch {
  PrototypeTile tile;
  ClusterSums clusters;
  RunningSums sums;
  Buffer<float> exponentials;  // [C, pitch]
};

template <class Shape>
void forward(const Shape& shape, PrototypeHeadForward& a) {
  const Common common(a);
  const Prototypes prototypes(a.prototypes, a.C, a.K, a.z.channels);
  const Panels panels = prototypes.for_cosines();
  const bool labelled = a.labels.present;
  const SumLayout at(a);
  const Tiling tiling(a.z.batch, a.z.voxels, a.z.channels + 2 * prototypes.count, at.count);
  Buffer<double> total(at.count);
  int64_t highest_label = -1, highest_region = -1;

  for_chunks<ForwardScratch>(
      tiling, a.threads, total, at.count,
      [&] {
        return ForwardScratch{PrototypeTile(prototypes, tiling.pitch),
                              ClusterSums(prototypes, tiling.pitch, a.unit_length, a.require_agreement),
                              RunningSums(at.cluster_sum), Buffer<float>(a.C * tiling.pitch)};
      },
      [&](ForwardScratch& scratch, int64_t chunk, double* partial) {
        PrototypeTile& tile = scratch.tile;
        int64_t seen_label = -1, seen_region = -1;
        for (int64_t t = tiling.first_tile(chunk); t < tiling.last_tile(chunk); ++t) {
          const Span span = tiling.span(t);
          tile.read_embeddings(a.z, span, tiling.next(t), panels);
          seen_label = maximum(seen_label, load_labels(a.labels, span, tile.label));
          if (labelled) {
            seen_region = maximum(seen_region, load_labels(a.regions, span, tile.region));
            load_weights(a.weight, span, tile.weight);
          }
          for (int64_t v = 0; v < span.padded; v += WIDTH) {
            class_maxima(shape, tile, v, a.normalize ? nullptr : prototypes.length.data);
            const Winner nearest = best_of_all(shape, tile, v);
            const InfoNCEVoxels x = info_nce_voxels(shape, common.info_nce, tile, nearest, v);
            scratch.sums.add(at.info_nce_voxels, x.kept ? broadcast(1.f) : vfloat{});
            scratch.sums.add(at.info_nce, x.kept ? x.loss : vfloat{});
            if (labelled) {
              const vint label = load(tile.label + v);
              float* exponentials = scratch.exponentials + v;
              class_exponentials(shape, common, true, tile, exponentials, v);
              add_class_statistics(shape, HardTarget{label}, tile.best + v, exponentials, tile.pitch, nearest.cosine,
                                   common.inverse_class_temperature, a.squared, label >= 0, load(tile.region + v),
                                   at.regions, at.ce, scratch.sums);
              scratch.clusters.assign(shape, tile, nearest, v);
            }
            scratch.sums.next_vector();
          }
          if (labelled) scratch.clusters.add(tile, span);
          if (a.similarity.present) store_tile(a.similarity, span, tile.best, tile.pitch, false);
          if (a.index.present) store_integers(a.index, span, tile.winner, tile.pitch);
        }
        scratch.sums.finish(partial);
        if (labelled) scratch.clusters.finish(partial + at.cluster_sum, partial + at.cluster_count);
#pragma omp critical(semiseg_highest)
        {
          highest_label = maximum(highest_label, seen_label);
          highest_region = maximum(highest_region, seen_region);
        }
      });

  a.highest_label = highest_label;
  a.highest_region = highest_region;
  write_results(at, total, a);
}

struct BackwardScratch {
  PrototypeTile tile;
  Buffer<float> by_class;         // [C, pitch]
  Buffer<float> grad_similarity;  // [C, pitch]
};

template <class Shape>
void backward(const Shape& shape, const PrototypeHeadBackward& a) {
  const Common common(a);
  const Prototypes prototypes(a.prototypes, a.C, a.K, a.z.channels);
  const Panels panels = prototypes.for_cosines(), gradient_panels = prototypes.for_gradient();
  const int64_t regions = a.labels.present ? a.num_regions : 0, count = a.C * a.K, d = a.z.channels;
  const bool labelled = a.labels.present && (a.grad_ce != nullptr || a.grad_dice != nullptr);
  const double kept = a.statistics[regions * statistics_per_region(a.C)];
  const bool have_info_nce = a.grad_info_nce != nullptr && kept != 0;
  const float info_nce_scale = have_info_nce ? float(*a.grad_info_nce / kept) : 0;
  const ClassGradient by_statistics(a.statistics, regions, a.C, a.squared, 0, a.grad_ce, a.grad_dice);
  const bool streaming = streams(a.grad_z);
  const Tiling tiling(a.z.batch, a.z.voxels, d + 2 * count, 0);

  for_chunks<BackwardScratch>(
      tiling, a.threads, nullptr, 0,
      [&] {
        return BackwardScratch{PrototypeTile(prototypes, tiling.pitch), Buffer<float>(a.C * tiling.pitch),
                               Buffer<float>(a.C * tiling.pitch)};
      },
      [&](BackwardScratch& scratch, int64_t chunk, double*) {
        PrototypeTile& tile = scratch.tile;
        const int64_t pitch = tile.pitch;
        for (int64_t t = tiling.first_tile(chunk); t < tiling.last_tile(chunk); ++t) {
          const Span span = tiling.span(t);
          tile.read_embeddings(a.z, span, tiling.next(t), panels);
          load_labels(a.labels, span, tile.label);
          if (labelled) load_labels(a.regions, span, tile.region);
          if (a.grad_similarity.present) load_tile(a.grad_similarity, span, scratch.grad_similarity, pitch);
          for (int64_t v = 0; v < span.padded; v += WIDTH) {
            class_maxima(shape, tile, v, a.normalize ? nullptr : prototypes.length.data);
            InfoNCEVoxels x{};
            if (have_info_nce) {
              const Winner nearest = best_of_all(shape, tile, v);
              x = info_nce_voxels(shape, common.info_nce, tile, nearest, v);
            }
            if (labelled) {
              const vint label = load(tile.label + v);
              class_exponentials(shape, common, have_info_nce, tile, scratch.by_class + v, v);
              class_gradient(shape, by_statistics, HardTarget{label}, scratch.by_class + v, pitch,
                             common.inverse_class_temperature, label >= 0, load(tile.region + v));
            }
            if (have_info_nce) {
              info_nce_gradient(shape, common.info_nce, tile, x, broadcast(info_nce_scale), v);
            } else {
              for (int64_t i = 0; i < count; ++i) store(tile.exponential + i * pitch + v, vfloat{});
            }
            const auto by_class = [&](int64_t c) {
              const vfloat of_losses = labelled ? load(scratch.by_class + c * pitch + v) : vfloat{};
              return of_losses + load(scratch.grad_similarity + c * pitch + v);
            };
            gradient_coefficients(shape, !a.normalize, prototypes, tile, by_class, v);
          }
          write_gradient(gradient_panels, tile, a.grad_z, span, streaming);
        }
      });
}

}  // namespace

void prototype_head_forward(PrototypeHeadForward& a) {
  with_shape(a.C, a.K, [&](const auto& shape) { forward(shape, a); });
}

void prototype_head_backward(const PrototypeHeadBackward& a) {
  with_shape(a.C, a.K, [&](const auto& shape) { backward(shape, a); });
}

}  // namespace semiseg::SEMISEG_LEVEL
