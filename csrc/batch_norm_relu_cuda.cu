// h = scale (x - mean) + bias,  y = h where h > 0, negative_slope h elsewhere;  scale = weight / sqrt(variance + epsilon)
// g = grad_y where h > 0, negative_slope grad_y elsewhere
// grad_x = scale (g - offset - tilt (x - mean)),  with the sums over all N voxels of a channel
// offset = sum g / N,  tilt = sum g (x - mean) / (N (variance + epsilon))
//
// A thread has the same channels in all of its block's tiles: those of a vector of adjacent elements where channels lie
// adjacent, else one. Their parameters and their sums stay in its registers.
#include "batch_norm_relu_channels.h"
#include "device_sums.cuh"
#include "kernels.cuh"

namespace semiseg::cuda {

namespace {

constexpr int SLOTS = 4;  // vectors of a thread in a tile, all on their way at once
constexpr int TILES = 8;  // whose sums are float32
constexpr int64_t VECTOR_BYTES = 16;

bool has_adjacent_channels(const Voxels& x) { return x.channel_stride == 1 && x.channels > 1; }

// A dense channels-last batch is one image, whose voxels are those of all.
Voxels joined(Voxels x) {
  if (!has_adjacent_channels(x)) return x;
  x.voxels *= x.batch;
  x.batch = 1;
  x.voxel_stride = x.channels;
  return x;
}

// A dense tensor in vectors of LENGTH_ adjacent elements, of CHANNELS_ channels: as many, or one. In a tile the threads of
// a block stand in rows: along a row lie the vectors of a voxel, as many as there are threads for, or a single one; the
// rows follow the voxels. What does not fit in a row belongs to the blocks of the next group of channels.
template <class Element, int LENGTH_, int CHANNELS_>
struct DenseVectors {
  using T = Element;
  static constexpr int LENGTH = LENGTH_, CHANNELS = CHANNELS_, VOXELS = LENGTH / CHANNELS;

  int64_t channels, batch_stride, channel_stride, voxel_stride;
  int columns, rows, groups;
  Tiling tiling;

  explicit DenseVectors(const Voxels& x)
      : channels(x.channels), batch_stride(x.batch_stride), channel_stride(x.channel_stride),
        voxel_stride(x.voxel_stride), columns(has_adjacent_channels(x) ? vectors_in_row(x) : 1),
        rows(THREADS / columns), groups(int(ceil_div(x.channels, columns * CHANNELS))),
        tiling(x, rows * VOXELS * SLOTS) {}

  static int vectors_in_row(const Voxels& x) {
    const int64_t vectors = x.channels / CHANNELS;
    return int(vectors < THREADS ? vectors : THREADS);
  }

  // The blocks of a group of channels are a column of the grid; those of the same tiles are neighbours.
  dim3 grid(int64_t blocks) const {
    const int64_t of_group = blocks / groups;
    return dim3(unsigned(groups), unsigned(of_group > 0 ? of_group : 1));
  }
};

// A thread's part of every tile of its block.
template <class Vectors>
struct Mine {
  using T = typename Vectors::T;
  static constexpr int LENGTH = Vectors::LENGTH, CHANNELS = Vectors::CHANNELS;

  const Vectors& all;
  int row;
  int64_t channel;  // the first
  bool present;     // some threads are left over

  __device__ __forceinline__ explicit Mine(const Vectors& all)
      : all(all), row(int(threadIdx.x) / all.columns),
        channel((int64_t(blockIdx.x) * all.columns + int(threadIdx.x) % all.columns) * CHANNELS),
        present(row < all.rows && channel < all.channels) {}

  __device__ __forceinline__ int voxel(int slot) const { return (row + slot * all.rows) * Vectors::VOXELS; }

  __device__ __forceinline__ bool inside(const Span& span, int slot) const { return present && voxel(slot) < span.n; }

  __device__ __forceinline__ int64_t at(const Span& span, int slot) const {
    return span.image * all.batch_stride + channel * all.channel_stride +
           (span.first + voxel(slot)) * all.voxel_stride;
  }

  struct Loaded {
    Adjacent<LENGTH, T> slots[SLOTS];
  };

  // 0 beyond the tile's end.
  template <Reuse REUSE>
  __device__ __forceinline__ Loaded load(const Voxels& source, const Span& span) const {
    Loaded loaded{};
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot)
      if (inside(span, slot))
        loaded.slots[slot].template load<REUSE>(static_cast<const T*>(source.data) + at(span, slot));
    return loaded;
  }

  __device__ __forceinline__ void store(const Voxels& target, const Span& span, int slot,
                                        const float (&x)[LENGTH]) const {
    if (inside(span, slot)) store_adjacent<Reuse::next_kernel>(static_cast<T*>(target.data) + at(span, slot), x);
  }

