// Tiles of voxels and some of their channels, from memory to shared memory or to registers.
#pragma once

#include "device_voxels.cuh"

namespace semiseg {

// By their components, see element_of.
__device__ __forceinline__ void to_words(const uint4& x, uint32_t* words) {
  words[0] = x.x, words[1] = x.y, words[2] = x.z, words[3] = x.w;
}
__device__ __forceinline__ void to_words(const uint2& x, uint32_t* words) { words[0] = x.x, words[1] = x.y; }
__device__ __forceinline__ void to_words(unsigned x, uint32_t* words) { words[0] = x; }

// x[first + i, v] of a tile for ROWS i, 0 beyond the ends: on its way from memory, then in shared memory. A thread has
// vectors of four adjacent elements where there are such, else as many elements.
template <int ROWS, int VOXELS>
struct Rows {
  static constexpr int PITCH = VOXELS + 4;  // of the rows in shared memory; keeps vectors aligned
  static constexpr int ELEMENTS = ROWS * VOXELS / THREADS;
  static_assert(ROWS % 4 == 0 && VOXELS <= THREADS && ELEMENTS % 4 == 0);

  const Voxels& x;
  bool planar, vectors;
  int row, voxel, row_step, voxel_step;  // of the thread's first vector or element, and from each to the next
  uint32_t words[ELEMENTS];              // as they lie in memory; a vector has the room of four

  // Neighbouring threads read neighbouring elements.
  __device__ __forceinline__ void load(const Span& span, int64_t first) {
    const int64_t count = x.channels - first;
    planar = x.voxel_stride == 1;
    vectors = planar ? x.aligned_rows && span.n == VOXELS : x.aligned_points && x.channels % 4 == 0;
    const int width = vectors ? 4 : 1, along = (planar ? VOXELS : ROWS) / width, thread = int(threadIdx.x);
    const int near = thread % along * width, far = thread / along, step = THREADS / along;
    row = planar ? far : near, row_step = planar ? step : 0;
    voxel = planar ? near : far, voxel_step = planar ? 0 : step;
#pragma unroll
    for (uint32_t& word : words) word = 0;
    const int64_t stride = row_step * x.channel_stride + voxel_step * x.voxel_stride;
    const auto there = [&](int k) { return row + k * row_step < count && voxel + k * voxel_step < span.n; };
    with_bits_of(x.type, [&](auto zero) {
      using Bits = decltype(zero);
      if constexpr (sizeof(Bits) <= sizeof(uint32_t)) {
        const Bits* p = element<const Bits>(x, span.image, first + row, span.first + voxel);
        if (vectors) {
#pragma unroll
          for (int k = 0; k < ELEMENTS / 4; ++k) {
            Vector<4 * sizeof(Bits)> four{};
            if (there(k)) four = __ldcs(reinterpret_cast<const decltype(four)*>(p + k * stride));
            to_words(four, words + 4 * k);
          }
        } else {
#pragma unroll
          for (int k = 0; k < ELEMENTS; ++k)
            if (there(k)) words[k] = p[k * stride];
        }
      }
    });
  }

  __device__ __forceinline__ void store(float* rows) const {
    with_weight_type(x.type, [&](auto zero) {
      using T = decltype(zero);
      float* to = rows + row * PITCH + voxel;
      const int stride = row_step * PITCH + voxel_step;
      if (vectors) {
#pragma unroll
        for (int k = 0; k < ELEMENTS / 4; ++k) {
          float four[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) four[i] = to_float(element_of<T>(words + 4 * k, i));
          if (planar) {
            *reinterpret_cast<float4*>(to + k * stride) = make_float4(four[0], four[1], four[2], four[3]);
          } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) to[k * stride + i * PITCH] = four[i];
          }
        }
      } else {
#pragma unroll
        for (int k = 0; k < ELEMENTS; ++k) to[k * stride] = to_float(element_of<T>(words + k, 0));
      }
    });
  }
};

// All channels of a tile in shared memory, [channels rounded up, PITCH]: as many at a time as the threads have vectors of.
template <int VOXELS>
struct ChannelRows {
  static constexpr int AT_ONCE = 4 * THREADS / VOXELS, PITCH = Rows<AT_ONCE, VOXELS>::PITCH;

  static __host__ __device__ __forceinline__ int floats(int channels) {
    return round_up(channels, AT_ONCE) * PITCH;
  }

  // Waits until the block has done with what is there, and until all is there.
  static __device__ __forceinline__ void load(const Voxels& x, const Span& span, float* rows) {
    for (int64_t first = 0; first < x.channels; first += AT_ONCE) {
      Rows<AT_ONCE, VOXELS> some{x};
      some.load(span, first);
      if (first == 0) __syncthreads();
      some.store(rows + first * PITCH);
    }
    __syncthreads();
  }
};

// Four channels of four voxels of a tile, which a thread reads or writes.
struct Patch {
  int channel, voxel;  // the first ones
  float x[4][4] = {};

  __device__ __forceinline__ void add(const float4& of_channel, const float4& of_voxel) {
    const float left[4] = {of_channel.x, of_channel.y, of_channel.z, of_channel.w};
    const float right[4] = {of_voxel.x, of_voxel.y, of_voxel.z, of_voxel.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int v = 0; v < 4; ++v) x[i][v] = fmaf(left[i], right[v], x[i][v]);
  }

  // 0 beyond the ends.
  __device__ __forceinline__ void load(const Voxels& source, const Span& span, int64_t first_channel) {
    const int64_t channels = source.channels - first_channel - channel;
    const int voxels = span.n - voxel;
    with_float_type(source.type, [&](auto zero) {
      using T = decltype(zero);
      const T* p = element<const T>(source, span.image, first_channel + channel, span.first + voxel);
      if (source.aligned_rows && voxels >= 4) {
        Adjacent<4, T> row[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (i < channels) row[i].load(p + i * source.channel_stride);
#pragma unroll
        for (int i = 0; i < 4; ++i) row[i].convert(x[i]);
        return;
      }
      if (source.aligned_points && channels >= 4) {
        Adjacent<4, T> point[4] = {};
#pragma unroll
        for (int v = 0; v < 4; ++v)
          if (v < voxels) point[v].load(p + v * source.voxel_stride);
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          float four[4];
          point[v].convert(four);
#pragma unroll
          for (int i = 0; i < 4; ++i) x[i][v] = four[i];
        }
        return;
      }
      T elements[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          elements[i][v] = zero;
          if (i < channels && v < voxels) elements[i][v] = p[i * source.channel_stride + v * source.voxel_stride];
        }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int v = 0; v < 4; ++v) x[i][v] = to_float(elements[i][v]);
    });
  }

  __device__ __forceinline__ void store(const Voxels& target, const Span& span, int64_t first_channel) const {
    const int64_t channels = target.channels - first_channel - channel;
    const int voxels = span.n - voxel;
    with_float_type(target.type, [&](auto zero) {
      using T = decltype(zero);
      T* p = element<T>(target, span.image, first_channel + channel, span.first + voxel);
      if (target.aligned_rows && voxels >= 4) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (i < channels) store_adjacent(p + i * target.channel_stride, x[i]);
      } else if (target.aligned_points && channels >= 4) {
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

}  // namespace semiseg
