// Sums over voxels: float64 partial sums of every block, added in a fixed order by a second kernel.
#pragma once

#include "device_voxels.cuh"

namespace semiseg {

__device__ __forceinline__ double warp_sum(double x) {
  for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
  return x;
}

// Lane i's sum over the warp's lanes of x[i], for as many values as a warp has lanes: at every step each lane gives half
// of what it has left to a lane of the other half.
template <int LEFT>
__device__ __forceinline__ float warp_sums(const float (&x)[LEFT]) {
  if constexpr (LEFT == 1) {
    return x[0];
  } else {
    constexpr int half = LEFT / 2;
    const bool upper = threadIdx.x & half;
    float kept[half];
#pragma unroll
    for (int i = 0; i < half; ++i)
      kept[i] = (upper ? x[i + half] : x[i]) + __shfl_xor_sync(ALL_LANES, upper ? x[i] : x[i + half], half);
    return warp_sums(kept);
  }
}

// A voxel of one thread, and one that neighbouring threads share.
struct OneLane {
  static constexpr int lane = 0;
  __device__ __forceinline__ float sum(float x) const { return x; }
  __device__ __forceinline__ float max(float x) const { return x; }
};

template <int LANES>
struct SeveralLanes {
  int lane;
  template <class T>
  __device__ __forceinline__ T sum(T x) const {
    for (int step = 1; step < LANES; step *= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
  }
  __device__ __forceinline__ float max(float x) const {
    for (int step = 1; step < LANES; step *= 2) {
      const float other = __shfl_xor_sync(ALL_LANES, x, step);
      x = other > x ? other : x;
    }
    return x;
  }
};

// [count, blocks]: the partial sums of all blocks.
struct Partials {
  double* data;
  int64_t count;
  int blocks;

  Partials(Arena& workspace, int64_t count, int blocks)
      : data(workspace.take<double>(count * blocks)), count(count), blocks(blocks) {}

  // Those from the first on.
  Partials from(int64_t first) const {
    Partials rest = *this;
    rest.data += first * blocks;
    rest.count -= first;
    return rest;
  }

  __device__ __forceinline__ double& mine(int64_t i) const { return data[i * blocks + blockIdx.x]; }
};

// The tiles whose sums a thread takes in float32: 32 voxels.
template <int SLOTS>
struct RecentTiles {
  static constexpr int MOST_VOXELS = 32;
  int count = 0;

  __device__ __forceinline__ bool are_enough() {
    if (++count < MOST_VOXELS / SLOTS) return false;
    count = 0;
    return true;
  }
};

// A sum of logarithms of a few tiles' numbers from 1 to LARGEST, or to any where that is 0. Of their product: a logarithm
// costs as much as some thirty factors.
template <int LARGEST>
struct LogarithmSum {
  static constexpr bool ONE_PRODUCT = LARGEST > 0 && LARGEST <= 15;  // 15^MOST_VOXELS < 2^126
  float product = 1;

  // Returns what the product is relieved of, for another sum.
  __device__ __forceinline__ float add(float x) {
    product *= x;
    if (ONE_PRODUCT || product < 0x1p64f) return 0;
    const float part = logf(product);
    product = 1;
    return part;
  }
  __device__ __forceinline__ float rest() const { return logf(product); }
};

// Running sums of a block in shared memory, [count, THREADS]: a column for every thread, so that nobody waits.
struct ColumnSums {
  double* columns;
  int count;

  __host__ __device__ ColumnSums(Arena& shared, int count)
      : columns(shared.take<double>(count * THREADS)), count(count) {}

  __device__ void start() const {
    for (int i = 0; i < count; ++i) columns[i * THREADS + threadIdx.x] = 0;
  }
  __device__ __forceinline__ void add(int i, float x) const { columns[i * THREADS + threadIdx.x] += x; }

