// A block's tile of voxels and its cosines with all prototypes, in one of two ways:
//
//   NarrowTile  16 channels and few prototypes, counts known to the compiler: a thread keeps its voxels in registers.
//   WideTile    any size: dot products by blocks in registers, out of chunks of embeddings and prototypes in shared
//               memory; then four neighbouring threads share a voxel, each with every fourth class.
//
//   unit(v) = v / max(|v|, EPSILON)          cosine[i] = unit(z) . unit(p[i]),  i = c * K + k
#pragma once

#include <cuda_pipeline_primitives.h>

#include "device_rows.cuh"
#include "device_sums.cuh"
#include "prototype_similarity.h"

namespace semiseg {

struct Prototypes {
  const float* given;  // [C * K, d]
  float* unit;         // [C * K, d]
  float* length;       // [C * K], max(|p|, EPSILON)
  int C, K, d;

  Prototypes(Arena& workspace, const float* given, int64_t C, int64_t K, int64_t d)
      : given(given), unit(workspace.take<float>(C * K * d)), length(workspace.take<float>(C * K)), C(int(C)),
        K(int(K)), d(int(d)) {}

  __host__ __device__ int count() const { return C * K; }
};

// A class's prototypes, by a whole block: a warp for every prototype.
__device__ __forceinline__ void normalize_class(
    int K, int d,
    const float* given,  // [K, d]
    float* unit,         // [K, d]
    float* length        // [K]
) {
  const int lane = threadIdx.x % WARP;
  float nan = 0;
  for (int k = threadIdx.x / WARP; k < K; k += WARPS) {
    const float* p = given + int64_t(k) * d;
    double square = 0;
    for (int j = lane; j < d; j += WARP) square += double(p[j]) * p[j];
    const double norm = sqrt(warp_sum(square)), clamped = norm < EPSILON ? double(EPSILON) : norm;
    for (int j = lane; j < d; j += WARP) unit[int64_t(k) * d + j] = float(p[j] / clamped);
    if (lane == 0) length[k] = float(clamped);
    if (norm != norm) nan = float(norm);
  }
  // A maximum written as comparisons would pass a NaN by; in the class's first prototype it cannot.
  if (__syncthreads_or(nan != nan) && threadIdx.x == 0) unit[0] = NAN;
}

// A block for every class.
static __global__ void __launch_bounds__(THREADS) normalize_prototypes(Prototypes p) {
  const int64_t first = int64_t(blockIdx.x) * p.K;
  normalize_class(p.K, p.d, p.given + first * p.d, p.unit + first * p.d, p.length + first);
}

// Before a kernel over wide tiles; in those over narrow ones every block does it for itself.
template <class Tile>
void launch_normalize(const Prototypes& p, const Device& device) {
  if (Tile::LANES > 1) launch(normalize_prototypes, dim3(p.C), dim3(THREADS), 0, device.stream, p);
}

// Length of a voxel's embedding and the quotient of a dot product by it, as exact as a division.
struct Length {
  float value, inverse;

  __device__ __forceinline__ explicit Length(float square) {
    const float norm = sqrtf(square);
    value = norm < EPSILON ? EPSILON : norm;
    inverse = 1 / value;
  }
  __device__ __forceinline__ float divide(float dot) const {
    const float quotient = dot * inverse;
    return fmaf(fmaf(-quotient, value, dot), inverse, quotient);
  }
};

template <int CLASSES, int PER_CLASS, int VOXELS_PER_THREAD>
struct NarrowTile {
  static constexpr int C = CLASSES, K = PER_CLASS, COUNT = C * K, D = 16;
  static constexpr int SLOTS = VOXELS_PER_THREAD, LANES = 1, VOXELS = ThreadVoxels<SLOTS>::LENGTH;
  // As many as registers allow without spills: their warps hide each other's waiting.
  static constexpr bool FEW = COUNT <= 8;
  static constexpr int FORWARD_BLOCKS = FEW ? 5 : 4;
  static constexpr int SUMS_BLOCKS = SLOTS > 1 ? 3 : 2;
  static constexpr int BACKWARD_BLOCKS = !FEW && SPARES_REGISTERS ? 5 : 4;

