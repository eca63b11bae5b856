// Elements of voxels as float32 or int32, whatever their dtype and memory format; several at a time where they are
// adjacent and aligned.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

#include "device.cuh"

namespace semiseg {

// A tile: up to a few hundred consecutive voxels of one image.
struct Span {
  int64_t image, first;
  int n;
};

struct Tiling {
  int64_t voxels, tiles_per_image, tiles;
  int length;

  __host__ __device__ Tiling(const Voxels& x, int length)
      : voxels(x.voxels), tiles_per_image((x.voxels + length - 1) / length), tiles(x.batch * tiles_per_image),
        length(length) {}

  __device__ Span span(int64_t tile) const {
    const int64_t image = tile / tiles_per_image, first = (tile - image * tiles_per_image) * length;
    const int64_t left = voxels - first;
    return {image, first, left < length ? int(left) : length};
  }
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(uint8_t x) { return x; }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == sizeof(float)) return x;
  else if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  else return __float2bfloat16_rn(x);
}

template <class Run>
__device__ __forceinline__ void with_float_type(DataType type, const Run& run) {
  if (type == DataType::float32) run(float{});
  else if (type == DataType::bfloat16) run(__nv_bfloat16{});
  else run(__half{});
}

// Of a weight, too.
template <class Run>
__device__ __forceinline__ void with_weight_type(DataType type, const Run& run) {
  if (type == DataType::bool8 || type == DataType::uint8) run(uint8_t{});
  else with_float_type(type, run);
}

template <class T>
__device__ __forceinline__ T* element(const Voxels& x, int64_t image, int64_t channel, int64_t voxel) {
  return static_cast<T*>(x.data) + image * x.batch_stride + channel * x.channel_stride + voxel * x.voxel_stride;
}

// Adjacent elements travel as one vector, past the caches' reuse: most operations read and write every voxel once. KEPT:
// the cache of all multiprocessors has them for the kernel that comes next.
template <int BYTES>
using Vector =
    std::conditional_t<BYTES == 16, float4,
                       std::conditional_t<BYTES == 8, uint2, std::conditional_t<BYTES == 4, unsigned, unsigned short>>>;

template <bool KEPT = false, int N, class T>
__device__ __forceinline__ void load_adjacent(const T* p, float (&x)[N]) {
  using Bits = Vector<N * sizeof(T)>;
  const Bits* vector = reinterpret_cast<const Bits*>(p);
  const Bits bits = KEPT ? __ldcg(vector) : __ldcs(vector);
  T elements[N];
  memcpy(elements, &bits, sizeof bits);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = to_float(elements[i]);
}

template <bool KEPT = false, int N, class T>
__device__ __forceinline__ void store_adjacent(T* p, const float (&x)[N]) {
  using Bits = Vector<N * sizeof(T)>;
  T elements[N];
#pragma unroll
  for (int i = 0; i < N; ++i) elements[i] = from_float<T>(x[i]);
  Bits bits;
  memcpy(&bits, elements, sizeof bits);
  Bits* vector = reinterpret_cast<Bits*>(p);
  if constexpr (KEPT) __stcg(vector, bits);
  else __stcs(vector, bits);
}

// Do groups of four along the axis of stride 1 start at multiples of their size, in every row?
__host__ __device__ __forceinline__ bool fours_are_aligned(const Voxels& x, int64_t row_stride) {
  const uintptr_t bytes = x.type == DataType::float32 ? 16 : 8;
  return reinterpret_cast<uintptr_t>(x.data) % bytes == 0 && row_stride % 4 == 0 && x.batch_stride % 4 == 0;
}

__host__ __device__ __forceinline__ bool has_aligned_rows(const Voxels& x) {
  return x.voxel_stride == 1 && fours_are_aligned(x, x.channel_stride);
}

__host__ __device__ __forceinline__ bool has_aligned_points(const Voxels& x) {
  return x.voxel_stride != 1 && x.channel_stride == 1 && fours_are_aligned(x, x.voxel_stride);
}

// A thread's voxels of a tile: adjacent where they are read as vectors, else SHARERS apart, so that neighbouring
// threads read neighbouring elements. SHARERS is a warp where each warp has all of the tile's voxels.
template <int SLOTS, int SHARERS = THREADS>
struct ThreadVoxels {
  static constexpr int LENGTH = SLOTS * SHARERS;  // of the tile
  bool adjacent;

  __device__ __forceinline__ int offset(int slot) const {
    const int thread = int(threadIdx.x) % SHARERS;
    return adjacent ? thread * SLOTS + slot : thread + slot * SHARERS;
  }
  __device__ __forceinline__ bool all_inside(const Span& span) const { return offset(SLOTS - 1) < span.n; }
};

