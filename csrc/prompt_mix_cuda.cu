// prompt[e] = sum_c share[c] text[c, e],  share = softmax(logits)
// d prompt / d logits: grad_logits[c] = share[c] (g[c] - sum_i share[i] g[i]),  g[c] = sum_e text[c, e] grad_prompt[e]
// d prompt / d text:   grad_text[c, e] = sum over the voxels of share[c] grad_prompt[e]
//
// A prompt has many more channels than there are classes. The shares of a tile's voxels stand in shared memory; every
// warp has all of the voxels and some of the channels, which it reads or writes once. So a sum over voxels, in
// grad_text, belongs to one warp, and what sums over channels, g, the warps add up at the end of the tile.
#include "class_losses.cuh"
#include "device_rows.cuh"
#include "kernels.cuh"

namespace semiseg::cuda {

namespace {

constexpr int MOST_NARROW_CLASSES = 16;      // of tiles with several voxels a lane
constexpr int64_t PARTIAL_BYTES = 16 << 20;  // with 16 classes and 512 channels still 256 blocks

// A tile's shares; its voxels are spread over the lanes of a warp, SLOTS a lane.
template <int S>
struct Shares {
  static constexpr int SLOTS = S, VOXELS = SLOTS * WARP;
  static constexpr int LANES = THREADS / VOXELS;  // neighbouring threads that share the softmax of a voxel
  static constexpr int PITCH = ChannelRows<VOXELS>::PITCH;

  struct Voxel : SeveralLanes<LANES> {
    int offset;
    float* column;
    __device__ __forceinline__ float& operator()(int c) const { return column[c * PITCH]; }
  };

  int C;
  ThreadVoxels<SLOTS, WARP> mine;
  float* rows;  // shared, [C, PITCH]

  __host__ __device__ __forceinline__ Shares(Arena& shared, const PromptMix& a)
      : C(int(a.logits.channels)), mine{a.prompt.aligned_rows},
        rows(shared.take<float>(ChannelRows<VOXELS>::floats(C))) {}

  __device__ __forceinline__ Voxel voxel() const {
    const int v = threadIdx.x / LANES;
    return {{int(threadIdx.x % LANES)}, v, rows + v};
  }

  // The softmax of the thread's voxel().
  __device__ ClassSoftmax read(const Voxels& logits, const Span& span) const {
    ChannelRows<VOXELS>::load(logits, span, rows);
    const Voxel x = voxel();
    float top = -INFINITY;
    for (int c = x.lane; c < C; c += LANES) top = x(c) > top ? x(c) : top;
    const ClassSoftmax softmax = class_softmax(*this, x, x, x.max(top), Temperature(1));
    for (int c = x.lane; c < C; c += LANES) x(c) = softmax.probability(x(c));
    __syncthreads();
    return softmax;
  }

  // A class's shares of the thread's voxels.
  __device__ __forceinline__ void load(int c, float (&share)[SLOTS]) const {
    const float* row = rows + c * PITCH;
    if (mine.adjacent) {
      using Slots = Vector<SLOTS * sizeof(float)>;
      const Slots vector = *reinterpret_cast<const Slots*>(row + mine.offset(0));
      memcpy(share, &vector, sizeof vector);
    } else {
#pragma unroll
      for (int slot = 0; slot < SLOTS; ++slot) share[slot] = row[mine.offset(slot)];
    }
  }
};

__device__ __forceinline__ float load_text(const PromptMix& a, int c, int e) {
  const int C = int(a.logits.channels), E = int(a.E);
  return c < C && e < E ? a.text[c * E + e] : 0.f;
}

// Channels first, first + 1, ... of the prompt or its gradient at a thread's voxels; 0 beyond the ends.
template <int CHANNELS, int SLOTS>
__device__ __forceinline__ void load_channels(const Voxels& prompt, const Span& span,
                                              const ThreadVoxels<SLOTS, WARP>& mine, int first,
                                              float (&x)[CHANNELS][SLOTS]) {
  if (first + CHANNELS <= prompt.channels) return load_voxels(prompt, span, mine, x, first);
#pragma unroll
  for (int j = 0; j < CHANNELS; ++j)
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
      const int v = mine.offset(slot);
      const bool there = first + j < prompt.channels && v < span.n;
      x[j][slot] = there ? load_float(prompt, span.image, first + j, span.first + v) : 0.f;
    }
}

template <int CHANNELS, int SLOTS>
__device__ __forceinline__ void store_channels(const Voxels& prompt, const Span& span,
                                               const ThreadVoxels<SLOTS, WARP>& mine, int first,
                                               const float (&x)[CHANNELS][SLOTS]) {
  if (first + CHANNELS <= prompt.channels) return store_voxels(prompt, span, mine, x, first);
#pragma unroll
  for (int j = 0; j < CHANNELS; ++j)
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
      const int v = mine.offset(slot);
      if (first + j < prompt.channels && v < span.n)
        store_float(prompt, span.image, first + j, span.first + v, x[j][slot]);
    }
}

