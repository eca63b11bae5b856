// Cross-entropy and Dice of softmax_c(logit[c] / temperature), per region; see class_losses.cuh.
#include "class_losses.cuh"
#include "device_rows.cuh"
#include "kernels.cuh"

namespace semiseg::cuda {

namespace {

// Of an infinite x nothing counts where the probability is 0.
__device__ __forceinline__ float weighted(float probability, float x) {
  return probability == 0 ? 0.f : probability * x;
}

// A block's tile of voxels with few classes: a thread keeps its voxels in registers.
template <int CLASSES>
struct NarrowLogits {
  static constexpr int C = CLASSES, SLOTS = 4, LANES = 1, VOXELS = ThreadVoxels<SLOTS>::LENGTH;
  static constexpr int BACKWARD_BLOCKS = 4;

  struct Voxel : OneLane {
    int slot, offset;
    const float (&logit)[C][SLOTS];
    float (&gradient)[C][SLOTS];
    __device__ __forceinline__ float operator()(int c) const { return logit[c][slot]; }
    __device__ __forceinline__ void set_gradient(int c, float x) const { gradient[c][slot] = x; }
  };

  struct SoftTarget {
    static constexpr bool ONE_CLASS = false;
    const float (&probability)[C][SLOTS];
    int slot;
    __device__ __forceinline__ float operator()(int c) const { return probability[c][slot]; }
    __device__ __forceinline__ float times(int c, float x) const { return weighted((*this)(c), x); }
  };

  struct SoftTargets {
    float probability[C][SLOTS] = {};
    __device__ __forceinline__ SoftTargets(const NarrowLogits& tile, const Voxels& source, const Span& span) {
      load_voxels(source, span, tile.mine, probability);
    }
    __device__ __forceinline__ SoftTarget at(int slot, int) const { return {probability, slot}; }
  };

  ThreadVoxels<SLOTS> mine;
  float logit[C][SLOTS], gradient[C][SLOTS];

  __host__ __device__ __forceinline__ NarrowLogits(Arena&, const Voxels& logits)
      : mine{logits.aligned_rows} {}

  __device__ __forceinline__ int offset(int slot) const { return mine.offset(slot); }

  __device__ __forceinline__ void read(const Voxels& logits, const Span& span) {
    load_voxels(logits, span, mine, logit);
  }

  template <class Run>
  __device__ __forceinline__ void for_voxels(const Span&, const Run& run) {
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) run(Voxel{{}, slot, offset(slot), logit, gradient});
  }

  __device__ __forceinline__ void write_gradient(const Voxels& target, const Span& span) const {
    store_voxels(target, span, mine, gradient);
  }
};

// One with any number of classes, in shared memory: neighbouring threads share a voxel.
struct WideLogits {
  static constexpr int SLOTS = 1, LANES = 4, VOXELS = THREADS / LANES, PITCH = ChannelRows<VOXELS>::PITCH;
  static constexpr int BACKWARD_BLOCKS = 4;

  struct Voxel : SeveralLanes<LANES> {
    static constexpr int slot = 0;
    int offset;
    float* column;
    __device__ __forceinline__ float operator()(int c) const { return column[c * PITCH]; }
    __device__ __forceinline__ void set_gradient(int c, float x) const { column[c * PITCH] = x; }
  };

  struct SoftTarget {
    const Voxels& source;
    const Span& span;
    int offset;
    __device__ __forceinline__ float operator()(int c) const {
      return offset < span.n ? load_float(source, span.image, c, span.first + offset) : 0.f;
    }
    __device__ __forceinline__ float times(int c, float x) const { return weighted((*this)(c), x); }
  };

  struct SoftTargets {
    const Voxels& source;
    const Span& span;
    __device__ __forceinline__ SoftTargets(const WideLogits&, const Voxels& source, const Span& span)
        : source(source), span(span) {}
    __device__ __forceinline__ SoftTarget at(int, int offset) const { return {source, span, offset}; }
  };