  struct Voxel : OneLane {
    int slot, offset;
    bool inside;
    Length length;
    float (&cosine)[COUNT];  // in backward it becomes the coefficient of each prototype
    float& shrink;           // in backward the coefficient of z
    __device__ __forceinline__ void set_shrink(float x) const { shrink = x; }
  };

  // Values [B, C, *S] of a tile, 0 where the tensor is absent.
  struct ClassValues {
    float value[C][SLOTS] = {};
    __device__ __forceinline__ ClassValues(const NarrowTile& tile, const Voxels& source, const Span& span) {
      if (source.present) load_voxels(source, span, tile.mine, value);
    }
    __device__ __forceinline__ float operator()(const Voxel& x, int c) const { return value[c][x.slot]; }
  };

  // Winners [B, C, *S] of a tile.
  struct ClassIndices {
    MapValues<SLOTS> value[C];
    __device__ __forceinline__ ClassIndices(const NarrowTile& tile, const Voxels& source, const Span& span) {
#pragma unroll
      for (int c = 0; c < C; ++c) value[c] = {source, span, [&](int slot) { return tile.offset(slot); }, c};
    }
    __device__ __forceinline__ int operator()(const Voxel& x, int c) const { return value[c].label(x.slot, K); }
  };

  float* unit;         // shared, [COUNT, D]
  float* length;       // shared, [COUNT]
  float* coming;       // shared, of each warp [D, WARP * SLOTS] embeddings as they lie in memory
  ThreadVoxels<SLOTS> mine;
  float z[D][SLOTS];
  float cosine[SLOTS][COUNT], square[SLOTS], shrink[SLOTS];
  float best[C][SLOTS];
  int winner[C][SLOTS];

  __host__ __device__ __forceinline__ NarrowTile(Arena& shared, const Prototypes&, const Voxels& embeddings)
      : unit(shared.take<float>(COUNT * D)), length(shared.take<float>(COUNT)),
        coming(shared.take<float>(D * VOXELS)), mine{embeddings.aligned_rows} {}

  __device__ __forceinline__ void start(const Prototypes& p) {
    for (int c = 0; c < C; ++c) normalize_class(K, D, p.given + c * K * D, unit + c * K * D, length + c * K);
    __syncthreads();
  }

  __device__ __forceinline__ int offset(int slot) const { return mine.offset(slot); }

  // May the warp's embeddings be copied in pieces of 16 bytes?
  __device__ __forceinline__ bool in_chunks(const Voxels& embeddings, const Span& span) const {
    return embeddings.chunked_rows && int(threadIdx.x / WARP + 1) * WARP * SLOTS <= span.n;
  }

  // Sends for a tile's embeddings, for `read` to find them: they come while those of the tile before are computed with.
  __device__ __forceinline__ void fetch(const Voxels& embeddings, const TileWalk& walk) const {
    if (!walk.there()) return;
    const Span span = walk.span();
    if (!in_chunks(embeddings, span)) return;
    const int lane = threadIdx.x % WARP, first = int(threadIdx.x / WARP) * WARP * SLOTS;
    with_float_type(embeddings.type, [&](auto zero) {
      using T = decltype(zero);
      constexpr int ELEMENTS = 16 / sizeof(T), CHUNKS = WARP * SLOTS / ELEMENTS, ROWS = WARP / CHUNKS;
      const T* p = element<const T>(embeddings, span.image, lane / CHUNKS, span.first + first + lane % CHUNKS * ELEMENTS);
      T* q = reinterpret_cast<T*>(coming + D * first) + lane * ELEMENTS;
#pragma unroll
      for (int j = 0; j < D; j += ROWS)
        __pipeline_memcpy_async(q + j * WARP * SLOTS, p + j * embeddings.channel_stride, 16);
    });
    __pipeline_commit();
  }

  // To registers, when they have come.
  __device__ __forceinline__ void receive(DataType type) {
    __pipeline_wait_prior(0);
    __syncwarp();
    const int lane = threadIdx.x % WARP, first = int(threadIdx.x / WARP) * WARP * SLOTS;
    with_float_type(type, [&](auto zero) {
      using T = decltype(zero);
      const T* q = reinterpret_cast<const T*>(coming + D * first) + lane * SLOTS;
#pragma unroll
      for (int j = 0; j < D; ++j) {
        Adjacent<SLOTS, T> row;
        row.template load<Reuse::neighbours>(q + j * WARP * SLOTS);
        row.convert(z[j]);
      }
    });
  }

