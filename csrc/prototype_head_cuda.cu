// Everything the prototypes do in a training step, in one read of the embeddings each way.
//
//   similarity[c] = max_k unit(z) . unit(p[c, k])
//   ce, dice      of softmax_c(similarity[c] / class_temperature) against the labels, per region
//   info_nce      = mean of logsumexp_ck(logit / temperature) - logit[positive] / temperature
//   cluster sums  of the embeddings, each voxel in the nearest cluster of its label's class
#include "class_losses.cuh"
#include "cluster_sums.cuh"
#include "kernels.cuh"

namespace semiseg::cuda {

namespace {

InfoNCE parameters(const PrototypeHead& a) { return {Temperature(a.temperature), a.normalize, a.ignore_prototype}; }

int64_t labelled_regions(const PrototypeHead& a) { return a.labels.present ? a.num_regions : 0; }

// The sums over voxels: classes, InfoNCE, InfoNCE's voxels.
__host__ __device__ int64_t loss_sums(int64_t regions, int64_t C) { return region_sums(regions, C) + 2; }

// InfoNCE and its voxels, those of a few tiles in float32.
template <class Tile>
struct ContrastSums {
  ColumnSums columns;
  float loss = 0, count = 0;
  LogarithmSum<Tile::COUNT> logarithms;

  __host__ __device__ __forceinline__ explicit ContrastSums(Arena& shared) : columns(shared, 2) {}

  __device__ __forceinline__ void add(const Contrast& voxel) {
    loss += voxel.below_top + logarithms.add(voxel.sum);
    count += 1;
  }

  __device__ __forceinline__ void widen() {
    columns.add(0, loss + logarithms.rest());
    columns.add(1, count);
    loss = count = 0;
    logarithms = {};
  }

  __device__ void finish(const Partials& partials, int64_t first) {
    widen();
    columns.finish(partials, first);
  }
};

template <class Tile>
struct ForwardMemory {
  Tile tile;
  RegionStatistics<Tile> statistics;
  ContrastSums<Tile> info_nce;
  ClusterSums<Tile> clusters;