  // Writes the block's sums to its partials first, first + 1, ...
  __device__ void finish(const Partials& partials, int64_t first) const {
    __syncthreads();
    for (int i = threadIdx.x / WARP; i < count; i += WARPS) {
      double sum = 0;
      for (int t = threadIdx.x % WARP; t < THREADS; t += WARP) sum += columns[i * THREADS + t];
      sum = warp_sum(sum);
      if (threadIdx.x % WARP == 0) partials.mine(first + i) = sum;
    }
  }
};

// total[i] = sum of the blocks' partials, by `lanes` neighbouring threads each, a power of two up to a warp.
static __global__ void __launch_bounds__(THREADS) add_partials(
    Partials partials, int lanes,
    double* total  // [partials.count]
) {
  const int lane = int(threadIdx.x) % lanes;
  const int64_t sums_per_block = THREADS / lanes;
  for (int64_t first = blockIdx.x * sums_per_block; first < partials.count; first += gridDim.x * sums_per_block) {
    const int64_t i = first + threadIdx.x / lanes;
    double sum = 0;
    if (i < partials.count)
      for (int b = lane; b < partials.blocks; b += lanes) sum += partials.data[i * partials.blocks + b];
    for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
    if (lane == 0 && i < partials.count) total[i] = sum;
  }
}

inline void launch_add_partials(const Partials& partials, double* total, const Device& device) {
  if (partials.count == 0) return;
  constexpr int64_t most_blocks = 4096;
  int lanes = 1;
  while (lanes < WARP && lanes < partials.blocks) lanes *= 2;
  const int64_t blocks = ceil_div(partials.count * lanes, THREADS);
  launch(add_partials, dim3(unsigned(blocks < most_blocks ? blocks : most_blocks)), dim3(THREADS), 0, device.stream,
         partials, lanes, total);
}

// A map at a thread's voxels of a tile.
template <class Tile>
__device__ __forceinline__ MapValues<Tile::SLOTS> load_map(const Tile& tile, const Voxels& map, const Span& span) {
  return {map, span, [&](int slot) { return tile.offset(slot); }};
}

// Blocks of a kernel that walks over tiles, each as many as it can: all that the device runs at once.
template <class... Parameters>
int resident_blocks(void (*kernel)(Parameters...), int64_t shared_bytes, int64_t tiles, const Device& device) {
  allow_shared_bytes(kernel, shared_bytes);
  int resident = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, THREADS, size_t(shared_bytes)),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  const int64_t most = int64_t(resident) * multiprocessors(device), blocks = tiles < most ? tiles : most;
  return int(blocks > 0 ? blocks : 1);
}

// Blocks of one that leaves partial sums: fewer where these would take too much memory.
template <class... Parameters>
int blocks_with_sums(void (*kernel)(Parameters...), int64_t shared_bytes, int64_t tiles, int64_t sums,
                     const Device& device, int64_t partial_bytes = 4 << 20) {
  constexpr int64_t fewest = 4;
  const int64_t affordable = partial_bytes / (8 * (sums + 1));
  const int blocks = resident_blocks(kernel, shared_bytes, tiles, device);
  return blocks <= affordable ? blocks : int(affordable > fewest ? affordable : blocks < fewest ? blocks : fewest);
}

// Blocks of one whose tiles the device hands out, a few to each.
inline int blocks_without_sums(int64_t tiles, const Device& device) {
  const int64_t most = int64_t(64) * multiprocessors(device), blocks = tiles < most ? tiles : most;
  return int(blocks > 0 ? blocks : 1);
}

constexpr int64_t MOST_SHARED_BYTES = 99 * 1024;  // what a block can have on every GPU from compute capability 8.0 on

// Bytes of shared memory of a kernel whose arrays are laid out by Layout(arena, arguments...).
template <class Layout, class... Arguments>
int64_t shared_bytes(const Arguments&... arguments) {
  Arena shared{nullptr};
  Layout(shared, arguments...);
  if (shared.bytes > MOST_SHARED_BYTES)
    throw std::length_error("the kernel needs " + std::to_string(shared.bytes) + " bytes of shared memory, there are " +
                            std::to_string(MOST_SHARED_BYTES));
  return shared.bytes;
}

// A type as a value, to choose it at run time.
template <class Tile>
struct Type {
  using type = Tile;
};

}  // namespace semiseg