  // The embeddings that were sent for; from here on others may be.
  __device__ __forceinline__ void read(const Voxels& embeddings, const Span& span) {
    if (in_chunks(embeddings, span)) receive(embeddings.type);
    else load_voxels(embeddings, span, mine, z);
    __syncwarp();  // besides, the compiler would keep all of `unit` in registers
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
      square[slot] = 0;
#pragma unroll
      for (int i = 0; i < COUNT; ++i) cosine[slot][i] = 0;
    }
#pragma unroll
    for (int j = 0; j < D; j += 4) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const float4 p = *reinterpret_cast<const float4*>(unit + i * D + j);
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
          float& dot = cosine[slot][i];
          dot = fmaf(p.x, z[j][slot], dot);
          dot = fmaf(p.y, z[j + 1][slot], dot);
          dot = fmaf(p.z, z[j + 2][slot], dot);
          dot = fmaf(p.w, z[j + 3][slot], dot);
        }
      }
#pragma unroll
      for (int c = j; c < j + 4; ++c)
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) square[slot] = fmaf(z[c][slot], z[c][slot], square[slot]);
    }
  }

  template <class Run>
  __device__ __forceinline__ void for_voxels(const Span& span, const Run& run) {
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
      const Length here(square[slot]);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) cosine[slot][i] = here.divide(cosine[slot][i]);
      run(Voxel{{}, slot, offset(slot), offset(slot) < span.n, here, cosine[slot], shrink[slot]});
    }
  }

  // A class's similarity and winner, held back until a thread's voxels can be stored together.
  __device__ __forceinline__ void set_best(const Voxels&, const Voxels&, const Span&, const Voxel& x, int c,
                                           float value, int k) {
    best[c][x.slot] = value;
    winner[c][x.slot] = k;
  }

  __device__ __forceinline__ void store_best(const Voxels& similarity, const Voxels& index, const Span& span) {
    store_voxels(similarity, span, mine, best);
    uint8_t* p = element<uint8_t>(index, span.image, 0, span.first);
#pragma unroll
    for (int c = 0; c < C; ++c)
#pragma unroll
      for (int slot = 0; slot < SLOTS; ++slot)
        if (offset(slot) < span.n) p[c * index.channel_stride + offset(slot)] = uint8_t(winner[c][slot]);
  }

  // sum_i coefficient[i] unit(p[i]) + shrink z
  __device__ __forceinline__ void write_gradient(const Voxels& gradient, const Span& span) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < D; j += 4) {
      float sum[4][SLOTS] = {};
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const float4 p = *reinterpret_cast<const float4*>(unit + i * D + j);
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
          sum[0][slot] = fmaf(p.x, cosine[slot][i], sum[0][slot]);
          sum[1][slot] = fmaf(p.y, cosine[slot][i], sum[1][slot]);
          sum[2][slot] = fmaf(p.z, cosine[slot][i], sum[2][slot]);
          sum[3][slot] = fmaf(p.w, cosine[slot][i], sum[3][slot]);
        }
      }
#pragma unroll
      for (int c = 0; c < 4; ++c)
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot)
          z[j + c][slot] = fmaf(shrink[slot], z[j + c][slot], sum[c][slot]);
    }
    store_voxels(gradient, span, mine, z);
  }
};

struct WideTile {
  static constexpr int COUNT = 0;  // C * K, known at run time only
  static constexpr int SLOTS = 1, LANES = 4, VOXELS = THREADS / LANES;
  static constexpr int FORWARD_BLOCKS = 3, SUMS_BLOCKS = SPARES_REGISTERS ? 3 : 2, BACKWARD_BLOCKS = 3;
  static constexpr int ROWS = 64, DEPTH = 16;      // one product: [ROWS, DEPTH] x [DEPTH, VOXELS]
  static constexpr int PITCH = Rows<DEPTH, VOXELS>::PITCH;
  static constexpr int ROW_PITCH = ROWS + 4;

  struct Row {
    float* first;
    __device__ __forceinline__ float& operator[](int i) const { return first[i * PITCH]; }
  };

