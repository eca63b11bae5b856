// mean[c] = sum_v weight[c, v] z[v] / total[c],  total[c] = sum_v weight[c, v];  0 where total[c] = 0
// grad_z[v] = sum_c weight[c, v] grad_mean[c] / total[c]
//
// A block has CHANNELS of the channels of its tiles. The blocks for the other channels of a tile are its neighbours in
// the grid: only the first of them waits for the tile's weights to come from memory.
#include "device_sums.cuh"
#include "kernels.cuh"

namespace semiseg::cuda {

namespace {

constexpr int CHANNELS = 16, VOXELS = 128;
constexpr int PITCH = VOXELS + 4;             // of the rows in shared memory; keeps vectors aligned
constexpr int SLICES = THREADS / CHANNELS;    // of a tile's voxels, which the threads of a channel share in forward
constexpr int FEW_CLASSES = 4, CLASSES = 16;  // whose weights are at hand at once
constexpr int BACKWARD_BLOCKS = 4;

// rows[i, v] = x[first + i, v] of a tile, 0 beyond the ends.
template <int ROWS>
__device__ __forceinline__ void load_rows(const Voxels& x, const Span& span, int64_t first, float* rows) {
  const int64_t count = x.channels - first;
  with_weight_type(x.type, [&](auto zero) {
    using T = decltype(zero);
    const T* p = element<const T>(x, span.image, first, span.first);
    if (has_aligned_rows(x) && span.n == VOXELS) {
#pragma unroll
      for (int e = threadIdx.x; e < ROWS * VOXELS / 4; e += THREADS) {
        const int i = e / (VOXELS / 4), v = e % (VOXELS / 4) * 4;
        float four[4] = {};
        if (i < count) load_adjacent(p + i * x.channel_stride + v, four);
        *reinterpret_cast<float4*>(rows + i * PITCH + v) = make_float4(four[0], four[1], four[2], four[3]);
      }
      return;
    }
    // Neighbouring threads read neighbouring elements.
    const bool planar = x.voxel_stride == 1;
    for (int e = threadIdx.x; e < ROWS * VOXELS; e += THREADS) {
      const int i = planar ? e / VOXELS : e % ROWS, v = planar ? e % VOXELS : e / ROWS;
      const bool there = i < count && v < span.n;
      rows[i * PITCH + v] = there ? to_float(p[i * x.channel_stride + v * x.voxel_stride]) : 0.f;
    }
  });
}

__device__ __forceinline__ float4 four_of(const float* row, int v) {
  return *reinterpret_cast<const float4*>(row + v);
}

// In pairs: the rounding of a long sum of equal numbers would go one way.
__device__ __forceinline__ float dot(const float4& x, const float4& y) {
  return fmaf(x.x, y.x, x.y * y.y) + fmaf(x.z, y.z, x.w * y.w);
}

template <int CLASS_ROWS>
struct ForwardMemory {
  float* z;       // shared, [CHANNELS, PITCH]
  float* weight;  // shared, [CLASS_ROWS, PITCH]

