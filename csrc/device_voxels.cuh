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

// Tiles are counted in 32 bits: no GPU has memory for more.
struct Tiling {
  int64_t voxels, tiles;
  int images, tiles_per_image, length;

  __host__ __device__ Tiling(const Voxels& x, int length)
      : voxels(x.voxels), images(x.voxels > 0 ? int(x.batch) : 0),
        tiles_per_image(x.voxels > 0 ? int(ceil_div(x.voxels, length)) : 1), length(length) {
    tiles = int64_t(images) * tiles_per_image;
  }
};

// Every step-th tile from the first on. Only the first is found by division, which a tile's loads would have to wait for.
struct TileWalk {
  const Tiling& tiling;
  int image, tile, image_step, tile_step;

  __device__ TileWalk(const Tiling& tiling, int first, int step)
      : tiling(tiling), image(first / tiling.tiles_per_image), tile(first - image * tiling.tiles_per_image),
        image_step(step / tiling.tiles_per_image), tile_step(step - image_step * tiling.tiles_per_image) {}

  __device__ __forceinline__ bool there() const { return image < tiling.images; }

  __device__ __forceinline__ void next() {
    image += image_step;
    tile += tile_step;
    if (tile < tiling.tiles_per_image) return;
    tile -= tiling.tiles_per_image;
    ++image;
  }

  // Where it goes next.
  __device__ __forceinline__ TileWalk after() const {
    TileWalk walk = *this;
    walk.next();
    return walk;
  }

  __device__ __forceinline__ Span span() const { return span_of(image, tile); }
  // As if the tiles were counted from the last one.
  __device__ __forceinline__ Span span_from_end() const {
    return span_of(tiling.images - 1 - image, tiling.tiles_per_image - 1 - tile);
  }

 private:
  __device__ __forceinline__ Span span_of(int of_image, int number) const {
    const int64_t first = int64_t(number) * tiling.length, left = tiling.voxels - first;
    return {of_image, first, left < tiling.length ? int(left) : tiling.length};
  }
};

// Runs run(i) for every i below `count` in some thread of the grid, numbered in the type of `count`.
template <class Count, class Run>
__device__ __forceinline__ void for_grid(Count count, const Run& run) {
  for (Count i = Count(blockIdx.x) * THREADS + Count(threadIdx.x); i < count; i += Count(gridDim.x) * THREADS) run(i);
}

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

// Of anything, as an unsigned number of the same size.
template <class Run>
__device__ __forceinline__ void with_bits_of(DataType type, const Run& run) {
  switch (type) {
    case DataType::bool8: case DataType::uint8: case DataType::int8: return run(uint8_t{});
    case DataType::bfloat16: case DataType::float16: case DataType::uint16: case DataType::int16: return run(uint16_t{});
    case DataType::uint64: case DataType::int64: return run(uint64_t{});
    default: return run(uint32_t{});
  }
}

template <class T>
__device__ __forceinline__ T* element(const Voxels& x, int64_t image, int64_t channel, int64_t voxel) {
  return static_cast<T*>(x.data) + image * x.batch_stride + channel * x.channel_stride + voxel * x.voxel_stride;
}

// Who reads again what is in memory: nobody, as most operations read and write every voxel once; the kernel that comes next,
// from the cache of all multiprocessors; or neighbouring threads, from the multiprocessor's own.
enum class Reuse { none, next_kernel, neighbours };

// Adjacent elements travel as one vector.
template <int BYTES>
using Vector =
    std::conditional_t<BYTES == 16, uint4,
                       std::conditional_t<BYTES == 8, uint2, std::conditional_t<BYTES == 4, unsigned, unsigned short>>>;

// N adjacent elements as they lie in memory. A load and its conversion are two steps: all loads are to be on their way before
// the first conversion, which has to wait, and which the compiler does not move out of the branch that the load is in.
template <int N, class T>
struct Adjacent {
  Vector<N * sizeof(T)> bits;

  template <Reuse REUSE = Reuse::none>
  __device__ __forceinline__ void load(const T* p) {
    const auto* vector = reinterpret_cast<const Vector<N * sizeof(T)>*>(p);
    if constexpr (REUSE == Reuse::neighbours) bits = *vector;
    else bits = REUSE == Reuse::next_kernel ? __ldcg(vector) : __ldcs(vector);
  }

  __device__ __forceinline__ void convert(float (&x)[N]) const {
    T elements[N];
    memcpy(elements, &bits, sizeof bits);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = to_float(elements[i]);
  }
};