// x[c][slot] of the channels from `channel` on, a multiple of 4 where CHANNELS is one; 0 beyond the tile's end.
template <int CHANNELS, int SLOTS, int SHARERS>
__device__ __forceinline__ void load_voxels(const Voxels& source, const Span& span,
                                            const ThreadVoxels<SLOTS, SHARERS>& mine, float (&x)[CHANNELS][SLOTS],
                                            int64_t channel = 0) {
  const bool rows = mine.adjacent && has_aligned_rows(source) && mine.all_inside(span);
  const bool points = CHANNELS % 4 == 0 && has_aligned_points(source);
  with_float_type(source.type, [&](auto zero) {
    using T = decltype(zero);
    const T* p = element<const T>(source, span.image, channel, span.first);
    if (rows) {
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) load_adjacent(p + c * source.channel_stride + mine.offset(0), x[c]);
      return;
    }
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
      const T* voxel = p + mine.offset(slot) * source.voxel_stride;
      const bool inside = mine.offset(slot) < span.n;
      if (points) {
#pragma unroll
        for (int c = 0; c < CHANNELS / 4 * 4; c += 4) {
          float four[4] = {};
          if (inside) load_adjacent(voxel + c, four);
#pragma unroll
          for (int i = 0; i < 4; ++i) x[c + i][slot] = four[i];
        }
      } else {
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) x[c][slot] = inside ? to_float(voxel[c * source.channel_stride]) : 0.f;
      }
    }
  });
}

template <int CHANNELS, int SLOTS, int SHARERS>
__device__ __forceinline__ void store_voxels(const Voxels& target, const Span& span,
                                             const ThreadVoxels<SLOTS, SHARERS>& mine,
                                             const float (&x)[CHANNELS][SLOTS], int64_t channel = 0) {
  const bool rows = mine.adjacent && has_aligned_rows(target) && mine.all_inside(span);
  const bool points = CHANNELS % 4 == 0 && has_aligned_points(target);
  with_float_type(target.type, [&](auto zero) {
    using T = decltype(zero);
    T* p = element<T>(target, span.image, channel, span.first);
    if (rows) {
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) store_adjacent(p + c * target.channel_stride + mine.offset(0), x[c]);
      return;
    }
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
      T* voxel = p + mine.offset(slot) * target.voxel_stride;
      if (mine.offset(slot) >= span.n) continue;
      if (points) {
#pragma unroll
        for (int c = 0; c < CHANNELS / 4 * 4; c += 4) {
          const float four[4] = {x[c][slot], x[c + 1][slot], x[c + 2][slot], x[c + 3][slot]};
          store_adjacent(voxel + c, four);
        }
      } else {
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) voxel[c * target.channel_stride] = from_float<T>(x[c][slot]);
      }
    }
  });
}

__device__ __forceinline__ float load_float(const Voxels& x, int64_t image, int64_t channel, int64_t voxel) {
  float value = 0;
  with_float_type(x.type, [&](auto zero) {
    value = to_float(*element<const decltype(zero)>(x, image, channel, voxel));
  });
  return value;
}

__device__ __forceinline__ void store_float(const Voxels& x, int64_t image, int64_t channel, int64_t voxel,
                                            float value) {
  with_float_type(x.type, [&](auto zero) {
    using T = decltype(zero);
    *element<T>(x, image, channel, voxel) = from_float<T>(value);
  });
}

// Runs run(channel, voxel) for every element of a tile; neighbouring threads have neighbouring elements in memory.
template <int VOXELS, class Run>
__device__ __forceinline__ void for_elements(const Voxels& x, const Run& run) {
  const bool planar = x.voxel_stride == 1;
  const int channels = int(x.channels);
  for (int e = threadIdx.x; e < channels * VOXELS; e += THREADS)
    run(planar ? e / VOXELS : e % channels, planar ? e % VOXELS : e / channels);
}

// Winners: uint8 or int16.
__device__ __forceinline__ int load_index(const Voxels& x, int64_t image, int64_t channel, int64_t voxel) {
  if (x.type == DataType::uint8) return *element<const uint8_t>(x, image, channel, voxel);
  return *element<const int16_t>(x, image, channel, voxel);
}

__device__ __forceinline__ void store_index(const Voxels& x, int64_t image, int64_t channel, int64_t voxel,
                                            int value) {
  if (x.type == DataType::uint8) *element<uint8_t>(x, image, channel, voxel) = uint8_t(value);
  else *element<int16_t>(x, image, channel, voxel) = int16_t(value);
}

// A label or region below `limit`; -1 where it is negative or out of range. An absent map is 0 everywhere.
__device__ __forceinline__ int load_label(const Voxels& x, int64_t image, int64_t voxel, int limit) {
  if (!x.present) return 0;
  const auto in_range = [&](auto zero) {
    // A negative value is a large one once its sign is read as a digit.
    const auto value = uint64_t(*element<const decltype(zero)>(x, image, 0, voxel));
    return value < uint64_t(limit) ? int(value) : -1;
  };
  switch (x.type) {
    case DataType::int8: return in_range(int8_t{});
    case DataType::int16: return in_range(int16_t{});
    case DataType::uint16: return in_range(uint16_t{});
    case DataType::int32: return in_range(int32_t{});
    case DataType::uint32: return in_range(uint32_t{});
    case DataType::int64: return in_range(int64_t{});
    case DataType::uint64: return in_range(uint64_t{});
    default: return in_range(uint8_t{});
  }
}

// An absent weight is 1 everywhere.
__device__ __forceinline__ float load_weight(const Voxels& x, int64_t image, int64_t voxel) {
  if (!x.present) return 1;
  if (x.type == DataType::bool8 || x.type == DataType::uint8) return *element<const uint8_t>(x, image, 0, voxel);
  return load_float(x, image, 0, voxel);
}

}  // namespace semiseg