  __device__ __forceinline__ void load_parameter(const float* of_channel, float (&values)[CHANNELS]) const {
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) values[c] = present ? of_channel[channel + c] : 0.f;
  }
};

// Normalisation and activation; i is an element's place in its vector.
template <class Vectors>
struct Normalised {
  static constexpr int CHANNELS = Vectors::CHANNELS;

  float mean[CHANNELS], scale[CHANNELS], bias[CHANNELS], negative_slope;

  __device__ __forceinline__ Normalised(const BatchNormReLU& a, const Mine<Vectors>& mine)
      : negative_slope(a.negative_slope) {
    mine.load_parameter(a.mean, mean);
    mine.load_parameter(a.scale, scale);
    mine.load_parameter(a.bias, bias);
  }

  __device__ __forceinline__ float centred(float x, int i) const { return x - mean[i % CHANNELS]; }
  __device__ __forceinline__ float before_activation(float centred, int i) const {
    return fmaf(scale[i % CHANNELS], centred, bias[i % CHANNELS]);
  }
  __device__ __forceinline__ float activated(float h) const { return h > 0 ? h : negative_slope * h; }
  // 0 times an infinity would be NaN.
  __device__ __forceinline__ float gradient(float h, float grad_y) const {
    return h > 0 ? grad_y : negative_slope == 0 ? 0 : negative_slope * grad_y;
  }
};

// Two sums of every channel over a block's voxels.
template <class Vectors>
struct ChannelSums {
  static constexpr int CHANNELS = Vectors::CHANNELS, COUNT = 2 * CHANNELS;
  static constexpr int64_t SHARED_BYTES = COUNT * THREADS * sizeof(double);

  double mine[COUNT];

  // Writes the sums to the block's column of the partials [2, channels]; row after row is added to another.
  __device__ __forceinline__ void finish(const Mine<Vectors>& thread, const Partials& partials) const {
    double* sums = dynamic_shared<double>() + threadIdx.x;  // [COUNT, THREADS]
#pragma unroll
    for (int i = 0; i < COUNT; ++i) sums[i * THREADS] = mine[i];
    __syncthreads();
    for (int left = thread.all.rows; left > 1;) {
      const int half = (left + 1) / 2;
      if (thread.row + half < left) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) sums[i * THREADS] += sums[i * THREADS + half * thread.all.columns];
      }
      __syncthreads();
      left = half;
    }
    if (thread.row > 0 || !thread.present) return;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int64_t sum = i / CHANNELS * thread.all.channels + thread.channel + i % CHANNELS;
      partials.data[sum * partials.blocks + blockIdx.y] = sums[i * THREADS];
    }
  }
};

// Sums of the distances from the channel's first voxel, and of their squares.
template <class Vectors>
__global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS)
    statistics(BatchNormReLUStatistics a, Vectors vectors, Partials partials) {
  constexpr int CHANNELS = Vectors::CHANNELS;
  const Mine<Vectors> mine(vectors);
  ChannelSums<Vectors> sums{};
  for (TileWalk walk(vectors.tiling, blockIdx.y, gridDim.y); walk.there();) {
    // In float32 the distances are those from the first of these voxels that the thread has: squares of distances from
    // zero, or from an outlier that all threads shared, would lose digits.
    float near[CHANNELS] = {}, distances[CHANNELS] = {}, squares[CHANNELS] = {};
    int count = 0;
    for (int tile = 0; tile < TILES && walk.there(); ++tile, walk.next()) {
      const Span span = walk.span();
      const auto loaded = mine.template load<Reuse::next_kernel>(a.x, span);
#pragma unroll
      for (int slot = 0; slot < SLOTS; ++slot) {
        if (!mine.inside(span, slot)) continue;
        float x[Vectors::LENGTH];
        loaded.slots[slot].convert(x);
        if (count == 0) {
#pragma unroll
          for (int c = 0; c < CHANNELS; ++c) near[c] = x[c];
        }
        count += Vectors::VOXELS;
#pragma unroll
        for (int i = 0; i < Vectors::LENGTH; ++i) {
          const float distance = x[i] - near[i % CHANNELS];
          distances[i % CHANNELS] += distance;
          squares[i % CHANNELS] = fmaf(distance, distance, squares[i % CHANNELS]);
        }
      }
    }
    if (!mine.present) continue;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const double step = double(near[c]) - load_float(a.x, 0, mine.channel + c, 0), distance = distances[c];
      sums.mine[c] += distance + count * step;
      sums.mine[CHANNELS + c] += squares[c] + step * (2 * distance + count * step);
    }
  }
  sums.finish(mine, partials);
}