  __host__ __device__ explicit ForwardMemory(Arena& shared)
      : z(shared.take<float>(CHANNELS * PITCH)), weight(shared.take<float>(CLASS_ROWS * PITCH)) {}
};

// A block for CHANNELS of the channels (x), CLASS_ROWS of the classes (y) and some of the tiles (z). Partial sums: [C, d]
// of the embeddings, then [C] of the weights.
template <int CLASS_ROWS>
__global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS)
    forward(MaskedClassMean a, Tiling tiling, Partials partials) {
  static_assert(CLASS_ROWS <= CHANNELS && VOXELS % (8 * SLICES) == 0);
  Arena shared{dynamic_shared<char>()};
  const ForwardMemory<CLASS_ROWS> memory(shared);
  const int64_t C = a.weight.channels, d = a.z.channels;
  const int64_t first_channel = int64_t(blockIdx.x) * CHANNELS, first_class = int64_t(blockIdx.y) * CLASS_ROWS;
  const int channel = threadIdx.x / SLICES, slice = threadIdx.x % SLICES;
  const float* z = memory.z + channel * PITCH;
  const float* own = memory.weight + channel * PITCH;  // of the class with the channel's number, if there is one
  double sum[CLASS_ROWS] = {}, weights = 0;
  for (int64_t t = blockIdx.z; t < tiling.tiles; t += gridDim.z) {
    const Span span = tiling.span(t);
    load_rows<CHANNELS>(a.z, span, first_channel, memory.z);
    load_rows<CLASS_ROWS>(a.weight, span, first_class, memory.weight);
    __syncthreads();
    float recent[CLASS_ROWS] = {}, recent_weights = 0;
#pragma unroll
    for (int v = 4 * slice; v < VOXELS; v += 8 * SLICES) {
      const int w = v + 4 * SLICES;
      const float4 here = four_of(z, v), there = four_of(z, w);
#pragma unroll
      for (int c = 0; c < CLASS_ROWS; ++c) {
        const float* weight = memory.weight + c * PITCH;
        recent[c] += dot(here, four_of(weight, v)) + dot(there, four_of(weight, w));
      }
      if (channel < CLASS_ROWS) {
        const float4 ones = make_float4(1, 1, 1, 1);
        recent_weights += dot(ones, four_of(own, v)) + dot(ones, four_of(own, w));
      }
    }
#pragma unroll
    for (int c = 0; c < CLASS_ROWS; ++c) sum[c] += double(recent[c]);
    weights += double(recent_weights);
    __syncthreads();
  }
  const SeveralLanes<SLICES> lanes{slice};
  const auto write = [&](int64_t i, double x) { partials.data[i * partials.blocks + blockIdx.z] = x; };
#pragma unroll
  for (int c = 0; c < CLASS_ROWS; ++c) {
    const double all = lanes.sum(sum[c]);
    if (slice == 0 && first_class + c < C && first_channel + channel < d)
      write((first_class + c) * d + first_channel + channel, all);
  }
  weights = lanes.sum(weights);
  if (slice == 0 && blockIdx.x == 0 && channel < CLASS_ROWS && first_class + channel < C)
    write(C * d + first_class + channel, weights);
}

__device__ __forceinline__ float over_total(double x, double total) { return total == 0 ? 0.f : float(x / total); }

__global__ void __launch_bounds__(THREADS) finish(
    MaskedClassMean a,
    const double* sums  // [C, d], [C]
) {
  const int C = int(a.weight.channels), d = int(a.z.channels);  // 32 bits, as division in 64 spills
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < C * (d + 1); i += gridDim.x * THREADS) {
    if (i < C * d) a.mean[i] = over_total(sums[i], sums[C * d + i / d]);
    else a.total[i - C * d] = sums[i];
  }
}

__global__ void __launch_bounds__(THREADS) share_gradient(
    MaskedClassMean a, int64_t width,
    float* share  // [C, width], grad_mean / total, and 0 from channel d on
) {
  const int64_t C = a.weight.channels, d = a.grad_z.channels;
  for (int64_t i = blockIdx.x * int64_t(THREADS) + threadIdx.x; i < C * width; i += gridDim.x * int64_t(THREADS)) {
    const int64_t c = i / width, j = i - c * width;
    share[i] = j < d ? over_total(a.mean[c * d + j], a.total[c]) : 0.f;
  }
}

// What a thread of backward computes: four channels of four voxels.
struct Patch {
  int channel, voxel;  // the first, of the block's and of the tile's
  float x[4][4];

  // Neighbouring threads write neighbouring elements.
  __device__ explicit Patch(const Voxels& target) : x{} {
    const bool planar = target.voxel_stride == 1;
    channel = 4 * int(planar ? threadIdx.x / (VOXELS / 4) : threadIdx.x % (CHANNELS / 4));
    voxel = 4 * int(planar ? threadIdx.x % (VOXELS / 4) : threadIdx.x / (CHANNELS / 4));
  }

  __device__ __forceinline__ void add(const float4& share, const float4& weight) {
    const float left[4] = {share.x, share.y, share.z, share.w}, right[4] = {weight.x, weight.y, weight.z, weight.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int v = 0; v < 4; ++v) x[i][v] = fmaf(left[i], right[v], x[i][v]);
  }

