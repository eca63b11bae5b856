// loss = sum_v w (logsumexp_ck(logit / temperature) - logit[positive] / temperature) / sum_v w over the kept voxels,
// logit = unit(z) . unit(p) or z . p; positive: the prototype nearest by cosine, of the label's class where labels are
// given.
#include "kernels.cuh"
#include "prototype_losses.cuh"

namespace semiseg::cuda {

namespace {

InfoNCE parameters(const PrototypeInfoNCE& a) { return {Temperature(a.temperature), a.normalize, a.ignore_prototype}; }

struct WeightedContrast {
  Contrast contrast;
  float weight;  // 0 where the voxel is not kept
};

template <class Tile, class Voxel>
__device__ __forceinline__ WeightedContrast weighted_contrast(const Tile& tile, const Voxel& x, const InfoNCE& info_nce,
                                                              bool positive_of_label, int label, float weight) {
  const Nearest nearest = find_nearest(tile, x, label);
  const Winner positive = positive_of_label ? nearest.of_label : nearest.of_all;
  const bool kept = label >= 0 && positive.flat != info_nce.ignore_prototype;
  return {contrast(tile, x, info_nce, nearest.of_all, positive), kept ? weight : 0.f};
}

template <class Tile>
struct ForwardMemory {
  Tile tile;
  ColumnSums sums;  // of the weighted losses, of the weights

  __host__ __device__ __forceinline__ ForwardMemory(Arena& shared, const Prototypes& prototypes, const Voxels& z)
      : tile(shared, prototypes, z), sums(shared, 2) {}
};

template <class Tile>
__global__ void __launch_bounds__(THREADS, Tile::FORWARD_BLOCKS)
    forward(PrototypeInfoNCE a, Prototypes prototypes, Tiling tiling, InfoNCE info_nce, Partials partials) {
  Arena shared{dynamic_shared<char>()};
  ForwardMemory<Tile> memory(shared, prototypes, a.z);
  Tile& tile = memory.tile;
  tile.start(prototypes);
  memory.sums.start();
  TileWalk walk(tiling, blockIdx.x, gridDim.x);
  tile.fetch(a.z, walk);
  for (; walk.there(); walk.next()) {
    const Span span = walk.span();
    const auto labels = load_map(tile, a.labels, span), weights = load_map(tile, a.weight, span);
    tile.read(a.z, span);
    tile.fetch(a.z, walk.after());
    float loss_sum = 0, weight_sum = 0;
    tile.for_voxels(span, [&](const auto& x) {
      const WeightedContrast voxel =
          weighted_contrast(tile, x, info_nce, a.labels.present, labels.label(x.slot, tile.C), weights.weight(x.slot));
      if (voxel.weight != 0 && x.lane == 0) {
        loss_sum = fmaf(voxel.contrast.loss(), voxel.weight, loss_sum);
        weight_sum += voxel.weight;
      }
    });
    memory.sums.add(0, loss_sum);
    memory.sums.add(1, weight_sum);
  }
  memory.sums.finish(partials, 0);
}

__global__ void finish(
    PrototypeInfoNCE a,
    const double* total  // [2]
) {
  *a.denominator = total[1];
  *a.loss = total[1] == 0 ? 0.f : float(total[0] / total[1]);
}

template <class Tile>
__global__ void __launch_bounds__(THREADS, Tile::BACKWARD_BLOCKS)
    backward(PrototypeInfoNCE a, Prototypes prototypes, Tiling tiling, InfoNCE info_nce) {
  Arena shared{dynamic_shared<char>()};
  Tile tile(shared, prototypes, a.z);
  tile.start(prototypes);
  const float scale = *a.denominator == 0 ? 0.f : float(*a.loss / *a.denominator);
  TileWalk walk(tiling, blockIdx.x, gridDim.x);
  tile.fetch(a.z, walk);
  for (; walk.there(); walk.next()) {
    const Span span = walk.span();
    const auto labels = load_map(tile, a.labels, span), weights = load_map(tile, a.weight, span);
    tile.read(a.z, span);
    tile.fetch(a.z, walk.after());
    tile.for_voxels(span, [&](const auto& x) {
      const WeightedContrast voxel =
          weighted_contrast(tile, x, info_nce, a.labels.present, labels.label(x.slot, tile.C), weights.weight(x.slot));
      gradient_coefficients<true>(tile, x, info_nce, voxel.contrast, voxel.weight != 0 ? scale * voxel.weight : 0.f,
                                  [](int) { return ClassDerivative{0, 0}; });
    });
    tile.write_gradient(a.grad_z, span);
  }
}

}  // namespace

int64_t prototype_info_nce_forward(const PrototypeInfoNCE& a, const Device& device) {
  Arena workspace{static_cast<char*>(device.workspace)};
  const Prototypes prototypes(workspace, a.prototypes, a.C, a.K, a.z.channels);
  with_tile<FORWARD_SLOTS>(prototypes, true, [&](auto chosen) {
    using Tile = typename decltype(chosen)::type;
    const Tiling tiling(a.z, Tile::VOXELS);
    const int64_t shared = shared_bytes<ForwardMemory<Tile>>(prototypes, a.z);
    const int blocks = blocks_with_sums(forward<Tile>, shared, tiling.tiles, 2, device);
    const Partials partials(workspace, 2, blocks);
    double* total = workspace.take<double>(2);
    if (device.workspace == nullptr) return;
    launch_normalize<Tile>(prototypes, device);
    launch(forward<Tile>, dim3(blocks), dim3(THREADS), shared, device.stream, a, prototypes, tiling, parameters(a),
           partials);
    launch_add_partials(partials, total, device);
    launch(finish, dim3(1), dim3(1), 0, device.stream, a, total);
  });
  return workspace.bytes;
}

int64_t prototype_info_nce_backward(const PrototypeInfoNCE& a, const Device& device) {
  Arena workspace{static_cast<char*>(device.workspace)};
  const Prototypes prototypes(workspace, a.prototypes, a.C, a.K, a.z.channels);
  if (device.workspace == nullptr) return workspace.bytes;
  with_tile<BACKWARD_SLOTS>(prototypes, true, [&](auto chosen) {
    using Tile = typename decltype(chosen)::type;
    launch_normalize<Tile>(prototypes, device);
    launch_over_tiles<Tile>(backward<Tile>, a, prototypes, device, parameters(a));
  });
  return workspace.bytes;
}

}  // namespace semiseg::cuda
