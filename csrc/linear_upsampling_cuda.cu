// Along every axis  y[2 i] = 1/4 x[i - 1] + 3/4 x[i],  y[2 i + 1] = 3/4 x[i] + 1/4 x[i + 1],  with ends repeated.
//
// Between two neighbours of x lie two of y, so that a cell between neighbours along every axis is read once and written
// once. Backward gathers, for every element of x, the four of y along every axis that it has a part in.
#include "device_voxels.cuh"
#include "kernels.cuh"

namespace semiseg::cuda {

namespace {

constexpr float NEAR = 0.75f, FAR = 0.25f;
constexpr int UPSAMPLING_BLOCKS = 5;

// An axis of x, and where its cells lie: cell q between x[q - 1] and x[q].
struct Axis {
  int side;
  bool doubled;

  __host__ __device__ int cells() const { return doubled ? side + 1 : side; }
  __host__ __device__ int wide_side() const { return doubled ? 2 * side : side; }
  // Of its two neighbours, and of its two results, -1 for none.
  __device__ __forceinline__ int neighbour(int cell, int which) const {
    if (!doubled) return cell;
    return which == 0 ? (cell == 0 ? 0 : cell - 1) : (cell == side ? side - 1 : cell);
  }
  __device__ __forceinline__ int result(int cell, int which) const {
    if (!doubled) return which == 0 ? cell : -1;
    return which == 0 ? 2 * cell - 1 : (cell == side ? -1 : 2 * cell);
  }
  // Of the results that x[i] has a part in: the index, -1 for none, and the part.
  __device__ __forceinline__ int tap(int i, int which) const {
    if (!doubled) return which == 0 ? i : -1;
    const int j = 2 * i - 1 + which;
    return j < 2 * side ? j : -1;
  }
  __device__ __forceinline__ float part(int j, int which) const {
    if (!doubled || j == 0 || j == 2 * side - 1) return 1;
    return which == 1 || which == 2 ? NEAR : FAR;
  }
};

struct Grid {
  Axis depth, height, width;

  explicit Grid(const LinearUpsampling& a)
      : depth{int(a.depth), a.volumes}, height{int(a.height), true}, width{int(a.width), true} {}
};

// COUNT voxels, 0 where their number is below 0. CHANNELS is 4 where channels are adjacent, else 1; those beyond the last are
// 0. Neighbouring threads read the same elements, which the multiprocessor's own cache is to have for them.
template <int CHANNELS, int COUNT>
__device__ __forceinline__ void load(const Voxels& x, bool vectors, int64_t image, int channel,
                                     const int64_t (&voxels)[COUNT], float (&values)[COUNT][CHANNELS]) {
  with_float_type(x.type, [&](auto zero) {
    using T = decltype(zero);
    const T* p = element<const T>(x, image, channel, 0);
    if constexpr (CHANNELS == 4) {
      if (vectors) {
        Adjacent<4, T> four[COUNT] = {};
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
          if (voxels[i] >= 0) four[i].template load<Reuse::neighbours>(p + voxels[i] * x.voxel_stride);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) four[i].convert(values[i]);
        return;
      }
    }
    T elements[COUNT][CHANNELS];
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        elements[i][c] = zero;
        if (voxels[i] >= 0 && channel + c < x.channels)
          elements[i][c] = p[voxels[i] * x.voxel_stride + c * x.channel_stride];
      }
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) values[i][c] = to_float(elements[i][c]);
  });
}

template <int CHANNELS>
__device__ __forceinline__ void store(const Voxels& x, bool vectors, int64_t image, int channel, int64_t voxel,
                                      const float (&values)[CHANNELS]) {
  with_float_type(x.type, [&](auto zero) {
    using T = decltype(zero);
    T* p = element<T>(x, image, channel, voxel);
    if constexpr (CHANNELS == 4) {
      if (vectors) return store_adjacent(p, values);
    }
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i)
      if (channel + i < x.channels) p[i * x.channel_stride] = from_float<T>(values[i]);
  });
}

// A thread's place: a row of cells or voxels and, along it, a column and the first of CHANNELS channels, which lie side by
// side in memory for neighbouring threads.
template <int CHANNELS>
struct Place {
  int row, column, channel;
  bool exists;

  __device__ Place(int rows, int columns, int channels) {
    const int groups = ceil_div(channels, CHANNELS);
    const int64_t i = blockIdx.x * int64_t(THREADS) + threadIdx.x;
    const int along = CHANNELS > 1 ? columns * groups : columns;
    row = int(i / along);
    const int rest = int(i - int64_t(row) * along);
    column = CHANNELS > 1 ? rest / groups : rest;
    channel = CHANNELS > 1 ? rest % groups * CHANNELS : int(blockIdx.z);
    exists = row < rows;
  }
};