  int C;
  float* rows;  // shared, [C, PITCH]

  __host__ __device__ WideLogits(Arena& shared, const Voxels& logits)
      : C(int(logits.channels)), rows(shared.take<float>(ChannelRows<VOXELS>::floats(C))) {}

  __device__ __forceinline__ int offset(int) const { return threadIdx.x / LANES; }

  __device__ __forceinline__ void read(const Voxels& logits, const Span& span) const {
    ChannelRows<VOXELS>::load(logits, span, rows);
  }

  template <class Run>
  __device__ __forceinline__ void for_voxels(const Span&, const Run& run) const {
    run(Voxel{{int(threadIdx.x % LANES)}, offset(0), rows + offset(0)});
  }

  __device__ void write_gradient(const Voxels& target, const Span& span) const {
    __syncthreads();
    for_elements<VOXELS>(target, [&](int c, int v) {
      if (v < span.n) store_float(target, span.image, c, span.first + v, rows[c * PITCH + v]);
    });
  }
};

template <class Run>
void with_tile(int64_t C, int64_t regions, const Run& run) {
  if (C == 2 && regions <= MOST_NARROW_REGIONS) return run(Type<NarrowLogits<2>>{});
  if (C == 4 && regions <= MOST_NARROW_REGIONS) return run(Type<NarrowLogits<4>>{});
  run(Type<WideLogits>{});
}

// Runs run(x, softmax, target, region) for every voxel, region -1 where it is not kept.
template <class Tile, class Run>
__device__ __forceinline__ void for_kept_voxels(const DiceCE& a, const Temperature& temperature, Tile& tile,
                                                const Span& span, const Run& run) {
  const auto labels = load_map(tile, a.labels, span), regions = load_map(tile, a.regions, span);
  tile.read(a.logits, span);
  const auto region_of = [&](int slot, int label) {
    return label < 0 ? -1 : regions.label(slot, int(a.num_regions));
  };
  const auto softmax_of = [&](const auto& x) {
    float top = -INFINITY;
#pragma unroll
    for (int c = x.lane; c < tile.C; c += Tile::LANES) top = x(c) > top ? x(c) : top;
    return class_softmax(tile, x, x, x.max(top), temperature);
  };
  // With a soft target every voxel of the tile is kept: an absent label is 0.
  if (a.soft_target.present) {
    const typename Tile::SoftTargets targets(tile, a.soft_target, span);
    tile.for_voxels(span, [&](const auto& x) {
      run(x, softmax_of(x), targets.at(x.slot, x.offset), region_of(x.slot, labels.label(x.slot, tile.C)));
    });
  } else {
    tile.for_voxels(span, [&](const auto& x) {
      const int label = labels.label(x.slot, tile.C);
      run(x, softmax_of(x), HardTarget{label}, region_of(x.slot, label));
    });
  }
}

template <class Tile>
struct ForwardMemory {
  Tile tile;
  RegionStatistics<Tile> statistics;

  __host__ __device__ __forceinline__ ForwardMemory(Arena& shared, const Voxels& logits, int regions, bool squared)
      : tile(shared, logits), statistics(shared, tile, regions, squared) {}
};

template <class Tile>
__global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS)
    forward(DiceCE a, Temperature temperature, Tiling tiling, Partials partials) {
  Arena shared{dynamic_shared<char>()};
  ForwardMemory<Tile> memory(shared, a.logits, int(a.num_regions), a.squared);
  Tile& tile = memory.tile;
  memory.statistics.start(partials, 0);
  RecentTiles<Tile::SLOTS> recent;
  for (TileWalk walk(tiling, blockIdx.x, gridDim.x); walk.there(); walk.next()) {
    const Span span = walk.span();
    for_kept_voxels(a, temperature, tile, span,
                    [&](const auto& x, const ClassSoftmax& softmax, const auto& target, int region) {
                      memory.statistics.add(tile, x, softmax, x, target, region);
                    });
    const bool enough = recent.are_enough();
    if (a.soft_target.present) {
      memory.statistics.finish_tile(enough, [&](int v) { return WideLogits::SoftTarget{a.soft_target, span, v}; });
    } else {
      memory.statistics.finish_tile(enough, [&](int v) { return hard_target(a.labels, span, v, tile.C); });
    }
  }
  memory.statistics.finish(partials, 0);
}