__global__ void __launch_bounds__(THREADS) moments(
    BatchNormReLUStatistics a,
    const double* total  // [2, C], see statistics
) {
  const int64_t C = a.x.channels;
  const double share = 1 / double(a.x.batch * a.x.voxels);  // of a voxel
  for_grid(C, [&](int64_t c) {
    const double distance = total[c] * share, variance = total[C + c] * share - distance * distance;
    a.mean[c] = load_float(a.x, 0, c, 0) + distance;
    a.variance[c] = variance < 0 ? 0 : variance;
  });
}

// A thread for every channel.
template <class Operation>
__global__ void __launch_bounds__(THREADS) compute_channels(Operation a) {
  const int64_t c = blockIdx.x * int64_t(THREADS) + threadIdx.x;
  if (c < a.channels) compute_channel(a, c);
}

// The tiles from the end: what the statistics read last is still in the cache.
template <class Vectors>
__global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS) forward(BatchNormReLUForward a, Vectors vectors) {
  const Mine<Vectors> mine(vectors);
  const Normalised<Vectors> normalised(a, mine);
  for (TileWalk walk(vectors.tiling, blockIdx.y, gridDim.y); walk.there(); walk.next()) {
    const Span span = walk.span_from_end();
    const auto loaded = mine.template load<Reuse::none>(a.x, span);
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
      float x[Vectors::LENGTH];
      loaded.slots[slot].convert(x);
#pragma unroll
      for (int i = 0; i < Vectors::LENGTH; ++i) {
        const float h = normalised.before_activation(normalised.centred(x[i], i), i);
        x[i] = normalised.activated(h);
      }
      mine.store(a.y, span, slot, x);
    }
  }
}

// Sums of g and of g (x - mean).
template <class Vectors>
__global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS)
    sum_gradients(BatchNormReLUSums a, Vectors vectors, Partials partials) {
  constexpr int CHANNELS = Vectors::CHANNELS;
  const Mine<Vectors> mine(vectors);
  const Normalised<Vectors> normalised(a, mine);
  ChannelSums<Vectors> sums{};
  for (TileWalk walk(vectors.tiling, blockIdx.y, gridDim.y); walk.there();) {
    float gradients[CHANNELS] = {}, products[CHANNELS] = {};
    for (int tile = 0; tile < TILES && walk.there(); ++tile, walk.next()) {
      const Span span = walk.span();
      const auto loaded_x = mine.template load<Reuse::next_kernel>(a.x, span);
      const auto loaded_grad = mine.template load<Reuse::next_kernel>(a.grad_y, span);
#pragma unroll
      for (int slot = 0; slot < SLOTS; ++slot) {
        if (!mine.inside(span, slot)) continue;
        float x[Vectors::LENGTH], grad_y[Vectors::LENGTH];
        loaded_x.slots[slot].convert(x);
        loaded_grad.slots[slot].convert(grad_y);
#pragma unroll
        for (int i = 0; i < Vectors::LENGTH; ++i) {
          const float centred = normalised.centred(x[i], i);
          const float g = normalised.gradient(normalised.before_activation(centred, i), grad_y[i]);
          gradients[i % CHANNELS] += g;
          products[i % CHANNELS] = fmaf(g, centred, products[i % CHANNELS]);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      sums.mine[c] += gradients[c];
      sums.mine[CHANNELS + c] += products[c];
    }
  }
  sums.finish(mine, partials);
}

template <class Vectors>
__global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS) backward(BatchNormReLUBackward a, Vectors vectors) {
  constexpr int CHANNELS = Vectors::CHANNELS;
  const Mine<Vectors> mine(vectors);
  const Normalised<Vectors> normalised(a, mine);
  float offset[CHANNELS], tilt[CHANNELS];
  mine.load_parameter(a.offset, offset);
  mine.load_parameter(a.tilt, tilt);
  for (TileWalk walk(vectors.tiling, blockIdx.y, gridDim.y); walk.there(); walk.next()) {
    const Span span = walk.span_from_end();
    const auto loaded_x = mine.template load<Reuse::none>(a.x, span);
    const auto loaded_grad = mine.template load<Reuse::none>(a.grad_y, span);
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
      float x[Vectors::LENGTH], grad[Vectors::LENGTH];
      loaded_x.slots[slot].convert(x);
      loaded_grad.slots[slot].convert(grad);
#pragma unroll
      for (int i = 0; i < Vectors::LENGTH; ++i) {
        const float centred = normalised.centred(x[i], i);
        const float g = normalised.gradient(normalised.before_activation(centred, i), grad[i]);
        grad[i] = normalised.scale[i % CHANNELS] * (g - offset[i % CHANNELS] - tilt[i % CHANNELS] * centred);
      }
      mine.store(a.grad_x, span, slot, grad);
    }
  }
}