template <int SLOTS>
__global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS) forward(PromptMix a, Tiling tiling) {
  constexpr int CHANNELS = 4;  // of a warp at a time
  Arena shared{dynamic_shared<char>()};
  const Shares<SLOTS> tile(shared, a);
  for (TileWalk walk(tiling, blockIdx.x, gridDim.x); walk.there(); walk.next()) {
    const Span span = walk.span();
    tile.read(a.logits, span);
    for (int first = threadIdx.x / WARP * CHANNELS; first < a.E; first += WARPS * CHANNELS) {
      float prompt[CHANNELS][SLOTS] = {};
      for (int c = 0; c < tile.C; ++c) {
        float share[SLOTS];
        tile.load(c, share);
#pragma unroll
        for (int j = 0; j < CHANNELS; ++j) {
          const float text = load_text(a, c, first + j);
#pragma unroll
          for (int slot = 0; slot < SLOTS; ++slot) prompt[j][slot] = fmaf(text, share[slot], prompt[j][slot]);
        }
      }
      store_channels(a.prompt, span, tile.mine, first, prompt);
    }
  }
}

// Running sums of grad_text, [E, C], each of one thread: in shared memory, or where it has no room in the partials.
struct TextSums {
  int64_t count;
  double* sums;
  int64_t stride = 1;

  __host__ __device__ __forceinline__ TextSums(Arena& shared, int64_t count)
      : count(count),
        sums(shared.bytes + count * int64_t(sizeof(double)) <= MOST_SHARED_BYTES ? shared.take<double>(count)
                                                                                : nullptr) {}

  __device__ void start(const Partials& partials) {
    if (sums == nullptr) {
      sums = &partials.mine(0);
      stride = partials.blocks;
    }
    for (int64_t i = threadIdx.x; i < count; i += THREADS) sums[i * stride] = 0;
  }

  __device__ __forceinline__ void add(int64_t i, float x) const { sums[i * stride] += x; }

  __device__ void finish(const Partials& partials) const {
    if (sums == &partials.mine(0)) return;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < count; i += THREADS) partials.mine(i) = sums[i];
  }
};

// Backward takes CLASSES of the classes at a time, and as many channels as give every lane a sum of its own.
template <int M, int S>
struct Backward {
  static constexpr int CLASSES = M, SLOTS = S, CHANNELS = WARP / CLASSES;
  // More channels read at once, or blocks on a multiprocessor, would not find room in registers.
  static constexpr int AT_ONCE = CHANNELS < 8 ? CHANNELS : 8, BLOCKS = CLASSES <= 4 ? 3 : 2;
  using Tile = Shares<SLOTS>;

  Tile tile;
  float* by_share;  // shared, [WARPS, CLASSES, VOXELS]: each warp's part of g
  TextSums text_sums;

  __host__ __device__ __forceinline__ explicit Backward(Arena& shared, const PromptMix& a)
      : tile(shared, a), by_share(shared.take<float>(WARPS * CLASSES * Tile::VOXELS)),
        text_sums(shared, a.logits.channels * a.E) {}

  // Reads the gradient of the prompt; leaves the warp's parts of g, and adds to the sums of grad_text.
  __device__ __forceinline__ void read_gradient(const PromptMix& a, const Span& span, int first_class) const {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float share[CLASSES][SLOTS] = {}, g[CLASSES][SLOTS] = {};
#pragma unroll
    for (int c = 0; c < CLASSES; ++c)
      if (first_class + c < tile.C) tile.load(first_class + c, share[c]);
    for (int first = warp * CHANNELS; first < a.E; first += WARPS * CHANNELS) {
      float sums[WARP];
#pragma unroll
      for (int i = 0; i < WARP; i += AT_ONCE * CLASSES) {
        float x[AT_ONCE][SLOTS];
        load_channels(a.prompt, span, tile.mine, first + i / CLASSES, x);
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j)
#pragma unroll
          for (int c = 0; c < CLASSES; ++c) {
            const float text = load_text(a, first_class + c, first + i / CLASSES + j);
            float sum = 0;
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot) {
              g[c][slot] = fmaf(text, x[j][slot], g[c][slot]);
              sum = fmaf(share[c][slot], x[j][slot], sum);
            }
            sums[i + j * CLASSES + c] = sum;
          }
      }
      const float sum = warp_sums(sums);
      const int c = first_class + lane % CLASSES, e = first + lane / CLASSES;
      if (c < tile.C && e < a.E) text_sums.add(int64_t(e) * tile.C + c, sum);
    }
#pragma unroll
    for (int c = 0; c < CLASSES; ++c)
