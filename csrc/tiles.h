// Tiles: a few hundred voxels of one image as float32 rows [channels, pitch], whatever their dtype and memory format.
//
// Tiles are grouped into chunks whose boundaries depend on sizes alone. A thread works on whole chunks and every chunk
// leaves its own float64 partial sums, added in order at the end: any number of threads gives the same result.
#pragma once

#include <new>

#include "simd.h"

namespace semiseg::SEMISEG_LEVEL {

constexpr int64_t STEP = 2 * WIDTH;  // rows are padded to a multiple of it

constexpr int64_t FETCHED_AHEAD = 8 << 10;  // bytes of channels-last voxels, while others are read

enum class Fill { zeros, nothing };

// Memory aligned to a cache line, zeroed unless told otherwise; std::bad_alloc where there is none.
template <class T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t n, Fill fill = Fill::zeros) {
    const int64_t bytes = round_up(maximum(n, int64_t(1)) * int64_t(sizeof(T)), 64);
    data = static_cast<T*>(::operator new(bytes, LINE));
    if (fill == Fill::zeros) memset(data, 0, bytes);
  }
  ~Buffer() { ::operator delete(data, LINE); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data; }

 private:
  static constexpr std::align_val_t LINE{64};
};

// No exception may leave a parallel region: that memory has run out is remembered, and thrown behind the region.
class OutOfMemory {
 public:
  void set() {
#pragma omp atomic write
    happened_ = true;
  }
  void rethrow() const {
    if (happened_) throw std::bad_alloc();
  }

 private:
  bool happened_ = false;
};

// What one thread of a parallel region works with, where there is memory for it. All buffers are made here: a handler
// around the work itself would keep its state out of registers.
template <class T>
class OfThread {
 public:
  template <class Make>
  OfThread(OutOfMemory& out_of_memory, const Make& make) {
    try {
      new (&value_) T(make());
      made_ = true;
    } catch (const std::bad_alloc&) {
      out_of_memory.set();
    }
  }
  ~OfThread() {
    if (made_) value_.~T();
  }
  OfThread(const OfThread&) = delete;
  OfThread& operator=(const OfThread&) = delete;

  explicit operator bool() const { return made_; }
  T& operator*() { return value_; }

 private:
  union {
    T value_;
  };
  bool made_ = false;
};

struct Span {  // the voxels of one tile
  int64_t image, first, n;
  int64_t padded;  // n rounded up to a multiple of STEP
};

struct Tiling {
  static constexpr int64_t SHORTEST = 64, LONGEST = 256;
  static constexpr int64_t FLOATS = 8192;            // a tile's rows together stay within the first-level cache
  static constexpr int64_t MOST_CHUNKS = 256;
  static constexpr int64_t PARTIAL_BYTES = 1 << 19;  // of all chunks together, where eight chunks need no more

  int64_t batch, voxels, length, pitch, tiles_per_image, tiles, tiles_per_chunk, chunks;

  Tiling(int64_t batch, int64_t voxels, int64_t rows, int64_t partial_sums) : batch(batch), voxels(voxels) {
    length = LONGEST;
    while (length > SHORTEST && length * rows > FLOATS) length /= 2;
    pitch = length + 16;  // rows a power of two apart would share few cache sets
    tiles_per_image = ceil_div(voxels, length);
    tiles = batch * tiles_per_image;
    const int64_t affordable = PARTIAL_BYTES / (8 * (partial_sums + 1));
    const int64_t most = maximum(int64_t(8), minimum(MOST_CHUNKS, affordable));
    tiles_per_chunk = maximum(int64_t(1), ceil_div(tiles, most));
    chunks = ceil_div(tiles, tiles_per_chunk);
  }

  Span span(int64_t tile) const {
    const int64_t image = tile / tiles_per_image, first = (tile - image * tiles_per_image) * length;
    const int64_t n = minimum(length, voxels - first);
    return {image, first, n, round_up(n, STEP)};
  }

  // The tile after this one, if any: what to fetch meanwhile.
  Span next(int64_t tile) const { return tile + 1 < tiles ? span(tile + 1) : Span{}; }

  int64_t first_tile(int64_t chunk) const { return chunk * tiles_per_chunk; }
  int64_t last_tile(int64_t chunk) const { return minimum(tiles, (chunk + 1) * tiles_per_chunk); }
};

