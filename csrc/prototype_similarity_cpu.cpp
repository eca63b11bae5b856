// similarity[c] = max_k unit(z) . unit(p[c, k]), index[c] the first k that attains it.
// d similarity[c] / dz = (unit(p) - similarity[c] unit(z)) / |z| at the winning p.
#include "kernels.h"
#include "prototypes.h"

namespace semiseg::SEMISEG_LEVEL {

namespace {

template <class Shape>
void forward(const Shape& shape, const PrototypeSimilarity& a) {
  const Prototypes prototypes(a.prototypes, a.C, a.K, a.z.channels);
  const Panels panels = prototypes.for_cosines();
  const Tiling tiling(a.z.batch, a.z.voxels, a.z.channels + prototypes.count, 0);
  for_chunks<PrototypeTile>(
      tiling, a.threads, nullptr, 0, [&] { return PrototypeTile(prototypes, tiling.pitch); },
      [&](PrototypeTile& tile, int64_t chunk, double*) {
        for (int64_t t = tiling.first_tile(chunk); t < tiling.last_tile(chunk); ++t) {
          const Span span = tiling.span(t);
          tile.read_embeddings(a.z, span, tiling.next(t), panels);
          for (int64_t v = 0; v < span.padded; v += WIDTH) {
            class_maxima(shape, tile, v);
          }
          store_tile(a.similarity, span, tile.best, tile.pitch, false);
          store_integers(a.index, span, tile.winner, tile.pitch);
        }
      });
}

struct BackwardScratch {
  PrototypeTile tile;
  Buffer<float> grad_similarity;  // [C, pitch]
};

template <class Shape>
void backward(const Shape& shape, const PrototypeSimilarity& a) {
  const Prototypes prototypes(a.prototypes, a.C, a.K, a.z.channels);
  const Panels panels = prototypes.for_cosines(), gradient_panels = prototypes.for_gradient();
  const bool streaming = streams(a.grad_z);
  const int64_t count = prototypes.count;
  const Tiling tiling(a.z.batch, a.z.voxels, a.z.channels + 2 * count, 0);
  for_chunks<BackwardScratch>(
      tiling, a.threads, nullptr, 0,
      [&] { return BackwardScratch{PrototypeTile(prototypes, tiling.pitch), Buffer<float>(a.C * tiling.pitch)}; },
      [&](BackwardScratch& scratch, int64_t chunk, double*) {
        PrototypeTile& tile = scratch.tile;
        const int64_t pitch = tile.pitch;
        for (int64_t t = tiling.first_tile(chunk); t < tiling.last_tile(chunk); ++t) {
          const Span span = tiling.span(t);
          tile.read_embeddings(a.z, span, tiling.next(t), panels);
          load_tile(a.similarity, span, scratch.grad_similarity, pitch);
          for (int64_t v = 0; v < span.padded; v += WIDTH) {
            class_maxima(shape, tile, v);
            for (int64_t i = 0; i < count; ++i) store(tile.exponential + i * pitch + v, vfloat{});
          }
          load_integers(a.index, span, tile.winner, pitch);
          for (int64_t v = 0; v < span.padded; v += WIDTH) {
            const auto by_class = [&](int64_t c) { return load(scratch.grad_similarity + c * pitch + v); };
            gradient_coefficients(shape, false, prototypes, tile, by_class, v);
          }
          write_gradient(gradient_panels, tile, a.grad_z, span, streaming);
        }
      });
}

}  // namespace

void prototype_similarity_forward(const PrototypeSimilarity& a) {
  with_shape(a.C, a.K, [&](const auto& shape) { forward(shape, a); });
}

void prototype_similarity_backward(const PrototypeSimilarity& a) {
  with_shape(a.C, a.K, [&](const auto& shape) { backward(shape, a); });
}

}  // namespace semiseg::SEMISEG_LEVEL
