// Products of maps of classes with the channels of voxels: sums over voxels by class, and mixtures of rows by class.
//
// A block has CHANNELS of the channels of its tiles. The blocks for the other channels of a tile are its neighbours in
// the grid: only the first of them waits for the tile's weights to come from memory.
#pragma once

#include "device_rows.cuh"
#include "device_sums.cuh"

namespace semiseg::class_products {

constexpr int CHANNELS = 16, VOXELS = 128;
constexpr int PITCH = Rows<CHANNELS, VOXELS>::PITCH;
constexpr int SLICES = THREADS / CHANNELS;    // of a tile's voxels, which the threads of a channel share in forward
constexpr int FEW_CLASSES = 4, CLASSES = 16;  // whose weights are at hand at once
constexpr int MIX_BLOCKS = 4;
constexpr int sum_blocks(int classes) { return SPARES_REGISTERS && classes <= FEW_CLASSES ? FORWARD_BLOCKS : 2; }

__device__ __forceinline__ float4 four_of(const float* row, int v) {
  return *reinterpret_cast<const float4*>(row + v);
}

// In pairs: the rounding of a long sum of equal numbers would go one way.
__device__ __forceinline__ float dot(const float4& x, const float4& y) {
  return fmaf(x.x, y.x, x.y * y.y) + fmaf(x.z, y.z, x.w * y.w);
}

template <int CLASS_ROWS>
struct ClassSumsMemory {
  float* z;       // shared, [CHANNELS, PITCH]
  float* weight;  // shared, [CLASS_ROWS, PITCH]