// Runs work(scratch, chunk) on every chunk.
template <class Scratch, class MakeScratch, class Work>
void for_chunks(int64_t chunks, int threads, const MakeScratch& make_scratch, const Work& work) {
  OutOfMemory out_of_memory;
#pragma omp parallel num_threads(threads)
  {
    OfThread<Scratch> scratch(out_of_memory, make_scratch);
#pragma omp for schedule(dynamic, 1)
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      if (scratch) work(*scratch, chunk);
  }
  out_of_memory.rethrow();
}

// Runs work(scratch, chunk, partial) on every chunk and adds the chunks' partial sums into total.
template <class Scratch, class MakeScratch, class Work>
void for_chunks(const Tiling& tiling, int threads, double* total, int64_t sums, const MakeScratch& make_scratch,
                const Work& work) {
  Buffer<double> partials(tiling.chunks * sums);
  for_chunks<Scratch>(tiling.chunks, threads, make_scratch, [&](Scratch& scratch, int64_t chunk) {
    work(scratch, chunk, partials + chunk * sums);
  });
  for (int64_t i = 0; i < sums; ++i) total[i] = 0;
  for (int64_t chunk = 0; chunk < tiling.chunks; ++chunk)
    for (int64_t i = 0; i < sums; ++i) total[i] += partials[chunk * sums + i];
}

template <class T>
INLINE T* address(const Voxels& x, const Span& span) {
  return static_cast<T*>(x.data) + span.image * x.batch_stride + span.first * x.voxel_stride;
}

// A vector of which only the first n elements are in memory; the others are 0.
template <class T>
INLINE vfloat load_first(const T* p, int64_t n) {
  T padded[WIDTH] = {};
  memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

template <class T>
INLINE void store_first(T* p, vfloat v, int64_t n) {
  T padded[WIDTH];
  store(padded, v);
  memcpy(p, padded, n * sizeof(T));
}

template <class T>
INLINE void load_row(const T* p, const Span& span, float* row) {
  int64_t v = 0;
  for (; v + WIDTH <= span.n; v += WIDTH) store(row + v, load(p + v));
  for (; v < span.padded; v += WIDTH) store(row + v, load_first(p + v, maximum(int64_t(0), span.n - v)));
}

// to[c, v] <- from[v, c] of a vector of voxels and of channels. A function of its own: within a loop, its addresses would be
// computed before, and kept in memory.
template <class T>
__attribute__((noinline)) void load_block(const T* from, int64_t stride, int64_t ahead, float* to, int64_t pitch) {
  vfloat rows[WIDTH];
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; ++i, from += stride) {
    __builtin_prefetch(from + ahead);
    rows[i] = load(from);
  }
  transpose(rows);
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; ++i, to += pitch) store(to, rows[i]);
}

template <class T>
void load_tile(const Voxels& x, const Span& span, float* tile, int64_t pitch) {
  const T* p = address<const T>(x, span);
  if (x.voxel_stride == 1) {
    for (int64_t c = 0; c < x.channels; ++c) load_row(p + c * x.channel_stride, span, tile + c * pitch);
    return;
  }
  const int64_t ahead = maximum(FETCHED_AHEAD / int64_t(sizeof(T)), WIDTH * x.voxel_stride);
  for (int64_t v = 0; v < span.padded; v += WIDTH) {
    for (int64_t c = 0; c < x.channels; c += WIDTH) {
      const int64_t channels = minimum(WIDTH, x.channels - c), voxels = span.n - v;
      const T* from = p + v * x.voxel_stride + c;
      float* to = tile + c * pitch + v;
      if (channels == WIDTH && voxels >= WIDTH) {
        load_block(from, x.voxel_stride, ahead, to, pitch);
        continue;
      }
      vfloat rows[WIDTH];
      for (int i = 0; i < WIDTH; ++i)
        rows[i] = i < voxels ? load_first(from + i * x.voxel_stride, channels) : vfloat{};
      transpose(rows);
      for (int64_t i = 0; i < channels; ++i) store(to + i * pitch, rows[i]);
    }
  }
}

// Asks for the rows of the next tile, a few cache lines at a time, while the present one is worked on. Channels-last voxels,
// which lie behind each other, load_tile fetches itself.
struct Prefetch {
  static constexpr int64_t LINE = 64;

  const char* row = nullptr;
  int64_t rows = 0, row_stride = 0, row_bytes = 0, at = 0, lines_per_step = 0;

