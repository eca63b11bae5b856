// Per cluster the weighted sum of the embeddings, and of the weights, of the voxels assigned to it: each voxel to the
// nearest prototype of its label's class. Partial sums: [C * K, d] of the embeddings, then [C * K] of the weights.
//
// A sum belongs to one warp or thread, which walks over the voxels: no atomics, and always the same order.
#pragma once

#include "prototype_losses.cuh"

namespace semiseg {

__host__ __device__ constexpr int64_t cluster_sums(int64_t clusters, int64_t d) { return clusters * (d + 1); }

struct Assignment {
  int cluster;   // -1 for none
  float factor;  // of the embedding in the sum
  float weight;
};

template <class Voxel>
__device__ __forceinline__ Assignment assign(const Nearest& nearest, const Voxel& x, int label, float weight,
                                             bool unit_length, bool require_agreement) {
  bool kept = label >= 0 && weight != 0;
  // The nearest of all has the label's class exactly where it is the nearest of that class.
  if (require_agreement && nearest.of_label.flat != nearest.of_all.flat) kept = false;
  return {kept ? nearest.of_label.flat : -1, unit_length ? weight * x.length.inverse : weight, kept ? weight : 0.f};
}

// Every voxel's assignment in memory, for wide tiles.
struct Assignments {
  int16_t* cluster;  // [B * N], -1 for none
  float* factor;     // [B * N]

  Assignments(Arena& workspace, int64_t voxels)
      : cluster(workspace.take<int16_t>(voxels)), factor(workspace.take<float>(voxels)) {}
};

// Of narrow tiles: every warp multiplies its voxels' shares in the clusters with their embeddings, both from shared memory
// of its own. A lane has two channels of every fourth group of four voxels, and takes sums of a few tiles in float32.
template <class Tile>
struct NarrowClusterSums {
  static constexpr int D = Tile::D, COUNT = Tile::COUNT, SLOTS = Tile::SLOTS, VOXELS = WARP * SLOTS;
  static constexpr int PITCH = VOXELS + 4;  // lanes of neighbouring channels read from different banks
  static constexpr int LANES = D / 2, GROUPS = WARP / LANES;
  static_assert(VOXELS % (4 * GROUPS) == 0);

  // In shared memory, of each warp:
  float* z;        // [D, PITCH]
  float* share;    // [COUNT, PITCH]: a voxel's factor in its cluster, 0 in the others
  double* sums;    // [COUNT, D]
  double* counts;  // [COUNT]
  float recent[COUNT][2], recent_count[COUNT];

  __host__ __device__ __forceinline__ explicit NarrowClusterSums(Arena& shared)
      : z(shared.take<float>(WARPS * D * PITCH)), share(shared.take<float>(WARPS * COUNT * PITCH)),
        sums(shared.take<double>(WARPS * COUNT * D)), counts(shared.take<double>(WARPS * COUNT)) {}

  static __device__ __forceinline__ int lane() { return threadIdx.x % WARP; }
  static __device__ __forceinline__ int warp() { return threadIdx.x / WARP; }

  __device__ __forceinline__ void start() {
    z += warp() * D * PITCH;
    share += warp() * COUNT * PITCH;
    for (int i = threadIdx.x; i < WARPS * COUNT * D; i += THREADS) sums[i] = 0;
    for (int i = threadIdx.x; i < WARPS * COUNT; i += THREADS) counts[i] = 0;
    __syncthreads();
    clear();
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) recent[i][0] = recent[i][1] = recent_count[i] = 0;
  }

  // The tile's embeddings are needed once more when its voxels are assigned.
  __device__ __forceinline__ void start_tile(const Tile& tile) const {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < D; ++j) {
      using Slots = Vector<SLOTS * sizeof(float)>;
      Slots vector;
      memcpy(&vector, tile.z[j], sizeof vector);
      *reinterpret_cast<Slots*>(z + j * PITCH + lane() * SLOTS) = vector;
    }
  }

  template <class Voxel>
  __device__ __forceinline__ void add(const Assignments&, const Voxels&, const Span&, const Voxel& x,
                                      const Assignment& a) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const bool assigned = a.cluster == i;
      share[i * PITCH + lane() * SLOTS + x.slot] = assigned ? a.factor : 0.f;
      if (assigned) recent_count[i] += a.weight;
    }
    if (a.cluster >= 0) return;
    // Its share is 0 everywhere, but 0 times NaN is not.