  __host__ __device__ explicit ClassSumsMemory(Arena& shared)
      : z(shared.take<float>(CHANNELS * PITCH)), weight(shared.take<float>(CLASS_ROWS * PITCH)) {}
};

// Adds a tile's products of one channel in a slice of the voxels, and the weights of the class with the channel's number,
// if there is one; in float32 first.
template <int CLASS_ROWS>
__device__ __forceinline__ void add_tile(const ClassSumsMemory<CLASS_ROWS>& memory, int channel, int slice,
                                         double (&sum)[CLASS_ROWS], double& weights) {
  const float* row = memory.z + channel * PITCH;
  const float* own = memory.weight + channel * PITCH;
  float recent[CLASS_ROWS] = {}, recent_weights = 0;
#pragma unroll
  for (int v = 4 * slice; v < VOXELS; v += 8 * SLICES) {
    const int w = v + 4 * SLICES;
    const float4 here = four_of(row, v), there = four_of(row, w);
#pragma unroll
    for (int c = 0; c < CLASS_ROWS; ++c) {
      const float* of_class = memory.weight + c * PITCH;
      recent[c] += dot(here, four_of(of_class, v)) + dot(there, four_of(of_class, w));
    }
    if (channel < CLASS_ROWS) {
      const float4 ones = make_float4(1, 1, 1, 1);
      recent_weights += dot(ones, four_of(own, v)) + dot(ones, four_of(own, w));
    }
  }
#pragma unroll
  for (int c = 0; c < CLASS_ROWS; ++c) sum[c] += double(recent[c]);
  weights += double(recent_weights);
}

// sum_v weight[c, v] z[v] and sum_v weight[c, v], over all images together or of each. A block for CHANNELS of the
// channels, CLASS_ROWS of the classes and some of the tiles of some image, in this order: only a grid's first axis has room
// for all images. Partial sums, per image: [C, d], then [C] of the weights.
template <int CLASS_ROWS>
static __global__ void __launch_bounds__(THREADS, sum_blocks(CLASS_ROWS))
    sum_by_class(Voxels z, Voxels weight, Tiling tiling, Partials partials) {
  static_assert(CLASS_ROWS <= CHANNELS && VOXELS % (8 * SLICES) == 0);
  Arena shared{dynamic_shared<char>()};
  const ClassSumsMemory<CLASS_ROWS> memory(shared);
  const int64_t C = weight.channels, d = z.channels;
  const unsigned channel_groups = unsigned(ceil_div(d, CHANNELS)), class_groups = unsigned(ceil_div(C, CLASS_ROWS));
  const unsigned part = blockIdx.x / channel_groups / class_groups;
  const int64_t first_channel = int64_t(blockIdx.x % channel_groups) * CHANNELS;
  const int64_t first_class = int64_t(blockIdx.x / channel_groups % class_groups) * CLASS_ROWS;
  const int64_t image = part / partials.blocks, block = part % partials.blocks;
  const int channel = threadIdx.x / SLICES, slice = threadIdx.x % SLICES;
  double sum[CLASS_ROWS] = {}, weights = 0;
  Rows<CHANNELS, VOXELS> z_rows{z};
  Rows<CLASS_ROWS, VOXELS> weight_rows{weight};
  TileWalk walk(tiling, block, partials.blocks);
  const auto load_tile = [&] {
    if (!walk.there()) return;
    Span span = walk.span();
    span.image += image;
    z_rows.load(span, first_channel);
    weight_rows.load(span, first_class);
  };
  for (load_tile(); walk.there();) {
    z_rows.store(memory.z);
    weight_rows.store(memory.weight);
    __syncthreads();
    walk.next();
    load_tile();  // on its way while this one is summed
    add_tile(memory, channel, slice, sum, weights);
    __syncthreads();
  }
  const SeveralLanes<SLICES> lanes{slice};
  const auto write = [&](int64_t i, double x) {
    partials.data[(image * C * (d + 1) + i) * partials.blocks + block] = x;
  };
#pragma unroll
  for (int c = 0; c < CLASS_ROWS; ++c) {
    const double all = lanes.sum(sum[c]);
    if (slice == 0 && first_class + c < C && first_channel + channel < d)
      write((first_class + c) * d + first_channel + channel, all);
  }
  weights = lanes.sum(weights);
  if (slice == 0 && first_channel == 0 && channel < CLASS_ROWS && first_class + channel < C)
    write(C * d + first_class + channel, weights);
}

// target[v] = sum_c weight[c, v] share[c], with the same shares for all images or those of each. A block for CHANNELS of the
// channels (x) and some of the tiles (y), which takes CLASS_ROWS of the classes at a time.
template <int CLASS_ROWS>
static __global__ void __launch_bounds__(THREADS, MIX_BLOCKS) mix_by_class(
    Voxels weight, Voxels target, Tiling tiling, int64_t width,
    int64_t image_stride,  // of the shares, 0 or C * width
    const float* share     // [C, width], 0 from the target's channels on
) {
  float* rows = dynamic_shared<float>();  // [CLASS_ROWS, PITCH]
  const int64_t C = weight.channels, first_channel = int64_t(blockIdx.x) * CHANNELS;
  // Neighbouring threads write neighbouring elements.
  constexpr int wide = VOXELS / 4, deep = CHANNELS / 4;
  const int thread = int(threadIdx.x);
  Patch patch = target.voxel_stride == 1 ? Patch{thread / wide * 4, thread % wide * 4}
                                         : Patch{thread % deep * 4, thread / deep * 4};
  Rows<CLASS_ROWS, VOXELS> weight_rows{weight};
  TileWalk walk(tiling, blockIdx.y, gridDim.y);
  int64_t first = 0;  // of the classes whose weights are loaded
  const auto load = [&] {
    if (walk.there()) weight_rows.load(walk.span(), first);
  };
  for (load(); walk.there();) {
    const Span span = walk.span();
    const int classes = int(C - first < CLASS_ROWS ? C - first : CLASS_ROWS);
    const float* shares = share + span.image * image_stride + first * width + first_channel + patch.channel;
    __syncthreads();
    weight_rows.store(rows);
    __syncthreads();
    first += CLASS_ROWS;
    const bool last = first >= C;
    if (last) {
      first = 0;
      walk.next();
    }
    load();  // on its way while these are added
    for (int c = 0; c < classes; ++c)
      patch.add(*reinterpret_cast<const float4*>(shares + c * width), four_of(rows + c * PITCH, patch.voxel));
    if (!last) continue;
    patch.store(target, span, first_channel);
    patch = {patch.channel, patch.voxel};
  }
}

// Runs run(a constant) with the number of classes whose weights are at hand at once.
template <class Run>
void with_class_rows(int64_t C, const Run& run) {
  if (C <= FEW_CLASSES) run(std::integral_constant<int, FEW_CLASSES>{});
  else run(std::integral_constant<int, CLASSES>{});
}

// Channels of a row of shares.
inline int64_t share_width(int64_t channels) { return round_up(channels, CHANNELS); }

inline void launch_mix_by_class(const Voxels& weight, const Voxels& target, int64_t image_stride, const float* share,
                                const Device& device) {
  const Tiling tiling(target, VOXELS);
  const int64_t width = share_width(target.channels);
  with_class_rows(weight.channels, [&](auto rows) {
    constexpr int class_rows = decltype(rows)::value;
    launch(mix_by_class<class_rows>, dim3(width / CHANNELS, blocks_without_sums(tiling.tiles, device)), dim3(THREADS),
           class_rows * PITCH * sizeof(float), device.stream, weight, target, tiling, width, image_stride, share);
  });
}

// Sums by class over all images (`images` is 1) or of each (their number): [images, C * (d + 1)].
inline double* launch_sum_by_class(Arena& workspace, const Voxels& z, const Voxels& weight, int64_t images,
                                   const Device& device) {
  Voxels of_image = z;
  of_image.batch = z.batch / images;
  const int64_t C = weight.channels, d = z.channels, sums = C * (d + 1);  // of an image
  const Tiling tiling(of_image, VOXELS);
  double* total = workspace.take<double>(images * sums);
  with_class_rows(C, [&](auto rows) {
    constexpr int class_rows = decltype(rows)::value;
    const int64_t shared = shared_bytes<ClassSumsMemory<class_rows>>();
    const int64_t all = blocks_with_sums(sum_by_class<class_rows>, shared, images * tiling.tiles, sums, device);
    const int blocks = int(ceil_div(all, images));
    const Partials partials(workspace, images * sums, blocks);
    if (device.workspace == nullptr) return;
    launch(sum_by_class<class_rows>, dim3(ceil_div(d, CHANNELS) * ceil_div(C, class_rows) * images * blocks),
           dim3(THREADS), shared, device.stream, z, weight, tiling, partials);
    launch_add_partials(partials, total, device);
  });
  return total;
}

}  // namespace semiseg::class_products
