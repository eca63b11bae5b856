// Per cluster the weighted sum of the embeddings, and of the weights, of the voxels assigned to it: each voxel to the
// nearest prototype of its label's class. Partial sums: [C * K, d] of the embeddings, then [C * K] of the weights.
//
// A sum belongs to one thread, which walks over the voxels: no atomics, and always the same order.
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

// Of narrow tiles: the embeddings go through shared memory to the thread of their channel and slice of voxels.
template <class Tile>
struct NarrowClusterSums {
  static constexpr int D = Tile::D, SLICES = THREADS / D, SLICE = Tile::VOXELS / SLICES;
  static constexpr int PITCH = Tile::VOXELS + 4;  // threads of neighbouring channels read from different banks
  static_assert(Tile::COUNT <= D && SLICE % 4 == 0);

  float* z;        // shared, [D, PITCH]
  int* cluster;    // shared, [VOXELS]
  float* factor;   // shared, [VOXELS]
  float* weight;   // shared, [VOXELS]
  double* sums;    // shared, [SLICES, COUNT, D]
  double* counts;  // shared, [SLICES, D], of the cluster of each thread's channel number

  __host__ __device__ __forceinline__ explicit NarrowClusterSums(Arena& shared)
      : z(shared.take<float>(D * PITCH)), cluster(shared.take<int>(Tile::VOXELS)),
        factor(shared.take<float>(Tile::VOXELS)), weight(shared.take<float>(Tile::VOXELS)),
        sums(shared.take<double>(SLICES * Tile::COUNT * D)), counts(shared.take<double>(THREADS)) {}

  __device__ __forceinline__ void start() const {
    for (int i = threadIdx.x; i < SLICES * Tile::COUNT * D; i += THREADS) sums[i] = 0;
    counts[threadIdx.x] = 0;
  }

  // The tile's embeddings are needed once more when its voxels are assigned.
  __device__ __forceinline__ void start_tile(const Tile& tile) const {
#pragma unroll
    for (int j = 0; j < D; ++j) {
      float* row = z + j * PITCH;
      if (tile.mine.adjacent) {
        using Slots = Vector<Tile::SLOTS * sizeof(float)>;
        Slots vector;
        memcpy(&vector, tile.z[j], sizeof vector);
        *reinterpret_cast<Slots*>(row + tile.offset(0)) = vector;
      } else {
#pragma unroll
        for (int slot = 0; slot < Tile::SLOTS; ++slot) row[tile.offset(slot)] = tile.z[j][slot];
      }
    }
  }

  template <class Voxel>
  __device__ __forceinline__ void add(const Assignments&, const Voxels&, const Span&, const Voxel& x,
                                      const Assignment& a) const {
    cluster[x.offset] = a.cluster;
    factor[x.offset] = a.factor;
    weight[x.offset] = a.weight;
  }

  __device__ __forceinline__ void finish_tile() const {
    __syncthreads();
    const int j = threadIdx.x % D, slice = threadIdx.x / D;
    double* mine = sums + slice * Tile::COUNT * D + j;
    float count = 0;
    for (int first = slice * SLICE; first < (slice + 1) * SLICE; first += 4) {
      const float4 values = *reinterpret_cast<const float4*>(z + j * PITCH + first);
      const float x[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = cluster[first + i];
        if (c >= 0) mine[c * D] += double(factor[first + i] * x[i]);
        if (c == j) count += weight[first + i];
      }
    }
    counts[threadIdx.x] += count;
    __syncthreads();
  }

  __device__ void finish(const Partials& partials) const {
    __syncthreads();
    for (int i = threadIdx.x; i < Tile::COUNT * D; i += THREADS) {
      double sum = 0;
      for (int slice = 0; slice < SLICES; ++slice) sum += sums[slice * Tile::COUNT * D + i];
      partials.mine(i) = sum;
    }
    for (int i = threadIdx.x; i < Tile::COUNT; i += THREADS) {
      double sum = 0;
      for (int slice = 0; slice < SLICES; ++slice) sum += counts[slice * D + i];
      partials.mine(Tile::COUNT * D + i) = sum;
    }
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

  __device__ void finish_tile() const {}
  __device__ void finish(const Partials&) const {}
};

template <class Tile>
using ClusterSums = std::conditional_t<Tile::LANES == 1, NarrowClusterSums<Tile>, WideClusterAssignment<Tile>>;

// Shared memory of the second kernel.
struct WideClusterSums {
  static constexpr int D = 16, OWNERS = THREADS / D, VOXELS = THREADS, PITCH = VOXELS + 1;

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
  const int j = threadIdx.x % Sums::D, owner = threadIdx.x / Sums::D;
  const bool planar = z.voxel_stride == 1;
  for (int64_t t = blockIdx.x; t < tiling.tiles; t += gridDim.x) {
    const Span span = tiling.span(t);
    __syncthreads();
    if (int(threadIdx.x) < span.n) {
      const int64_t voxel = span.image * z.voxels + span.first + threadIdx.x;
      memory.cluster[threadIdx.x] = assigned.cluster[voxel];
      memory.factor[threadIdx.x] = assigned.factor[voxel];
      memory.weight[threadIdx.x] = load_weight(weight, span.image, span.first + threadIdx.x);
    }
    for (int e = threadIdx.x; e < Sums::D * Sums::VOXELS; e += THREADS) {
      const int v = planar ? e % Sums::VOXELS : e / Sums::D, k = planar ? e / Sums::VOXELS : e % Sums::D;
      const bool there = v < span.n && first_channel + k < d;
      memory.z[k * Sums::PITCH + v] = there ? load_float(z, span.image, first_channel + k, span.first + v) : 0.f;
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

// What a kernel over tiles needs besides shared memory to sum the clusters, and what follows it.
template <class Tile>
struct ClusterWork {
  static constexpr bool narrow = Tile::LANES == 1;
  Assignments assignments;
  Partials partials;

  ClusterWork(Arena& workspace, const Prototypes& p, const Voxels& z, int blocks, const Device& device)
      : assignments(workspace, narrow ? 0 : z.batch * z.voxels),
        partials(workspace, cluster_sums(p.count(), p.d), narrow ? blocks : blocks_of_second_kernel(p, z, device)) {}

  static int blocks_of_second_kernel(const Prototypes& p, const Voxels& z, const Device& device) {
    return blocks_with_sums(sum_clusters, shared_bytes<WideClusterSums>(p.count()),
                            Tiling(z, WideClusterSums::VOXELS).tiles, cluster_sums(p.count(), p.d), device);
  }

  void finish(const Prototypes& p, const Voxels& z, const Voxels& weight, double* total, const Device& device) const {
    if (!narrow) {
      const Tiling tiling(z, WideClusterSums::VOXELS);
      const int chunks = (p.d + WideClusterSums::D - 1) / WideClusterSums::D;
      launch(sum_clusters, dim3(partials.blocks, chunks), dim3(THREADS), shared_bytes<WideClusterSums>(p.count()),
             device.stream, z, weight, assignments, p.count(), tiling, partials);
    }
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
  for (int64_t i = blockIdx.x * int64_t(THREADS) + threadIdx.x; i < cluster_sums(clusters, d);
       i += gridDim.x * int64_t(THREADS)) {
    if (i < clusters * d) cluster_sum[i] = float(total[i]);
    else cluster_count[i - clusters * d] = total[i];
  }
}

}  // namespace semiseg