#pragma unroll
    for (int j = 0; j < D; ++j) z[j * PITCH + lane() * SLOTS + x.slot] = 0;
  }

  __device__ __forceinline__ void finish_tile(bool enough) {
    __syncwarp();
    const int j = lane() % LANES;
#pragma unroll
    for (int v = lane() / LANES * 4; v < VOXELS; v += 4 * GROUPS) {
      const float4 low = *reinterpret_cast<const float4*>(z + j * PITCH + v);
      const float4 high = *reinterpret_cast<const float4*>(z + (j + LANES) * PITCH + v);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const float4 factor = *reinterpret_cast<const float4*>(share + i * PITCH + v);
        recent[i][0] = dot(factor, low, recent[i][0]);
        recent[i][1] = dot(factor, high, recent[i][1]);
      }
    }
    if (enough) widen();
  }

  static __device__ __forceinline__ float dot(const float4& a, const float4& b, float sum) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
  }

  __device__ __forceinline__ void widen() {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int cluster = warp() * COUNT + i;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = recent[i][half];
        for (int step = LANES; step < WARP; step *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
        if (lane() < LANES) sums[cluster * D + half * LANES + lane()] += sum;
      }
      const float count = warp_sum(recent_count[i]);
      if (lane() == 0) counts[cluster] += count;
    }
    clear();
  }

  __device__ void finish(const Partials& partials) {
    widen();
    __syncthreads();
    for (int i = threadIdx.x; i < COUNT * D; i += THREADS) partials.mine(i) = of_all_warps(sums + i, COUNT * D);
    for (int i = threadIdx.x; i < COUNT; i += THREADS)
      partials.mine(COUNT * D + i) = of_all_warps(counts + i, COUNT);
  }

  static __device__ __forceinline__ double of_all_warps(const double* of_first, int stride) {
    double sum = 0;
    for (int w = 0; w < WARPS; ++w) sum += of_first[w * stride];
    return sum;
  }
};

// Of wide tiles: the first kernel leaves the assignments in memory, and a second one reads the embeddings once more.
template <class Tile>
struct WideClusterAssignment {
  __host__ __device__ explicit WideClusterAssignment(Arena&) {}

  __device__ void start() const {}
  __device__ void start_tile(const Tile&) const {}

  template <class Voxel>
  __device__ __forceinline__ void add(const Assignments& assignments, const Voxels& z, const Span& span, const Voxel& x,
                                      const Assignment& a) const {
    if (x.lane != 0 || !x.inside) return;
    const int64_t voxel = span.image * z.voxels + span.first + x.offset;
    assignments.cluster[voxel] = int16_t(a.cluster);
    assignments.factor[voxel] = a.factor;
  }

  __device__ void finish_tile(bool) const {}
  __device__ void finish(const Partials&) const {}
};

template <class Tile>
using ClusterSums = std::conditional_t<Tile::LANES == 1, NarrowClusterSums<Tile>, WideClusterAssignment<Tile>>;

// Shared memory of the second kernel.
struct WideClusterSums {
  static constexpr int D = 16, OWNERS = THREADS / D, VOXELS = THREADS, PITCH = Rows<D, VOXELS>::PITCH;

  double* sums;   // [clusters, D], cluster c of channel j belongs to thread (c % OWNERS, j)
  double* counts;  // [clusters]
  float* z;        // [D, PITCH]
  int* cluster;    // [VOXELS]
  float *factor, *weight;  // [VOXELS]

  __host__ __device__ WideClusterSums(Arena& shared, int clusters)
      : sums(shared.take<double>(clusters * D)), counts(shared.take<double>(clusters)),
        z(shared.take<float>(D * PITCH)), cluster(shared.take<int>(VOXELS)), factor(shared.take<float>(VOXELS)),
        weight(shared.take<float>(VOXELS)) {}
};

