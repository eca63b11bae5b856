// similarity[c] = max_k unit(z) . unit(p[c, k]), index[c] the first k that attains it.
// d similarity[c] / dz = (unit(p) - similarity[c] unit(z)) / |z| at the winning p.
#include "kernels.cuh"
#include "prototype_losses.cuh"

namespace semiseg::cuda {

namespace {

template <class Tile>
__global__ void __launch_bounds__(THREADS, Tile::FORWARD_BLOCKS)
    forward(PrototypeSimilarity a, Prototypes prototypes, Tiling tiling) {
  Arena shared{dynamic_shared<char>()};
  Tile tile(shared, prototypes, a.z);
  tile.start(prototypes);
  TileWalk walk(tiling, blockIdx.x, gridDim.x);
  tile.fetch(a.z, walk);
  for (; walk.there(); walk.next()) {
    const Span span = walk.span();
    tile.read(a.z, span);
    tile.fetch(a.z, walk.after());
    tile.for_voxels(span, [&](const auto& x) {
#pragma unroll
      for (int c = x.lane; c < tile.C; c += Tile::LANES) {
        const Winner best = best_of_class(tile, x, c);
        tile.set_best(a.similarity, a.index, span, x, c, best.cosine, best.flat - c * tile.K);
      }
    });
    tile.store_best(a.similarity, a.index, span);
  }
}

template <class Tile>
__global__ void __launch_bounds__(THREADS, Tile::BACKWARD_BLOCKS)
    backward(PrototypeSimilarity a, Prototypes prototypes, Tiling tiling) {
  Arena shared{dynamic_shared<char>()};
  Tile tile(shared, prototypes, a.z);
  tile.start(prototypes);
  const InfoNCE none{Temperature(1), true, -1};
  TileWalk walk(tiling, blockIdx.x, gridDim.x);
  tile.fetch(a.z, walk);
  for (; walk.there(); walk.next()) {
    const Span span = walk.span();
    const typename Tile::ClassValues upstream(tile, a.similarity, span);
    const typename Tile::ClassIndices winners(tile, a.index, span);
    tile.read(a.z, span);
    tile.fetch(a.z, walk.after());
    tile.for_voxels(span, [&](const auto& x) {
      gradient_coefficients<false>(tile, x, none, Contrast{}, 0,
                                   [&](int c) { return ClassDerivative{upstream(x, c), winners(x, c)}; });
    });
    tile.write_gradient(a.grad_z, span);
  }
}

}  // namespace

int64_t prototype_similarity_forward(const PrototypeSimilarity& a, const Device& device) {
  Arena workspace{static_cast<char*>(device.workspace)};
  const Prototypes prototypes(workspace, a.prototypes, a.C, a.K, a.z.channels);
  if (device.workspace == nullptr) return workspace.bytes;
  with_tile<FORWARD_SLOTS>(prototypes, true, [&](auto chosen) {
    using Tile = typename decltype(chosen)::type;
    launch_normalize<Tile>(prototypes, device);
    launch_over_tiles<Tile>(forward<Tile>, a, prototypes, device);
  });
  return workspace.bytes;
}

int64_t prototype_similarity_backward(const PrototypeSimilarity& a, const Device& device) {
  Arena workspace{static_cast<char*>(device.workspace)};
  const Prototypes prototypes(workspace, a.prototypes, a.C, a.K, a.z.channels);
  if (device.workspace == nullptr) return workspace.bytes;
  with_tile<BACKWARD_SLOTS>(prototypes, true, [&](auto chosen) {
    using Tile = typename decltype(chosen)::type;
    launch_normalize<Tile>(prototypes, device);
    launch_over_tiles<Tile>(backward<Tile>, a, prototypes, device);
  });
  return workspace.bytes;
}

}  // namespace semiseg::cuda