#pragma unroll
      for (int slot = 0; slot < SLOTS; ++slot)
        by_share[(warp * CLASSES + c) * Tile::VOXELS + tile.mine.offset(slot)] = g[c][slot];
  }

  // g[first_class + c] of the voxel at `offset`.
  __device__ __forceinline__ float sum_of_warps(int c, int offset) const {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += by_share[(warp * CLASSES + c) * Tile::VOXELS + offset];
    return sum;
  }
};

template <class Memory>
__global__ void __launch_bounds__(THREADS, Memory::BLOCKS) backward(PromptMix a, Tiling tiling, Partials partials) {
  using Tile = typename Memory::Tile;
  Arena shared{dynamic_shared<char>()};
  Memory memory(shared, a);
  const Tile& tile = memory.tile;
  memory.text_sums.start(partials);
  for (TileWalk walk(tiling, blockIdx.x, gridDim.x); walk.there(); walk.next()) {
    const Span span = walk.span();
    const ClassSoftmax softmax = tile.read(a.logits, span);
    const typename Tile::Voxel x = tile.voxel();
    float mean = 0;
    for (int first = 0; first < tile.C; first += Memory::CLASSES) {
      memory.read_gradient(a, span, first);
      __syncthreads();
      // g takes the place of these classes' shares, for which there is no room beside it.
      for (int c = first + x.lane; c < tile.C && c < first + Memory::CLASSES; c += Tile::LANES) {
        const float g = memory.sum_of_warps(c - first, x.offset);
        mean = fmaf(x(c), g, mean);
        x(c) = g;
      }
      __syncthreads();
    }
    mean = x.sum(mean);
    if (x.offset < span.n)
      for (int c = x.lane; c < tile.C; c += Tile::LANES) {
        const float logit = load_float(a.logits, span.image, c, span.first + x.offset);
        x(c) = softmax.probability(logit) * (x(c) - mean);
      }
    __syncthreads();
    for_elements<Tile::VOXELS>(a.grad_logits, [&](int c, int v) {
      if (v < span.n) store_float(a.grad_logits, span.image, c, span.first + v, tile.rows[c * Tile::PITCH + v]);
    });
  }
  memory.text_sums.finish(partials);
}

// All blocks together: a thread for every sum.
__global__ void __launch_bounds__(THREADS) finish(
    PromptMix a,
    const double* total  // [E, C]
) {
  const int64_t C = a.logits.channels;
  for_grid(a.E * C, [&](int64_t i) { a.grad_text[i % C * a.E + i / C] = float(total[i]); });
}

template <int SLOTS>
void launch_forward(const PromptMix& a, const Device& device) {
  const Tiling tiling(a.logits, Shares<SLOTS>::VOXELS);
  launch(forward<SLOTS>, dim3(blocks_without_sums(tiling.tiles, device)), dim3(THREADS),
         shared_bytes<Shares<SLOTS>>(a), device.stream, a, tiling);
}

template <class Run>
void with_backward(int64_t C, const Run& run) {
  if (C <= 2) return run(Type<Backward<2, 4>>{});
  if (C <= 4) return run(Type<Backward<4, 4>>{});
  if (C <= 8) return run(Type<Backward<8, 4>>{});
  if (C <= MOST_NARROW_CLASSES) return run(Type<Backward<16, 2>>{});
  run(Type<Backward<16, 1>>{});
}

}  // namespace

int64_t prompt_mix_forward(const PromptMix& a, const Device& device) {
  if (device.workspace == nullptr) return 0;
  if (a.logits.channels <= MOST_NARROW_CLASSES) launch_forward<4>(a, device);
  else launch_forward<1>(a, device);
  return 0;
}

int64_t prompt_mix_backward(const PromptMix& a, const Device& device) {
  Arena workspace{static_cast<char*>(device.workspace)};
  const int64_t sums = a.logits.channels * a.E;
  with_backward(a.logits.channels, [&](auto chosen) {
    using Memory = typename decltype(chosen)::type;
    const Tiling tiling(a.logits, Memory::Tile::VOXELS);
    const int64_t shared = shared_bytes<Memory>(a);
    const int blocks = blocks_with_sums(backward<Memory>, shared, tiling.tiles, sums, device, PARTIAL_BYTES);
    const Partials partials(workspace, sums, blocks);
    double* total = workspace.take<double>(sums);
    if (device.workspace == nullptr) return;
    launch(backward<Memory>, dim3(blocks), dim3(THREADS), shared, device.stream, a, tiling, partials);
    launch_add_partials(partials, total, device);
    launch(finish, dim3(blocks_without_sums(ceil_div(sums, THREADS), device)), dim3(THREADS), 0, device.stream,
           a, total);
  });
  return workspace.bytes;
}

}  // namespace semiseg::cuda