  Prefetch() = default;
  Prefetch(const Voxels& x, const Span& next, int64_t steps) {
    if (x.voxel_stride != 1) return;
    const int64_t bytes = bytes_per_element(x.type);
    row = static_cast<const char*>(x.data) + (next.image * x.batch_stride + next.first) * bytes;
    rows = x.channels;
    row_stride = x.channel_stride * bytes;
    row_bytes = next.n * bytes;
    lines_per_step = rows * (row_bytes / LINE + 1) / steps + 1;
  }

  INLINE void step() {
    for (int64_t i = 0; i < lines_per_step && rows > 0; ++i) {
      __builtin_prefetch(row + at, 0, 2);
      at += LINE;
      if (at >= row_bytes) {
        at = 0;
        row += row_stride;
        --rows;
      }
    }
  }
};

INLINE void load_tile(const Voxels& x, const Span& span, float* tile, int64_t pitch) {
  if (x.type == DataType::float32) return load_tile<float>(x, span, tile, pitch);
  if (x.type == DataType::bfloat16) return load_tile<bfloat16>(x, span, tile, pitch);
  if (x.type == DataType::float16) return load_tile<float16>(x, span, tile, pitch);
  load_tile<uint8_t>(x, span, tile, pitch);
}

INLINE bool streams(const Voxels& x) {
  return streams(x.data, x.batch * x.channels * x.voxels * bytes_per_element(x.type));
}

// to[v, c] <- from[c, v] of a vector of channels and of voxels
template <class T>
__attribute__((noinline)) void store_block(const float* from, int64_t pitch, T* to, int64_t stride, bool streaming) {
  vfloat rows[WIDTH];
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; ++i, from += pitch) rows[i] = load(from);
  transpose(rows);
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; ++i, to += stride) {
    if (streaming) stream(to, rows[i]);
    else store(to, rows[i]);
  }
}

template <class T>
void store_tile(const Voxels& x, const Span& span, const float* tile, int64_t pitch, bool streaming) {
  T* p = address<T>(x, span);
  if (x.voxel_stride == 1) {
    for (int64_t c = 0; c < x.channels; ++c) {
      T* row = p + c * x.channel_stride;
      const bool aligned = streaming && reinterpret_cast<uintptr_t>(row) % 64 == 0;
      int64_t v = 0;
      for (; aligned && v + WIDTH <= span.n; v += WIDTH) stream(row + v, load(tile + c * pitch + v));
      for (; v + WIDTH <= span.n; v += WIDTH) store(row + v, load(tile + c * pitch + v));
      if (v < span.n) store_first(row + v, load(tile + c * pitch + v), span.n - v);
    }
    return;
  }
  const bool aligned = streaming && x.voxel_stride % 16 == 0 && x.batch_stride % 16 == 0;
  for (int64_t v = 0; v < span.n; v += WIDTH) {
    for (int64_t c = 0; c < x.channels; c += WIDTH) {
      const int64_t channels = minimum(WIDTH, x.channels - c), voxels = minimum(WIDTH, span.n - v);
      const float* from = tile + c * pitch + v;
      T* to = p + v * x.voxel_stride + c;
      if (channels == WIDTH && voxels == WIDTH) {
        store_block(from, pitch, to, x.voxel_stride, aligned);
        continue;
      }
      vfloat rows[WIDTH];
      for (int i = 0; i < WIDTH; ++i) rows[i] = i < channels ? load(from + i * pitch) : vfloat{};
      transpose(rows);
      for (int64_t i = 0; i < voxels; ++i) store_first(to + i * x.voxel_stride, rows[i], channels);
    }
  }
}

INLINE void store_tile(const Voxels& x, const Span& span, const float* tile, int64_t pitch, bool streaming) {
  if (x.type == DataType::float32) return store_tile<float>(x, span, tile, pitch, streaming);
  if (x.type == DataType::bfloat16) return store_tile<bfloat16>(x, span, tile, pitch, streaming);
  store_tile<float16>(x, span, tile, pitch, streaming);
}

template <class T>
int64_t load_label_row(const T* p, const Span& span, int32_t* row) {
  int32_t highest = -1;
  for (int64_t v = 0; v < span.n; ++v) {
    T value = p[v];
    if constexpr (sizeof(T) >= 4) value = value > T(INT32_MAX) ? T(INT32_MAX) : value;
    const int32_t label = value < T(0) ? -1 : int32_t(value);
    row[v] = label;
    highest = label > highest ? label : highest;
  }
  return highest;
}