__global__ void __launch_bounds__(THREADS) finish(
    DiceCE a,
    const double* total  // [region_sums]
) {
  const int64_t C = a.logits.channels;
  for (int64_t i = threadIdx.x; i < a.num_regions * statistics_per_region(C); i += THREADS)
    a.statistics[i] = total[i];
  class_losses(total, a.num_regions, C, a.first_class, a.ce, a.dice);
}

template <class Tile>
__global__ void __launch_bounds__(THREADS, Tile::BACKWARD_BLOCKS)
    backward(DiceCE a, Temperature temperature, Tiling tiling, ClassGradient class_gradient) {
  Arena shared{dynamic_shared<char>()};
  Tile tile(shared, a.logits);
  for (TileWalk walk(tiling, blockIdx.x, gridDim.x); walk.there(); walk.next()) {
    const Span span = walk.span();
    for_kept_voxels(a, temperature, tile, span,
                    [&](const auto& x, const ClassSoftmax& softmax, const auto& target, int region) {
                      const VoxelClassGradient by_class(tile, x, class_gradient, softmax, x, target, region);
#pragma unroll
                      for (int c = x.lane; c < tile.C; c += Tile::LANES)
                        x.set_gradient(c, by_class.by_logit(c, x(c)));
                    });
    tile.write_gradient(a.grad_logits, span);
  }
}

}  // namespace

int64_t dice_ce_forward(const DiceCE& a, const Device& device) {
  Arena workspace{static_cast<char*>(device.workspace)};
  const int64_t sums = region_sums(a.num_regions, a.logits.channels);
  with_tile(a.logits.channels, a.num_regions, [&](auto chosen) {
    using Tile = typename decltype(chosen)::type;
    const Tiling tiling(a.logits, Tile::VOXELS);
    const int64_t shared = shared_bytes<ForwardMemory<Tile>>(a.logits, int(a.num_regions), a.squared);
    const int blocks = blocks_with_sums(forward<Tile>, shared, tiling.tiles, sums, device);
    const Partials partials(workspace, sums, blocks);
    double* total = workspace.take<double>(sums);
    if (device.workspace == nullptr) return;
    launch(forward<Tile>, dim3(blocks), dim3(THREADS), shared, device.stream, a, Temperature(a.temperature), tiling,
           partials);
    launch_add_partials(partials, total, device);
    launch(finish, dim3(1), dim3(THREADS), 0, device.stream, a, total);
  });
  return workspace.bytes;
}

int64_t dice_ce_backward(const DiceCE& a, const Device& device) {
  Arena workspace{static_cast<char*>(device.workspace)};
  const ClassGradient class_gradient(workspace, a.num_regions, a.logits.channels, a.squared, a.first_class);
  if (device.workspace == nullptr) return workspace.bytes;
  launch_class_gradient(class_gradient, a.statistics, a.ce, a.dice, device);
  with_tile(a.logits.channels, 1, [&](auto chosen) {
    using Tile = typename decltype(chosen)::type;
    const Tiling tiling(a.logits, Tile::VOXELS);
    launch(backward<Tile>, dim3(blocks_without_sums(tiling.tiles, device)), dim3(THREADS),
           shared_bytes<Tile>(a.logits), device.stream, a, Temperature(a.temperature), tiling, class_gradient);
  });
  return workspace.bytes;
}

}  // namespace semiseg::cuda