  struct Voxel : SeveralLanes<LANES> {
    static constexpr int slot = 0;
    int offset;
    bool inside;
    Length length;
    Row cosine;     // in backward it becomes the coefficient of each prototype
    float* shrink;  // in backward the coefficient of z
    __device__ __forceinline__ void set_shrink(float x) const {
      if (this->lane == 0) *shrink = x;
    }
  };

  struct ClassValues {
    const Voxels& source;
    const Span& span;
    __device__ __forceinline__ ClassValues(const WideTile&, const Voxels& source, const Span& span)
        : source(source), span(span) {}
    __device__ __forceinline__ float operator()(const Voxel& x, int c) const {
      return source.present && x.inside ? load_float(source, span.image, c, span.first + x.offset) : 0.f;
    }
  };

  struct ClassIndices {
    const Voxels& source;
    const Span& span;
    __device__ __forceinline__ ClassIndices(const WideTile&, const Voxels& source, const Span& span)
        : source(source), span(span) {}
    __device__ __forceinline__ int operator()(const Voxel& x, int c) const {
      return x.inside ? load_index(source, span.image, c, span.first + x.offset) : 0;
    }
  };

  int C, K, d;
  const float* unit;    // [C * K, d]
  const float* length;  // [C * K]
  float* rows;          // shared, [C * K, PITCH]: cosines
  float* chunk;         // shared, [DEPTH, PITCH], of embeddings
  float* factor;        // shared, [DEPTH, ROW_PITCH], of prototypes
  float *square, *shrink;  // shared, [VOXELS]
  const Voxels* embeddings = nullptr;

  __host__ __device__ WideTile(Arena& shared, const Prototypes& p, const Voxels&)
      : C(p.C), K(p.K), d(p.d), unit(p.unit), length(p.length), rows(shared.take<float>(p.count() * PITCH)),
        chunk(shared.take<float>(DEPTH * PITCH)), factor(shared.take<float>(DEPTH * ROW_PITCH)),
        square(shared.take<float>(VOXELS)), shrink(shared.take<float>(VOXELS)) {}

  __device__ void start(const Prototypes&) {}

  __device__ __forceinline__ int offset(int) const { return threadIdx.x / LANES; }

  // factor[k, r] = unit[first_row + r, first + k], or of the transpose; 0 beyond the ends.
  __device__ __forceinline__ void load_factor(int64_t row_stride, int64_t depth_stride, int first_row, int num_rows,
                                            int first, int depth) {
    for (int e = threadIdx.x; e < ROWS * DEPTH; e += THREADS) {
      // Neighbouring threads read neighbouring elements.
      const int r = depth_stride == 1 ? e / DEPTH : e % ROWS, k = depth_stride == 1 ? e % DEPTH : e / ROWS;
      const bool there = first_row + r < num_rows && first + k < depth;
      factor[k * ROW_PITCH + r] = there ? unit[(first_row + r) * row_stride + (first + k) * depth_stride] : 0.f;
    }
  }

  // sum[r, v] += sum_k factor[k, 4 ty + r] columns[k, 4 tx + v]
  __device__ __forceinline__ void multiply(const float* columns, int depth, Patch& sum) const {
    for (int k = 0; k < depth; ++k)
      sum.add(*reinterpret_cast<const float4*>(factor + k * ROW_PITCH + sum.channel),
              *reinterpret_cast<const float4*>(columns + k * PITCH + sum.voxel));
  }

  __device__ void fetch(const Voxels&, const TileWalk&) const {}