// Planes of cells (y of the grid), their rows and columns (x), and channels that are not adjacent (z).
template <int CHANNELS>
__global__ void __launch_bounds__(THREADS, UPSAMPLING_BLOCKS) forward(LinearUpsampling a, Grid grid, int64_t planes, bool vectors) {
  const Place<CHANNELS> place(grid.height.cells(), grid.width.cells(), int(a.x.channels));
  if (!place.exists) return;
  for (int64_t plane = blockIdx.y; plane < planes; plane += gridDim.y) {
    const int64_t image = plane / grid.depth.cells();
    const int layer = int(plane - image * grid.depth.cells());
    float values[8][CHANNELS];
    int64_t corners[8];
#pragma unroll
    for (int corner = 0; corner < 8; ++corner) {
      const int64_t i = grid.depth.neighbour(layer, corner >> 2), j = grid.height.neighbour(place.row, corner >> 1 & 1);
      const int64_t voxel = (i * a.height + j) * a.width + grid.width.neighbour(place.column, corner & 1);
      corners[corner] = corner >= 4 && !a.volumes ? -1 : voxel;
    }
    load(a.x, vectors, image, place.channel, corners, values);
#pragma unroll
    for (int bit = 1; bit <= 4; bit *= 2) {
      if (bit == 4 && !a.volumes) continue;
#pragma unroll
      for (int corner = 0; corner < 8; ++corner) {
        if (corner & bit || (corner >= 4 && !a.volumes)) continue;
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
          const float first = values[corner][c], second = values[corner | bit][c];
          values[corner][c] = fmaf(FAR, second, NEAR * first);
          values[corner | bit][c] = fmaf(FAR, first, NEAR * second);
        }
      }
    }
#pragma unroll
    for (int corner = 0; corner < 8; ++corner) {
      if (corner >= 4 && !a.volumes) continue;
      const int64_t i = grid.depth.result(layer, corner >> 2), j = grid.height.result(place.row, corner >> 1 & 1);
      const int64_t k = grid.width.result(place.column, corner & 1);
      if (i < 0 || j < 0 || k < 0) continue;
      const int64_t voxel = (i * grid.height.wide_side() + j) * grid.width.wide_side() + k;
      store(a.y, vectors, image, place.channel, voxel, values[corner]);
    }
  }
}

// Planes of x (y of the grid), their rows and columns (x), and channels that are not adjacent (z).
template <int CHANNELS>
__global__ void __launch_bounds__(THREADS, UPSAMPLING_BLOCKS) backward(LinearUpsampling a, Grid grid, int64_t planes, bool vectors) {
  const Place<CHANNELS> place(grid.height.side, grid.width.side, int(a.x.channels));
  if (!place.exists) return;
  for (int64_t plane = blockIdx.y; plane < planes; plane += gridDim.y) {
    const int64_t image = plane / grid.depth.side;
    const int layer = int(plane - image * grid.depth.side);
    float sum[CHANNELS] = {};
    for (int deep = 0; deep < 4; ++deep) {
      const int64_t i = grid.depth.tap(layer, deep);
      if (i < 0) continue;
      for (int high = 0; high < 4; ++high) {
        const int64_t j = grid.height.tap(place.row, high);
        if (j < 0) continue;
        const float part = grid.depth.part(int(i), deep) * grid.height.part(int(j), high);
        const int64_t line = (i * grid.height.wide_side() + j) * grid.width.wide_side();
        float values[4][CHANNELS];
        int64_t taps[4];
#pragma unroll
        for (int wide = 0; wide < 4; ++wide) {
          const int k = grid.width.tap(place.column, wide);
          taps[wide] = k < 0 ? -1 : line + k;
        }
        load(a.y, vectors, image, place.channel, taps, values);
#pragma unroll
        for (int wide = 0; wide < 4; ++wide) {
          const float weight = part * grid.width.part(grid.width.tap(place.column, wide), wide);
#pragma unroll
          for (int c = 0; c < CHANNELS; ++c) sum[c] = fmaf(weight, values[wide][c], sum[c]);
        }
      }
    }
    store(a.x, vectors, image, place.channel, (int64_t(layer) * a.height + place.row) * a.width + place.column, sum);
  }
}

// kernel(operation, grid, planes, vectors), for four adjacent channels or for one.
struct UpsamplingKernels {
  void (*of_four)(LinearUpsampling, Grid, int64_t, bool);
  void (*of_one)(LinearUpsampling, Grid, int64_t, bool);
};

// On `layers` planes of an image, of `rows` rows and `columns` columns.
void launch_on(const UpsamplingKernels& kernels, const LinearUpsampling& a, int layers, int rows, int columns,
               const Device& device) {
  constexpr int64_t most_planes = 65535;
  const int64_t planes = a.x.batch * layers;
  if (planes == 0 || a.x.voxels == 0) return;
  const bool adjacent = a.x.voxel_stride != 1 && a.x.channel_stride == 1;
  const bool vectors = a.x.aligned_points && a.y.aligned_points && a.x.channels % 4 == 0;
  const int64_t groups = adjacent ? ceil_div(a.x.channels, 4) : 1;
  const int64_t blocks = ceil_div(int64_t(rows) * columns * groups, THREADS);
  const dim3 grid(unsigned(blocks), unsigned(planes < most_planes ? planes : most_planes),
                  adjacent ? 1 : unsigned(a.x.channels));
  launch(adjacent ? kernels.of_four : kernels.of_one, grid, dim3(THREADS), 0, device.stream, a, Grid(a), planes, vectors);
}

}  // namespace

int64_t linear_upsampling_forward(const LinearUpsampling& a, const Device& device) {
  if (device.workspace == nullptr) return 0;
  const Grid grid(a);
  launch_on(UpsamplingKernels{forward<4>, forward<1>}, a, grid.depth.cells(), grid.height.cells(), grid.width.cells(),
            device);
  return 0;
}

int64_t linear_upsampling_backward(const LinearUpsampling& a, const Device& device) {
  if (device.workspace == nullptr) return 0;
  launch_on(UpsamplingKernels{backward<4>, backward<1>}, a, int(a.depth), int(a.height), int(a.width), device);
  return 0;
}

}  // namespace semiseg::cuda