  __host__ __device__ __forceinline__ ForwardMemory(Arena& shared, const Prototypes& prototypes, const Voxels& z,
                                                    int regions, bool squared)
      : tile(shared, prototypes, z), statistics(shared, tile, regions, squared), info_nce(shared), clusters(shared) {}
};

template <class Tile>
__global__ void __launch_bounds__(THREADS, Tile::SUMS_BLOCKS)
    forward(PrototypeHeadForward a, Prototypes prototypes, Tiling tiling, InfoNCE info_nce,
            Temperature class_temperature, Partials losses, Assignments assignments, Partials clusters) {
  const bool labelled = a.labels.present, with_similarity = a.similarity.present;
  const int num_regions = labelled ? int(a.num_regions) : 0;
  Arena shared{dynamic_shared<char>()};
  ForwardMemory<Tile> memory(shared, prototypes, a.z, num_regions, a.squared);
  Tile& tile = memory.tile;
  tile.start(prototypes);
  memory.statistics.start(losses, 0);
  memory.info_nce.columns.start();
  memory.clusters.start();
  RecentTiles<Tile::SLOTS> recent;
  TileWalk walk(tiling, blockIdx.x, gridDim.x);
  tile.fetch(a.z, walk);
  for (; walk.there(); walk.next()) {
    const Span span = walk.span();
    const auto labels = load_map(tile, a.labels, span), regions = load_map(tile, a.regions, span),
               weights = load_map(tile, a.weight, span);
    tile.read(a.z, span);
    tile.fetch(a.z, walk.after());
    if (labelled) memory.clusters.start_tile(tile);
    tile.for_voxels(span, [&](const auto& x) {
      const int own_label = labels.label(x.slot, tile.C);
      const Nearest nearest = find_nearest(tile, x, own_label, [&](int c, const Winner& best) {
        if (with_similarity) tile.set_best(a.similarity, a.index, span, x, c, best.cosine, best.flat - c * tile.K);
      });
      const Winner positive = a.positive_of_label ? nearest.of_label : nearest.of_all;
      const Contrast voxel = contrast(tile, x, info_nce, nearest.of_all, positive);
      if (x.lane == 0 && own_label >= 0 && positive.flat != info_nce.ignore_prototype) memory.info_nce.add(voxel);
      if (labelled) {
        memory.clusters.add(assignments, a.z, span, x,
                            assign(nearest, x, own_label, weights.weight(x.slot), a.unit_length, a.require_agreement));
        const auto similarity = [&](int c) { return best_of_class(tile, x, c).cosine; };
        const ClassSoftmax softmax =
            class_softmax(tile, x, similarity, nearest.of_all.cosine, class_temperature);
        memory.statistics.add(tile, x, softmax, similarity, HardTarget{own_label},
                           own_label < 0 ? -1 : regions.label(x.slot, int(a.num_regions)));
      }
    });
    const bool enough = recent.are_enough();
    if (enough) memory.info_nce.widen();
    if (with_similarity) tile.store_best(a.similarity, a.index, span);
    if (labelled) {
      memory.statistics.finish_tile(enough, [&](int v) { return hard_target(a.labels, span, v, tile.C); });
      memory.clusters.finish_tile(enough);
    }
  }
  memory.info_nce.finish(losses, region_sums(num_regions, tile.C));
  if (!labelled) return;
  memory.statistics.finish(losses, 0);
  memory.clusters.finish(clusters);
}

__global__ void __launch_bounds__(THREADS) finish(
    PrototypeHeadForward a,
    const double* total,          // [loss_sums]
    const double* cluster_total,  // [cluster_sums], null without labels
    int64_t regions) {
  if (cluster_total != nullptr) write_clusters(cluster_total, a.C * a.K, a.z.channels, a.cluster_sum, a.cluster_count);
  if (blockIdx.x != 0) return;
  const int64_t statistics = regions * statistics_per_region(a.C), of_info_nce = region_sums(regions, a.C);
  for (int64_t i = threadIdx.x; i < statistics; i += THREADS) a.statistics[i] = total[i];
  class_losses(total, regions, a.C, 0, a.ce, a.dice);
  if (threadIdx.x != 0) return;
  const double kept = total[of_info_nce + 1];
  a.statistics[statistics] = kept;
  *a.info_nce = kept == 0 ? 0.f : float(total[of_info_nce] / kept);
}

template <class Tile>
__global__ void __launch_bounds__(THREADS, Tile::BACKWARD_BLOCKS)
    backward(PrototypeHeadBackward a, Prototypes prototypes, Tiling tiling, InfoNCE info_nce,
             Temperature class_temperature, ClassGradient class_gradient) {
  const bool by_losses = a.labels.present && (a.grad_ce != nullptr || a.grad_dice != nullptr);
  const double kept = a.statistics[a.labels.present ? a.num_regions * statistics_per_region(a.C) : 0];
  const bool by_info_nce = a.grad_info_nce != nullptr && kept != 0;
  const float info_nce_scale = by_info_nce ? float(*a.grad_info_nce / kept) : 0.f;
  Arena shared{dynamic_shared<char>()};
  Tile tile(shared, prototypes, a.z);
  tile.start(prototypes);
  TileWalk walk(tiling, blockIdx.x, gridDim.x);
  tile.fetch(a.z, walk);
  for (; walk.there(); walk.next()) {
    const Span span = walk.span();
    const auto labels = load_map(tile, a.labels, span), regions = load_map(tile, a.regions, span);
    const typename Tile::ClassValues upstream(tile, a.grad_similarity, span);
    tile.read(a.z, span);
    tile.fetch(a.z, walk.after());
    tile.for_voxels(span, [&](const auto& x) {
      const int own_label = labels.label(x.slot, tile.C);
      const Nearest nearest = find_nearest(tile, x, own_label);
      const Winner positive = a.positive_of_label ? nearest.of_label : nearest.of_all;
      const auto write_coefficients = [&](const auto& by_class) {
        if (by_info_nce) {
          const bool contrasted = own_label >= 0 && positive.flat != info_nce.ignore_prototype;
          gradient_coefficients<true>(tile, x, info_nce, contrast(tile, x, info_nce, nearest.of_all, positive),
                                      contrasted ? info_nce_scale : 0.f, by_class);
        } else {
          gradient_coefficients<false>(tile, x, info_nce, Contrast{}, 0, by_class);
        }
      };
      if (!by_losses) {
        write_coefficients([&](int c) {
          return ClassDerivative{upstream(x, c), best_of_class(tile, x, c).flat - c * tile.K};
        });
        return;
      }
      const auto similarity = [&](int c) { return best_of_class(tile, x, c).cosine; };
      const ClassSoftmax softmax = class_softmax(tile, x, similarity, nearest.of_all.cosine, class_temperature);
      const HardTarget target{own_label};
      const VoxelClassGradient<HardTarget> by_class(tile, x, class_gradient, softmax, similarity, target,
                                                    own_label < 0 ? -1 : regions.label(x.slot, int(a.num_regions)));
      write_coefficients([&](int c) {
        const Winner best = best_of_class(tile, x, c);
        return ClassDerivative{upstream(x, c) + by_class.by_logit(c, best.cosine), best.flat - c * tile.K};
      });
    });
    tile.write_gradient(a.grad_z, span);
  }
}

}  // namespace

int64_t prototype_head_forward(const PrototypeHeadForward& a, const Device& device) {
  Arena workspace{static_cast<char*>(device.workspace)};
  const Prototypes prototypes(workspace, a.prototypes, a.C, a.K, a.z.channels);
  const int64_t regions = labelled_regions(a), losses = loss_sums(regions, a.C);
  const int64_t clusters = a.labels.present ? cluster_sums(prototypes.count(), prototypes.d) : 0;
  with_tile<HEAD_SLOTS>(prototypes, regions <= MOST_NARROW_REGIONS, [&](auto chosen) {
    using Tile = typename decltype(chosen)::type;
    const Tiling tiling(a.z, Tile::VOXELS);
    const int64_t shared = shared_bytes<ForwardMemory<Tile>>(prototypes, a.z, int(regions), a.squared);
    const int64_t sums = losses + (a.labels.present ? cluster_sums_of_tiles<Tile>(prototypes) : 0);
    const int blocks = blocks_with_sums(forward<Tile>, shared, tiling.tiles, sums, device);
    const Partials partials(workspace, sums, blocks);
    const ClusterWork<Tile> cluster_work(workspace, prototypes, a.z, a.labels.present, device);
    double* total = workspace.take<double>(losses + clusters);
    double* cluster_total = a.labels.present ? total + losses : nullptr;
    if (device.workspace == nullptr) return;
    launch_normalize<Tile>(prototypes, device);
    launch(forward<Tile>, dim3(blocks), dim3(THREADS), shared, device.stream, a, prototypes, tiling, parameters(a),
           Temperature(a.class_temperature), partials, cluster_work.assignments, partials.from(losses));
    launch_add_partials(partials, total, device);
    cluster_work.add(prototypes, a.z, a.weight, cluster_total, device);
    launch(finish, dim3(a.labels.present ? blocks_without_sums(prototypes.count(), device) : 1), dim3(THREADS), 0,
           device.stream, a, total, cluster_total, regions);
  });
  return workspace.bytes;
}

int64_t prototype_head_backward(const PrototypeHeadBackward& a, const Device& device) {
  Arena workspace{static_cast<char*>(device.workspace)};
  const Prototypes prototypes(workspace, a.prototypes, a.C, a.K, a.z.channels);
  const ClassGradient class_gradient(workspace, labelled_regions(a), a.C, a.squared, 0);
  if (device.workspace == nullptr) return workspace.bytes;
  if (class_gradient.regions > 0)
    launch_class_gradient(class_gradient, a.statistics, a.grad_ce, a.grad_dice, device);
  with_tile<BACKWARD_SLOTS>(prototypes, true, [&](auto chosen) {
    using Tile = typename decltype(chosen)::type;
    launch_normalize<Tile>(prototypes, device);
    launch_over_tiles<Tile>(backward<Tile>, a, prototypes, device, parameters(a), Temperature(a.class_temperature),
                            class_gradient);
  });
  return workspace.bytes;
}

}  // namespace semiseg::cuda