  __device__ void read(const Voxels& source, const Span& span) {
    embeddings = &source;
    const int tx = threadIdx.x % (VOXELS / 4), ty = threadIdx.x / (VOXELS / 4);
    Rows<DEPTH, VOXELS> channels{source};
    for (int first_row = 0; first_row < C * K; first_row += ROWS) {
      Patch sum{4 * ty, 4 * tx};
      float squares[4] = {};
      channels.load(span, 0);
      for (int j = 0; j < d; j += DEPTH) {
        __syncthreads();
        channels.store(chunk);
        load_factor(d, 1, first_row, C * K, j, d);
        __syncthreads();
        if (j + DEPTH < d) channels.load(span, j + DEPTH);  // on its way while this chunk is multiplied
        multiply(chunk, DEPTH, sum);
        if (first_row == 0 && ty == 0) {
          for (int k = 0; k < DEPTH; ++k) {
#pragma unroll
            for (int v = 0; v < 4; ++v) {
              const float z = chunk[k * PITCH + 4 * tx + v];
              squares[v] = fmaf(z, z, squares[v]);
            }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int i = first_row + 4 * ty + r;
        if (i < C * K)
          *reinterpret_cast<float4*>(rows + i * PITCH + 4 * tx) =
              make_float4(sum.x[r][0], sum.x[r][1], sum.x[r][2], sum.x[r][3]);
      }
      if (first_row == 0 && ty == 0)
        *reinterpret_cast<float4*>(square + 4 * tx) = make_float4(squares[0], squares[1], squares[2], squares[3]);
    }
    __syncthreads();
  }

  template <class Run>
  __device__ __forceinline__ void for_voxels(const Span& span, const Run& run) {
    const int v = offset(0);
    const Voxel x{{int(threadIdx.x % LANES)}, v, v < span.n, Length(square[v]), Row{rows + v}, shrink + v};
    for (int c = x.lane; c < C; c += LANES)
      for (int i = c * K; i < (c + 1) * K; ++i) x.cosine[i] = x.length.divide(x.cosine[i]);
    run(x);
  }

  __device__ __forceinline__ void set_best(const Voxels& similarity, const Voxels& index, const Span& span,
                                           const Voxel& x, int c, float value, int k) const {
    if (!x.inside) return;
    store_float(similarity, span.image, c, span.first + x.offset, value);
    store_index(index, span.image, c, span.first + x.offset, k);
  }

  __device__ void store_best(const Voxels&, const Voxels&, const Span&) const {}

  // sum_i coefficient[i] unit(p[i]) + shrink z
  __device__ void write_gradient(const Voxels& gradient, const Span& span) {
    const int tx = threadIdx.x % (VOXELS / 4), ty = threadIdx.x / (VOXELS / 4);
    for (int first_channel = 0; first_channel < d; first_channel += ROWS) {
      Patch z{4 * ty, 4 * tx}, sum{4 * ty, 4 * tx};
      z.load(*embeddings, span, first_channel);
      for (int i = 0; i < C * K; i += DEPTH) {
        __syncthreads();
        load_factor(1, d, first_channel, d, i, C * K);
        __syncthreads();
        multiply(rows + i * PITCH, C * K - i < DEPTH ? C * K - i : DEPTH, sum);
      }
#pragma unroll
      for (int v = 0; v < 4; ++v) {
#pragma unroll
        for (int r = 0; r < 4; ++r) sum.x[r][v] = fmaf(shrink[4 * tx + v], z.x[r][v], sum.x[r][v]);
      }
      sum.store(gradient, span, first_channel);
    }
  }
};

// The voxels of a narrow tile's thread. Measured on an H200: two halve what threads do alike, but with twice the
// prototypes the head and the gradients have not the registers for them.
constexpr int FEW_SLOTS = 2, FORWARD_SLOTS = 2, CLUSTERS_SLOTS = 2, HEAD_SLOTS = 1, BACKWARD_SLOTS = 1;

// Runs run(Type<tile>) with the tile that serves this size; SLOTS are those of 12 prototypes.
template <int SLOTS, class Run>
void with_tile(const Prototypes& p, bool may_be_narrow, const Run& run) {
  const int C = p.C, K = p.K, d = may_be_narrow ? p.d : 0;
  if (d == 16 && C == 2 && K == 3) return run(Type<NarrowTile<2, 3, FEW_SLOTS>>{});
  if (d == 16 && C == 4 && K == 3) return run(Type<NarrowTile<4, 3, SLOTS>>{});
  run(Type<WideTile>{});
}

// kernel(operation, prototypes, tiling, more...) over the tiles of operation.z, with no shared memory but the tile's.
template <class Tile, class Operation, class... More>
void launch_over_tiles(void (*kernel)(Operation, Prototypes, Tiling, More...), const Operation& operation,
                       const Prototypes& prototypes, const Device& device, const More&... more) {
  const Tiling tiling(operation.z, Tile::VOXELS);
  const int64_t shared = shared_bytes<Tile>(prototypes, operation.z);
  launch(kernel, dim3(resident_blocks(kernel, shared, tiling.tiles, device)), dim3(THREADS), shared, device.stream,
         operation, prototypes, tiling, more...);
}

}  // namespace semiseg