template <Reuse REUSE = Reuse::none, int N, class T>
__device__ __forceinline__ void store_adjacent(T* p, const float (&x)[N]) {
  using Bits = Vector<N * sizeof(T)>;
  T elements[N];
#pragma unroll
  for (int i = 0; i < N; ++i) elements[i] = from_float<T>(x[i]);
  Bits bits;
  memcpy(&bits, elements, sizeof bits);
  Bits* vector = reinterpret_cast<Bits*>(p);
  if constexpr (REUSE == Reuse::next_kernel) __stcg(vector, bits);
  else __stcs(vector, bits);
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
  const bool rows = mine.adjacent && source.aligned_rows && mine.all_inside(span);
  with_float_type(source.type, [&](auto zero) {
    using T = decltype(zero);
    const T* p = element<const T>(source, span.image, channel, span.first);
    if (rows) {
      Adjacent<SLOTS, T> row[CHANNELS];
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) row[c].load(p + c * source.channel_stride + mine.offset(0));
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) row[c].convert(x[c]);
      return;
    }
    if constexpr (CHANNELS % 4 == 0) {
      if (source.aligned_points) {
        Adjacent<4, T> point[SLOTS][CHANNELS / 4] = {};
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot)
#pragma unroll
          for (int c = 0; c < CHANNELS; c += 4)
            if (mine.offset(slot) < span.n) point[slot][c / 4].load(p + mine.offset(slot) * source.voxel_stride + c);
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot)
#pragma unroll
          for (int c = 0; c < CHANNELS; c += 4) {
            float four[4];
            point[slot][c / 4].convert(four);
#pragma unroll
            for (int i = 0; i < 4; ++i) x[c + i][slot] = four[i];
          }
        return;
      }
    }
    T elements[CHANNELS][SLOTS];
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
      for (int slot = 0; slot < SLOTS; ++slot) {
        elements[c][slot] = zero;
        if (mine.offset(slot) < span.n)
          elements[c][slot] = p[c * source.channel_stride + mine.offset(slot) * source.voxel_stride];
      }
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
      for (int slot = 0; slot < SLOTS; ++slot) x[c][slot] = to_float(elements[c][slot]);
  });
}

template <int CHANNELS, int SLOTS, int SHARERS>
__device__ __forceinline__ void store_voxels(const Voxels& target, const Span& span,
                                             const ThreadVoxels<SLOTS, SHARERS>& mine,
                                             const float (&x)[CHANNELS][SLOTS], int64_t channel = 0) {
  const bool rows = mine.adjacent && target.aligned_rows && mine.all_inside(span);
  const bool points = CHANNELS % 4 == 0 && target.aligned_points;
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

// The i-th of the elements that lie in these words. By shifts: the compiler would take copies apart, byte by byte.
template <class T>
__device__ __forceinline__ T element_of(const uint32_t* words, int i) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, std::conditional_t<sizeof(T) == 2, uint16_t, uint8_t>>;
  constexpr int of_word = 4 / sizeof(T);
  const auto bits = Bits(words[i / of_word] >> i % of_word * 32 / of_word);
  T element;
  memcpy(&element, &bits, sizeof bits);
  return element;
}

// A map of labels, regions or weights at N voxels of a tile, on its way from memory: who reads the numbers waits for them.
template <int N>
struct MapValues {
  DataType type;
  bool present, inside[N];
  uint32_t bits[N] = {};  // as they lie in memory; of 64 bits, ones where 32 do not hold the number

  MapValues() = default;

  template <class Offset>
  __device__ __forceinline__ MapValues(const Voxels& map, const Span& span, const Offset& offset, int64_t channel = 0)
      : type(map.type), present(map.present) {
#pragma unroll
    for (int i = 0; i < N; ++i) inside[i] = offset(i) < span.n;
    if (!present) return;
    if (map.packed_bytes) {  // most maps are
      const uint8_t* p = static_cast<const uint8_t*>(map.data) + (span.image * map.voxels + span.first);
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (inside[i]) bits[i] = p[offset(i)];
      return;
    }
    with_bits_of(type, [&](auto zero) {
      using T = decltype(zero);
      const T* p = element<const T>(map, span.image, channel, span.first);
      std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t> loaded[N] = {};
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (inside[i]) loaded[i] = p[offset(i) * map.voxel_stride];
#pragma unroll
      for (int i = 0; i < N; ++i) bits[i] = loaded[i] > UINT32_MAX ? UINT32_MAX : uint32_t(loaded[i]);
    });
  }

  // A label or region below `limit`; -1 where it is negative or out of range. An absent map is 0 everywhere.
  __device__ __forceinline__ int label(int i, int limit) const {
    if (!inside[i]) return -1;
    // A negative number has the sign of its type as a digit.
    const uint32_t most = type == DataType::int8 ? 1u << 7 : type == DataType::int16 ? 1u << 15 : 1u << 31;
    return bits[i] < (uint32_t(limit) < most ? uint32_t(limit) : most) ? int(bits[i]) : -1;
  }

  // An absent weight is 1 everywhere.
  __device__ __forceinline__ float weight(int i) const {
    if (!inside[i]) return 0;
    if (!present) return 1;
    float value = 0;
    with_weight_type(type, [&](auto zero) { value = to_float(element_of<decltype(zero)>(bits + i, 0)); });
    return value;
  }
};

__device__ __forceinline__ int load_label(const Voxels& x, int64_t image, int64_t voxel, int limit) {
  return MapValues<1>(x, {image, voxel, 1}, [](int) { return 0; }).label(0, limit);
}

__device__ __forceinline__ float load_weight(const Voxels& x, int64_t image, int64_t voxel) {
  return MapValues<1>(x, {image, voxel, 1}, [](int) { return 0; }).weight(0);
}

}  // namespace semiseg