// Labels or regions of a tile as int32: -1 where ignored and in the padding. Returns the highest value.
// An absent tensor is 0 everywhere.
INLINE int64_t load_labels(const Voxels& x, const Span& span, int32_t* row) {
  for (int64_t v = span.n; v < span.padded; ++v) row[v] = -1;
  if (!x.present) {
    for (int64_t v = 0; v < span.n; ++v) row[v] = 0;
    return 0;
  }
  switch (x.type) {
    case DataType::int8: return load_label_row(address<const int8_t>(x, span), span, row);
    case DataType::int16: return load_label_row(address<const int16_t>(x, span), span, row);
    case DataType::uint16: return load_label_row(address<const uint16_t>(x, span), span, row);
    case DataType::int32: return load_label_row(address<const int32_t>(x, span), span, row);
    case DataType::uint32: return load_label_row(address<const uint32_t>(x, span), span, row);
    case DataType::int64: return load_label_row(address<const int64_t>(x, span), span, row);
    case DataType::uint64: return load_label_row(address<const uint64_t>(x, span), span, row);
    default: return load_label_row(address<const uint8_t>(x, span), span, row);
  }
}

template <class T>
INLINE void store_integers(const Voxels& x, const Span& span, const int32_t* tile, int64_t pitch) {
  for (int64_t c = 0; c < x.channels; ++c) {
    T* row = address<T>(x, span) + c * x.channel_stride;
    for (int64_t v = 0; v < span.n; ++v) row[v * x.voxel_stride] = T(tile[c * pitch + v]);
  }
}

INLINE void store_integers(const Voxels& x, const Span& span, const int32_t* tile, int64_t pitch) {
  if (x.type == DataType::uint8) return store_integers<uint8_t>(x, span, tile, pitch);
  store_integers<int16_t>(x, span, tile, pitch);
}

template <class T>
INLINE void load_integers(const Voxels& x, const Span& span, int32_t* tile, int64_t pitch) {
  for (int64_t c = 0; c < x.channels; ++c) {
    const T* row = address<const T>(x, span) + c * x.channel_stride;
    for (int64_t v = 0; v < span.n; ++v) tile[c * pitch + v] = row[v * x.voxel_stride];
  }
}

INLINE void load_integers(const Voxels& x, const Span& span, int32_t* tile, int64_t pitch) {
  if (x.type == DataType::uint8) return load_integers<uint8_t>(x, span, tile, pitch);
  load_integers<int16_t>(x, span, tile, pitch);
}

// Weights of a tile: 0 in the padding, 1 everywhere where the tensor is absent.
INLINE void load_weights(const Voxels& x, const Span& span, float* row) {
  for (int64_t v = span.n; v < span.padded; ++v) row[v] = 0;
  if (!x.present) {
    for (int64_t v = 0; v < span.n; ++v) row[v] = 1;
  } else if (x.type == DataType::float32) {
    load_row(address<const float>(x, span), span, row);
  } else if (x.type == DataType::bfloat16) {
    load_row(address<const bfloat16>(x, span), span, row);
  } else if (x.type == DataType::float16) {
    load_row(address<const float16>(x, span), span, row);
  } else {
    const uint8_t* p = address<const uint8_t>(x, span);
    for (int64_t v = 0; v < span.n; ++v) row[v] = p[v];
  }
}

// Sums over voxels: float32 lanes for a few vectors at a time, float64 lanes beyond.
struct RunningSums {
  static constexpr int64_t VECTORS = 8;

  int64_t n, pending = 0;
  Buffer<vfloat> recent;
  Buffer<vdouble> lanes;
  explicit RunningSums(int64_t n) : n(n), recent(n), lanes(n) {}

  INLINE void add(int64_t i, vfloat x) { recent[i] += x; }
  INLINE void next_vector() {
    if (++pending == VECTORS) flush();
  }
  void flush() {
    for (int64_t i = 0; i < n; ++i) {
      lanes[i] += low_half(recent[i]) + high_half(recent[i]);
      recent[i] = vfloat{};
    }
    pending = 0;
  }
  // Adds the sums to out and starts anew.
  void finish(double* out) {
    flush();
    for (int64_t i = 0; i < n; ++i) {
      for (int lane = 0; lane < HALF; ++lane) out[i] += lanes[i][lane];
      lanes[i] = vdouble{};
    }
  }
};

}  // namespace semiseg::SEMISEG_LEVEL
