// logits[b, c] = sum_j matrix[b, c, j] x[b, j],  x[b, d] = 1, so that the matrix's last column is the bias
// grad_x[b, j] = sum_c matrix[b, c, j] grad_logits[b, c]
// grad_matrix[b, c, j] = sum over the voxels of image b of grad_logits[b, c] x[b, j]
#include "class_products.cuh"
#include "kernels.cuh"

namespace semiseg::cuda {

using namespace class_products;

namespace {

constexpr int SLOTS = 2, DEPTH = 16;

// The logits of a thread's voxels, for as many classes as ROWS.
template <int ROWS>
struct Logits {
  float sum[ROWS][SLOTS];

  __device__ __forceinline__ explicit Logits(const float* bias) {
#pragma unroll
    for (int c = 0; c < ROWS; ++c)
#pragma unroll
      for (int slot = 0; slot < SLOTS; ++slot) sum[c][slot] = bias[c];
  }

  // Of CHANNELS channels, whose products are added on their own first: long sums in float32 lose digits.
  template <int CHANNELS>
  __device__ __forceinline__ void add(const Voxels& x, const Span& span, const ThreadVoxels<SLOTS>& mine, int channel,
                                      const float* matrix) {
    float values[CHANNELS][SLOTS], products[ROWS][SLOTS] = {};
    load_voxels(x, span, mine, values, channel);
#pragma unroll
    for (int j = 0; j < CHANNELS; ++j)
#pragma unroll
      for (int c = 0; c < ROWS; ++c)
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot)
          products[c][slot] = fmaf(matrix[(channel + j) * ROWS + c], values[j][slot], products[c][slot]);
#pragma unroll
    for (int c = 0; c < ROWS; ++c)
#pragma unroll
      for (int slot = 0; slot < SLOTS; ++slot) sum[c][slot] += products[c][slot];
  }
};

// A block for ROWS of the classes (x) and some of the tiles (y).
template <int ROWS>
__global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS) forward(LinearClassifier a, Tiling tiling) {
  float* matrix = dynamic_shared<float>();  // [d + 1, ROWS], of one image
  const int d = int(a.x.channels), first_class = int(blockIdx.x) * ROWS;
  const ThreadVoxels<SLOTS> mine{a.x.aligned_rows};
  int64_t image = -1;
  for (TileWalk walk(tiling, blockIdx.y, gridDim.y); walk.there(); walk.next()) {
    const Span span = walk.span();
    if (span.image != image) {
      image = span.image;
      __syncthreads();
      for (int i = threadIdx.x; i < (d + 1) * ROWS; i += THREADS) {
        const int64_t c = first_class + i % ROWS, j = i / ROWS;
        matrix[i] = c < a.C ? a.matrix[(image * a.C + c) * (d + 1) + j] : 0.f;
      }
      __syncthreads();
    }
    Logits<ROWS> logits(matrix + d * ROWS);
    int j = 0;
    for (; j + DEPTH <= d; j += DEPTH) logits.template add<DEPTH>(a.x, span, mine, j, matrix);
    for (; j < d; ++j) logits.template add<1>(a.x, span, mine, j, matrix);
#pragma unroll
    for (int c = 0; c < ROWS; ++c) {
      const float(&of_class)[1][SLOTS] = reinterpret_cast<const float(&)[1][SLOTS]>(logits.sum[c]);
      if (first_class + c < a.C) store_voxels(a.logits, span, mine, of_class, first_class + c);
    }
  }
}

__global__ void __launch_bounds__(THREADS) weights_of_channels(
    LinearClassifier a, int64_t width,
    float* weights  // [B, C, width], the matrix without its bias, and 0 from channel d on
) {
  const int64_t d = a.x.channels, rows = a.x.batch * a.C;
  for_grid(rows * width, [&](int64_t i) {
    const int64_t row = i / width, j = i - row * width;
    weights[i] = j < d ? a.matrix[row * (d + 1) + j] : 0.f;
  });
}

__global__ void __launch_bounds__(THREADS) finish(
    LinearClassifier a,
    const double* sums  // [B, ([C, d], [C])]
) {
  const int64_t d = a.x.channels, of_image = a.C * (d + 1);
  for_grid(a.x.batch * of_image, [&](int64_t i) {
    const int64_t row = i / (d + 1), j = i - row * (d + 1), image = row / a.C, c = row - image * a.C;
    a.grad_matrix[i] = float(sums[image * of_image + (j < d ? c * d + j : a.C * d + c)]);
  });
}

template <int ROWS>
void launch_forward(const LinearClassifier& a, const Device& device) {
  const Tiling tiling(a.x, ThreadVoxels<SLOTS>::LENGTH);
  launch(forward<ROWS>, dim3(ceil_div(a.C, ROWS), blocks_without_sums(tiling.tiles, device)), dim3(THREADS),
         (a.x.channels + 1) * ROWS * sizeof(float), device.stream, a, tiling);
}

}  // namespace

int64_t linear_classifier_forward(const LinearClassifier& a, const Device& device) {
  if (device.workspace == nullptr) return 0;
  if (a.C <= 2) launch_forward<2>(a, device);
  else if (a.C <= FEW_CLASSES) launch_forward<FEW_CLASSES>(a, device);
  else launch_forward<CLASSES>(a, device);
  return 0;
}

int64_t linear_classifier_backward(const LinearClassifier& a, const Device& device) {
  Arena workspace{static_cast<char*>(device.workspace)};
  if (a.x.batch == 0) return 0;
  const int64_t rows = a.x.batch * a.C, width = share_width(a.x.channels);
  float* weights = workspace.take<float>(rows * width);
  const double* sums = launch_sum_by_class(workspace, a.x, a.logits, a.x.batch, device);
  if (device.workspace == nullptr) return workspace.bytes;
  const auto blocks = [&](int64_t count) { return dim3(blocks_without_sums(ceil_div(count, THREADS), device)); };
  launch(finish, blocks(rows * (a.x.channels + 1)), dim3(THREADS), 0, device.stream, a, sums);
  launch(weights_of_channels, blocks(rows * width), dim3(THREADS), 0, device.stream, a, width, weights);
  launch_mix_by_class(a.logits, a.grad_x, a.C * width, weights, device);
  return workspace.bytes;
}

}  // namespace semiseg::cuda
