// sum[c, k] = sum_v w z, count[c, k] = sum_v w over the voxels of label c whose nearest prototype of class c is k.
#include "cluster_sums.h"
#include "kernels.h"

namespace semiseg::SEMISEG_LEVEL {

namespace {

struct Scratch {
  PrototypeTile tile;
  ClusterSums clusters;
};

template <class Shape>
void forward(const Shape& shape, ClusterMean& a) {
  const Prototypes prototypes(a.prototypes, a.C, a.K, a.z.channels);
  const Panels panels = prototypes.for_cosines();
  const int64_t count = prototypes.count, d = a.z.channels, partial_sums = count * (d + 1);
  const Tiling tiling(a.z.batch, a.z.voxels, d + count, partial_sums);
  Buffer<double> total(partial_sums);
  int64_t highest_label = -1;
  for_chunks<Scratch>(
      tiling, a.threads, total, partial_sums,
      [&] {
        return Scratch{PrototypeTile(prototypes, tiling.pitch),
                       ClusterSums(prototypes, tiling.pitch, a.unit_length, a.require_agreement)};
      },
      [&](Scratch& scratch, int64_t chunk, double* partial) {
        PrototypeTile& tile = scratch.tile;
        int64_t seen_label = -1;
        for (int64_t t = tiling.first_tile(chunk); t < tiling.last_tile(chunk); ++t) {
          const Span span = tiling.span(t);
          tile.read_embeddings(a.z, span, tiling.next(t), panels);
          seen_label = maximum(seen_label, load_labels(a.labels, span, tile.label));
          load_weights(a.weight, span, tile.weight);
          for (int64_t v = 0; v < span.padded; v += WIDTH) {
            class_maxima(shape, tile, v);
            scratch.clusters.assign(shape, tile, best_of_all(shape, tile, v), v);
          }
          scratch.clusters.add(tile, span);
        }
        scratch.clusters.finish(partial, partial + count * d);
#pragma omp critical(semiseg_highest)
        highest_label = maximum(highest_label, seen_label);
      });
  a.highest_label = highest_label;
  for (int64_t i = 0; i < count * d; ++i) a.cluster_sum[i] = float(total[i]);
  for (int64_t i = 0; i < count; ++i) a.cluster_count[i] = total[count * d + i];
}

}  // namespace

void cluster_mean_forward(ClusterMean& a) {
  with_shape(a.C, a.K, [&](const auto& shape) { forward(shape, a); });
}

}  // namespace semiseg::SEMISEG_LEVEL
