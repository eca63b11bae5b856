// sum[c, k] = sum_v w z, count[c, k] = sum_v w over the voxels of label c whose nearest prototype of class c is k.
#include "cluster_sums.cuh"
#include "kernels.cuh"

namespace semiseg::cuda {

namespace {

template <class Tile>
struct Memory {
  Tile tile;
  ClusterSums<Tile> clusters;

  __host__ __device__ __forceinline__ Memory(Arena& shared, const Prototypes& prototypes, const Voxels& z)
      : tile(shared, prototypes, z), clusters(shared) {}
};

template <class Tile>
__global__ void __launch_bounds__(THREADS, Tile::SUMS_BLOCKS)
    forward(ClusterMean a, Prototypes prototypes, Tiling tiling, Assignments assignments, Partials partials) {
  Arena shared{dynamic_shared<char>()};
  Memory<Tile> memory(shared, prototypes, a.z);
  Tile& tile = memory.tile;
  tile.start(prototypes);
  memory.clusters.start();
  RecentTiles<Tile::SLOTS> recent;
  TileWalk walk(tiling, blockIdx.x, gridDim.x);
  tile.fetch(a.z, walk);
  for (; walk.there(); walk.next()) {
    const Span span = walk.span();
    const auto labels = load_map(tile, a.labels, span), weights = load_map(tile, a.weight, span);
    tile.read(a.z, span);
    tile.fetch(a.z, walk.after());
    memory.clusters.start_tile(tile);
    tile.for_voxels(span, [&](const auto& x) {
      const int label = labels.label(x.slot, tile.C);
      const Nearest nearest = find_nearest(tile, x, label);
      memory.clusters.add(assignments, a.z, span, x,
                          assign(nearest, x, label, weights.weight(x.slot), a.unit_length, a.require_agreement));
    });
    memory.clusters.finish_tile(recent.are_enough());
  }
  memory.clusters.finish(partials);
}

__global__ void __launch_bounds__(THREADS) finish(
    ClusterMean a,
    const double* total  // [cluster_sums]
) {
  write_clusters(total, a.C * a.K, a.z.channels, a.cluster_sum, a.cluster_count);
}

}  // namespace

int64_t cluster_mean_forward(const ClusterMean& a, const Device& device) {
  Arena workspace{static_cast<char*>(device.workspace)};
  const Prototypes prototypes(workspace, a.prototypes, a.C, a.K, a.z.channels);
  const int64_t sums = cluster_sums(prototypes.count(), prototypes.d);
  with_tile<CLUSTERS_SLOTS>(prototypes, true, [&](auto chosen) {
    using Tile = typename decltype(chosen)::type;
    const Tiling tiling(a.z, Tile::VOXELS);
    const int64_t shared = shared_bytes<Memory<Tile>>(prototypes, a.z);
    const int blocks = Tile::LANES == 1 ? blocks_with_sums(forward<Tile>, shared, tiling.tiles, sums, device)
                                        : blocks_without_sums(tiling.tiles, device);
    const Partials partials(workspace, cluster_sums_of_tiles<Tile>(prototypes), blocks);
    const ClusterWork<Tile> clusters(workspace, prototypes, a.z, true, device);
    double* total = workspace.take<double>(sums);
    if (device.workspace == nullptr) return;
    launch_normalize<Tile>(prototypes, device);
    launch(forward<Tile>, dim3(blocks), dim3(THREADS), shared, device.stream, a, prototypes, tiling,
           clusters.assignments, partials);
    launch_add_partials(partials, total, device);
    clusters.add(prototypes, a.z, a.weight, total, device);
    launch(finish, dim3(blocks_without_sums(prototypes.count(), device)), dim3(THREADS), 0, device.stream, a, total);
  });
  return workspace.bytes;
}

}  // namespace semiseg::cuda