  __device__ __forceinline__ void store(const Voxels& target, const Span& span, int64_t first_channel) const {
    const int64_t channels = target.channels - first_channel - channel;
    const int voxels = span.n - voxel;
    with_float_type(target.type, [&](auto zero) {
      using T = decltype(zero);
      T* p = element<T>(target, span.image, first_channel + channel, span.first + voxel);
      if (has_aligned_rows(target) && voxels >= 4) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (i < channels) store_adjacent(p + i * target.channel_stride, x[i]);
      } else if (has_aligned_points(target) && channels >= 4) {
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          const float four[4] = {x[0][v], x[1][v], x[2][v], x[3][v]};
          if (v < voxels) store_adjacent(p + v * target.voxel_stride, four);
        }
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int v = 0; v < 4; ++v)
            if (i < channels && v < voxels)
              p[i * target.channel_stride + v * target.voxel_stride] = from_float<T>(x[i][v]);
      }
    });
  }
};

// A block for CHANNELS of the channels (x) and some of the tiles (y).
__global__ void __launch_bounds__(THREADS, BACKWARD_BLOCKS) backward(
    MaskedClassMean a, Tiling tiling, int64_t width,
    const float* share  // [C, width]
) {
  float* weight = dynamic_shared<float>();  // [CLASSES, PITCH]
  const int64_t C = a.weight.channels, first_channel = int64_t(blockIdx.x) * CHANNELS;
  for (int64_t t = blockIdx.y; t < tiling.tiles; t += gridDim.y) {
    const Span span = tiling.span(t);
    Patch patch(a.grad_z);
    for (int64_t first = 0; first < C; first += CLASSES) {
      __syncthreads();
      load_rows<CLASSES>(a.weight, span, first, weight);
      __syncthreads();
      const float* shares = share + first * width + first_channel + patch.channel;
      for (int c = 0; c < CLASSES && first + c < C; ++c)
        patch.add(*reinterpret_cast<const float4*>(shares + c * width), four_of(weight + c * PITCH, patch.voxel));
    }
    patch.store(a.grad_z, span, first_channel);
  }
}

int64_t groups(int64_t n, int64_t of) { return (n + of - 1) / of; }

template <class Run>
void with_class_rows(int64_t C, const Run& run) {
  if (C <= FEW_CLASSES) return run(std::integral_constant<int, FEW_CLASSES>{});
  run(std::integral_constant<int, CLASSES>{});
}

}  // namespace

int64_t masked_class_mean_forward(const MaskedClassMean& a, const Device& device) {
  Arena workspace{static_cast<char*>(device.workspace)};
  const int64_t C = a.weight.channels, d = a.z.channels, sums = C * (d + 1);
  const Tiling tiling(a.z, VOXELS);
  with_class_rows(C, [&](auto rows) {
    constexpr int class_rows = decltype(rows)::value;
    const int64_t shared = shared_bytes<ForwardMemory<class_rows>>();
    const int blocks = blocks_with_sums(forward<class_rows>, shared, tiling.tiles, sums, device);
    const Partials partials(workspace, sums, blocks);
    double* total = workspace.take<double>(sums);
    if (device.workspace == nullptr) return;
    launch(forward<class_rows>, dim3(groups(d, CHANNELS), groups(C, class_rows), blocks), dim3(THREADS), shared,
           device.stream, a, tiling, partials);
    launch_add_partials(partials, total, device);
    launch(finish, dim3(blocks_without_sums(groups(sums, THREADS), device)), dim3(THREADS), 0, device.stream, a, total);
  });
  return workspace.bytes;
}

int64_t masked_class_mean_backward(const MaskedClassMean& a, const Device& device) {
  Arena workspace{static_cast<char*>(device.workspace)};
  const int64_t C = a.weight.channels, chunks = groups(a.grad_z.channels, CHANNELS), width = chunks * CHANNELS;
  float* share = workspace.take<float>(C * width);
  if (device.workspace == nullptr) return workspace.bytes;
  launch(share_gradient, dim3(blocks_without_sums(groups(C * width, THREADS), device)), dim3(THREADS), 0,
         device.stream, a, width, share);
  const Tiling tiling(a.grad_z, VOXELS);
  launch(backward, dim3(chunks, blocks_without_sums(tiling.tiles, device)), dim3(THREADS),
         CLASSES * PITCH * sizeof(float), device.stream, a, tiling, width, share);
  return workspace.bytes;
}

}  // namespace semiseg::cuda
