// loss = sum_v w (logsumexp_ck(logit / temperature) - logit[positive] / temperature) / sum_v w over the kept voxels,
// logit = unit(z) . unit(p) or z . p; positive: the prototype nearest by cosine, of the label's class where labels are
// given.
#include "kernels.h"
#include "prototypes.h"

namespace semiseg::SEMISEG_LEVEL {

namespace {

InfoNCE parameters(const PrototypeInfoNCE& a) {
  return {1 / a.temperature, a.normalize, a.labels.present, a.ignore_prototype};
}

template <class Shape>
INLINE InfoNCEVoxels voxels(const Shape& shape, const InfoNCE& info_nce, const Prototypes& prototypes,
                            PrototypeTile& tile, int64_t v) {
  class_maxima(shape, tile, v, info_nce.normalize ? nullptr : prototypes.length.data);
  InfoNCEVoxels x = info_nce_voxels(shape, info_nce, tile, best_of_all(shape, tile, v), v);
  x.kept &= load(tile.weight + v) != 0;
  return x;
}

struct ForwardScratch {
  PrototypeTile tile;
  RunningSums sums;
};

template <class Shape>
void forward(const Shape& shape, PrototypeInfoNCE& a) {
  const InfoNCE info_nce = parameters(a);
  const Prototypes prototypes(a.prototypes, a.C, a.K, a.z.channels);
  const Panels panels = prototypes.for_cosines();
  const Tiling tiling(a.z.batch, a.z.voxels, a.z.channels + 2 * prototypes.count, 2);
  double total[2];
  int64_t highest_label = -1;
  for_chunks<ForwardScratch>(
      tiling, a.threads, total, 2,
      [&] { return ForwardScratch{PrototypeTile(prototypes, tiling.pitch), RunningSums(2)}; },
      [&](ForwardScratch& scratch, int64_t chunk, double* partial) {
        PrototypeTile& tile = scratch.tile;
        int64_t seen_label = -1;
        for (int64_t t = tiling.first_tile(chunk); t < tiling.last_tile(chunk); ++t) {
          const Span span = tiling.span(t);
          tile.read_embeddings(a.z, span, tiling.next(t), panels);
          seen_label = maximum(seen_label, load_labels(a.labels, span, tile.label));
          load_weights(a.weight, span, tile.weight);
          for (int64_t v = 0; v < span.padded; v += WIDTH) {
            const InfoNCEVoxels x = voxels(shape, info_nce, prototypes, tile, v);
            const vfloat weight = load(tile.weight + v);
            scratch.sums.add(0, x.kept ? x.loss * weight : vfloat{});
            scratch.sums.add(1, x.kept ? weight : vfloat{});
            scratch.sums.next_vector();
          }
        }
        scratch.sums.finish(partial);
#pragma omp critical(semiseg_highest)
        highest_label = maximum(highest_label, seen_label);
      });
  a.highest_label = highest_label;
  *a.denominator = total[1];
  *a.loss = total[1] == 0 ? 0 : float(total[0] / total[1]);
}

template <class Shape>
void backward(const Shape& shape, const PrototypeInfoNCE& a) {
  const InfoNCE info_nce = parameters(a);
  const Prototypes prototypes(a.prototypes, a.C, a.K, a.z.channels);
  const Panels panels = prototypes.for_cosines(), gradient_panels = prototypes.for_gradient();
  const bool streaming = streams(a.grad_z);
  const float scale = *a.denominator == 0 ? 0 : float(*a.loss / *a.denominator);
  const Tiling tiling(a.z.batch, a.z.voxels, a.z.channels + 2 * prototypes.count, 0);
  for_chunks<PrototypeTile>(
      tiling, a.threads, nullptr, 0, [&] { return PrototypeTile(prototypes, tiling.pitch); },
      [&](PrototypeTile& tile, int64_t chunk, double*) {
        for (int64_t t = tiling.first_tile(chunk); t < tiling.last_tile(chunk); ++t) {
          const Span span = tiling.span(t);
          tile.read_embeddings(a.z, span, tiling.next(t), panels);
          load_labels(a.labels, span, tile.label);
          load_weights(a.weight, span, tile.weight);
          for (int64_t v = 0; v < span.padded; v += WIDTH) {
            const InfoNCEVoxels x = voxels(shape, info_nce, prototypes, tile, v);
            info_nce_gradient(shape, info_nce, tile, x, load(tile.weight + v) * scale, v);
            gradient_coefficients(shape, !a.normalize, prototypes, tile, [](int64_t) { return vfloat{}; }, v);
          }
          write_gradient(gradient_panels, tile, a.grad_z, span, streaming);
        }
      });
}

}  // namespace

void prototype_info_nce_forward(PrototypeInfoNCE& a) {
  with_shape(a.C, a.K, [&](const auto& shape) { forward(shape, a); });
}

void prototype_info_nce_backward(const PrototypeInfoNCE& a) {
  with_shape(a.C, a.K, [&](const auto& shape) { backward(shape, a); });
}

}  // namespace semiseg::SEMISEG_LEVEL