template <class T, class Run, class... Tensors>
void with_vectors_of(const Run& run, const Voxels& x, const Tensors&... others) {
  constexpr int length = VECTOR_BYTES / sizeof(T);
  const auto aligned = [](const Voxels& of) { return reinterpret_cast<uintptr_t>(of.data) % VECTOR_BYTES == 0; };
  const int64_t row = has_adjacent_channels(x) ? x.channels : x.voxels;
  if (row % length != 0 || !(aligned(x) && ... && aligned(others))) return run(DenseVectors<T, 1, 1>(joined(x)));
  if (has_adjacent_channels(x)) return run(DenseVectors<T, length, length>(joined(x)));
  run(DenseVectors<T, length, 1>(joined(x)));
}

// Runs run(vectors) with the widest vectors that all of these tensors can be read in.
template <class Run, class... Tensors>
void with_vectors(const Run& run, const Voxels& x, const Tensors&... others) {
  switch (x.type) {
    case DataType::bfloat16: return with_vectors_of<__nv_bfloat16>(run, x, others...);
    case DataType::float16: return with_vectors_of<__half>(run, x, others...);
    default: return with_vectors_of<float>(run, x, others...);
  }
}

// The partial sums of a kernel, and total [2, C]; launches nothing without a workspace.
template <class Operation, class Vectors>
void launch_sums(void (*kernel)(Operation, Vectors, Partials), const Operation& a, const Vectors& vectors,
                 Arena& workspace, double* total, const Device& device) {
  const int64_t shared = ChannelSums<Vectors>::SHARED_BYTES, count = 2 * vectors.channels;
  const dim3 grid =
      vectors.grid(blocks_with_sums(kernel, shared, vectors.tiling.tiles * vectors.groups, count, device));
  const Partials partials(workspace, count, int(grid.y));
  if (device.workspace == nullptr) return;
  launch(kernel, grid, dim3(THREADS), shared, device.stream, a, vectors, partials);
  launch_add_partials(partials, total, device);
}

template <class Operation, class Vectors>
void launch_without_sums(void (*kernel)(Operation, Vectors), const Operation& a, const Vectors& vectors,
                         const Device& device) {
  const int blocks = blocks_without_sums(vectors.tiling.tiles * vectors.groups, device);
  launch(kernel, vectors.grid(blocks), dim3(THREADS), 0, device.stream, a, vectors);
}

template <class Operation>
int64_t launch_channels(const Operation& a, const Device& device) {
  if (device.workspace == nullptr) return 0;
  launch(compute_channels<Operation>, dim3(unsigned(ceil_div(a.channels, THREADS))), dim3(THREADS), 0, device.stream, a);
  return 0;
}

}  // namespace

int64_t batch_norm_relu_statistics(const BatchNormReLUStatistics& a, const Device& device) {
  Arena workspace{static_cast<char*>(device.workspace)};
  const int64_t C = a.x.channels;
  double* total = workspace.take<double>(2 * C);
  with_vectors([&](const auto& vectors) {
    using Chosen = std::decay_t<decltype(vectors)>;
    launch_sums(statistics<Chosen>, a, vectors, workspace, total, device);
  }, a.x);
  if (device.workspace == nullptr) return workspace.bytes;
  launch(moments, dim3(blocks_without_sums(ceil_div(C, THREADS), device)), dim3(THREADS), 0, device.stream, a, total);
  return workspace.bytes;
}

int64_t batch_norm_relu_parameters(const BatchNormReLUParameters& a, const Device& device) {
  return launch_channels(a, device);
}

int64_t batch_norm_relu_forward(const BatchNormReLUForward& a, const Device& device) {
  if (device.workspace == nullptr) return 0;
  with_vectors([&](const auto& vectors) {
    using Chosen = std::decay_t<decltype(vectors)>;
    launch_without_sums(forward<Chosen>, a, vectors, device);
  }, a.x, a.y);
  return 0;
}

int64_t batch_norm_relu_sums(const BatchNormReLUSums& a, const Device& device) {
  Arena workspace{static_cast<char*>(device.workspace)};
  with_vectors([&](const auto& vectors) {
    using Chosen = std::decay_t<decltype(vectors)>;
    launch_sums(sum_gradients<Chosen>, a, vectors, workspace, a.sums, device);
  }, a.x, a.grad_y);
  return workspace.bytes;
}

int64_t batch_norm_relu_correction(const BatchNormReLUCorrection& a, const Device& device) {
  return launch_channels(a, device);
}

int64_t batch_norm_relu_backward(const BatchNormReLUBackward& a, const Device& device) {
  if (device.workspace == nullptr) return 0;
  with_vectors([&](const auto& vectors) {
    using Chosen = std::decay_t<decltype(vectors)>;
    launch_without_sums(backward<Chosen>, a, vectors, device);
  }, a.x, a.grad_y, a.grad_x);
  return 0;
}

}  // namespace semiseg::cuda