// A block for some of the tiles (x) and D of the channels (y).
static __global__ void __launch_bounds__(THREADS) sum_clusters(Voxels z, Voxels weight, Assignments assigned,
                                                               int clusters, Tiling tiling,
                                                               Partials partials) {
  using Sums = WideClusterSums;
  Arena shared{dynamic_shared<char>()};
  const Sums memory(shared, clusters);
  for (int i = threadIdx.x; i < clusters * Sums::D; i += THREADS) memory.sums[i] = 0;
  for (int i = threadIdx.x; i < clusters; i += THREADS) memory.counts[i] = 0;
  const int d = int(z.channels), first_channel = blockIdx.y * Sums::D;
  Rows<Sums::D, Sums::VOXELS> channels{z};
  const int j = threadIdx.x % Sums::D, owner = threadIdx.x / Sums::D;
  for (TileWalk walk(tiling, blockIdx.x, gridDim.x); walk.there(); walk.next()) {
    const Span span = walk.span();
    channels.load(span, first_channel);
    __syncthreads();
    channels.store(memory.z);
    if (int(threadIdx.x) < span.n) {
      const int64_t voxel = span.image * z.voxels + span.first + threadIdx.x;
      memory.cluster[threadIdx.x] = assigned.cluster[voxel];
      memory.factor[threadIdx.x] = assigned.factor[voxel];
      memory.weight[threadIdx.x] = load_weight(weight, span.image, span.first + threadIdx.x);
    }
    __syncthreads();
    for (int v = 0; v < span.n; ++v) {
      const int c = memory.cluster[v];
      if (c < 0 || c % Sums::OWNERS != owner) continue;
      memory.sums[c * Sums::D + j] += double(memory.factor[v] * memory.z[j * Sums::PITCH + v]);
      if (j == 0) memory.counts[c] += double(memory.weight[v]);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < clusters * Sums::D; i += THREADS) {
    const int c = i / Sums::D, channel = first_channel + i % Sums::D;
    if (channel < d) partials.mine(int64_t(c) * d + channel) = memory.sums[i];
  }
  if (blockIdx.y != 0) return;
  for (int c = threadIdx.x; c < clusters; c += THREADS)
    partials.mine(int64_t(clusters) * d + c) = memory.counts[c];
}

// The clusters' sums that a kernel over tiles itself leaves in its partials.
template <class Tile>
int64_t cluster_sums_of_tiles(const Prototypes& p) {
  return Tile::LANES == 1 ? cluster_sums(p.count(), p.d) : 0;
}

// What a kernel over wide tiles leaves, and the second kernel, which sums it.
template <class Tile>
struct ClusterWork {
  bool needed;
  Assignments assignments;
  Partials partials;

  ClusterWork(Arena& workspace, const Prototypes& p, const Voxels& z, bool labelled, const Device& device)
      : needed(labelled && Tile::LANES > 1), assignments(workspace, needed ? z.batch * z.voxels : 0),
        partials(workspace, needed ? cluster_sums(p.count(), p.d) : 0, needed ? blocks(p, z, device) : 0) {}

  static int blocks(const Prototypes& p, const Voxels& z, const Device& device) {
    return blocks_with_sums(sum_clusters, shared_bytes<WideClusterSums>(p.count()),
                            Tiling(z, WideClusterSums::VOXELS).tiles, cluster_sums(p.count(), p.d), device);
  }

  void add(const Prototypes& p, const Voxels& z, const Voxels& weight, double* total, const Device& device) const {
    if (!needed) return;
    const Tiling tiling(z, WideClusterSums::VOXELS);
    const int chunks = ceil_div(p.d, WideClusterSums::D);
    launch(sum_clusters, dim3(partials.blocks, chunks), dim3(THREADS), shared_bytes<WideClusterSums>(p.count()),
           device.stream, z, weight, assignments, p.count(), tiling, partials);
    launch_add_partials(partials, total, device);
  }
};

// All blocks together: a thread for every sum.
__device__ inline void write_clusters(
    const double* total,  // [cluster_sums]
    int64_t clusters, int64_t d,
    float* cluster_sum,    // [clusters, d]
    double* cluster_count  // [clusters]
) {
  for_grid(cluster_sums(clusters, d), [&](int64_t i) {
    if (i < clusters * d) cluster_sum[i] = float(total[i]);
    else cluster_count[i - clusters * d] = total[i];
  });
}

}  // namespace semiseg
