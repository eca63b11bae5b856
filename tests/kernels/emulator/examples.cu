// Kernels that show what the emulator runs and what it detects. The same source is CUDA.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <exception>
#include <string>

#include "launch.cuh"

namespace {

using semiseg::dynamic_shared;
using semiseg::launch;

constexpr int warp = 32;

// The error, or null. Each call ends the life of the text of the last.
template <typename Action>
const char* report(Action action) {
  static std::string message;
  try {
    action();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

template <typename Value>
__device__ Value warp_sum(Value value) {
  for (int distance = warp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xFFFFFFFF, value, distance);
  return value;
}

// The sum of a thread's values over its block, in the block's first thread.
__device__ double block_sum(double value) {
  __shared__ double sums[warp];
  value = warp_sum(value);
  if (threadIdx.x % warp == 0) sums[threadIdx.x / warp] = value;
  __syncthreads();
  if (threadIdx.x >= warp) return 0;
  return warp_sum(threadIdx.x < blockDim.x / warp ? sums[threadIdx.x] : 0.0);
}

__global__ void __launch_bounds__(1024) sum_kernel(const float* __restrict__ x,  // [n], 16-byte aligned
                                                   int64_t n,
                                                   double* partials) {  // [blocks]
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = int64_t(gridDim.x) * blockDim.x;
  float sum = 0;
  for (int64_t i = thread; i < n / 4; i += threads) {
    const float4 v = __ldcs(reinterpret_cast<const float4*>(x) + i);
    sum += (v.x + v.y) + (v.z + v.w);
  }
  for (int64_t i = n / 4 * 4 + thread; i < n; i += threads) sum += x[i];
  const double total = block_sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

__global__ void sum_partials(const double* partials, int n, double* sum) {
  const double total = block_sum(threadIdx.x < n ? partials[threadIdx.x] : 0.0);
  if (threadIdx.x == 0) *sum = total;
}

__global__ void asynchronous_copies_kernel(const float* from, float* to) {
  float* mine = dynamic_shared<float>() + threadIdx.x;
  *mine = -1;
  for (int i = 0; i < 2; ++i) {
    __pipeline_memcpy_async(mine, from + 64 * i + threadIdx.x, sizeof(float));
    __pipeline_commit();
  }
  for (int left = 2; left >= 0; --left) {
    __pipeline_wait_prior(left);
    to[64 * (2 - left) + threadIdx.x] = *mine;
  }
}

__global__ void copy_kernel(const float4* from, float4* to, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) __stcs(to + i, __ldcs(from + i));
}

__global__ void collectives_kernel(int* results) {  // [11, threads]
  const int i = threadIdx.x, lane = i % warp;
  const unsigned all = 0xFFFFFFFF;
  int row = 0;
  const auto put = [&](int result) { results[row++ * blockDim.x + i] = result; };
  put(__shfl_sync(all, i, 5));
  put(__shfl_sync(all, i, 9, 8));
  put(__shfl_xor_sync(all, i, 3));
  put(__shfl_up_sync(all, i, 2));
  put(__shfl_down_sync(all, i, 2, 16));
  put(int(__ballot_sync(all, lane % 3 == 0)));
  put(__any_sync(all, i == 40) + 2 * __all_sync(all, i < 32));
  put(__reduce_add_sync(all, i));
  put(__syncthreads_count(i % 5 == 0));
  put(__syncthreads_or(i == 63) + 2 * __syncthreads_or(0));
  put(__syncthreads_and(1) + 2 * __syncthreads_and(i != 63));
}

// Each half of a warp by itself.
__global__ void halves_kernel(int* results) {  // [threads]
  const int lane = threadIdx.x % warp;
  const unsigned mask = lane < 16 ? 0x0000FFFF : 0xFFFF0000;
  int sum = lane;
  for (int distance = 8; distance > 0; distance /= 2) sum += __shfl_xor_sync(mask, sum, distance);
  results[threadIdx.x] = sum;
}

__global__ void round_kernel(const float* x,           // [n]
                             __nv_bfloat16* bfloat16,  // [n]
                             __half* float16,          // [n]
                             int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  bfloat16[i] = __float2bfloat16(x[i]);
  float16[i] = __float2half(x[i]);
}

__global__ void widen_kernel(const __nv_bfloat162* bfloat16,  // [n / 2]
                             const __half2* float16,          // [n / 2]
                             float2* from_bfloat16,           // [n / 2]
                             float2* from_float16,            // [n / 2]
                             int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n / 2) return;
  from_bfloat16[i] = __bfloat1622float2(bfloat16[i]);
  from_float16[i] = __half22float2(float16[i]);
}

// A block's values in reverse, wrong without the barrier.
template <bool has_barrier>
__global__ void reverse_kernel(float* x) {  // [threads]
  float* values = dynamic_shared<float>();
  values[threadIdx.x] = x[threadIdx.x];
  if (has_barrier) __syncthreads();
  x[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

__global__ void shared_contents_kernel(float* contents) {  // [blocks, 2, threads]
  __shared__ float values[64];
  float* more_values = dynamic_shared<float>();
  contents += blockIdx.x * 128;
  contents[threadIdx.x] = values[threadIdx.x];
  contents[64 + threadIdx.x] = more_values[threadIdx.x];
  values[threadIdx.x] = 1;
  more_values[threadIdx.x] = 1;
}

__global__ void block_order_kernel(int* counter, int* order) {  // [1], [blocks]
  if (threadIdx.x == 0) order[atomicAdd(counter, 1)] = blockIdx.x + gridDim.x * blockIdx.y;
}

enum Misuse {
  none, barrier_in_a_branch, return_before_a_barrier, missing_lane, foreign_lane, mixed_collectives,
  beyond_dynamic_shared, misaligned, out_of_bounds,
};

__global__ void misuse_kernel(int misuse, float* x) {  // [threads]
  __shared__ float values[64];
  const int i = threadIdx.x;
  values[i] = x[i];
  if (blockIdx.x == 1) {
    if (misuse == barrier_in_a_branch && i < 10) __syncthreads();
    if (misuse == return_before_a_barrier && i == 17) return;
    if (misuse == missing_lane && i != 3) x[i] = __shfl_sync(0xFFFFFFFF, x[i], 0);
    if (misuse == foreign_lane && i < 16) x[i] = __shfl_sync(0xFFFF, x[i], 20);
    if (misuse == mixed_collectives) x[i] = i % 2 ? __shfl_sync(0xFFFFFFFF, i, 0) : __any_sync(0xFFFFFFFF, i);
    if (misuse == beyond_dynamic_shared) dynamic_shared<float>()[i + 1] = 0;
    if (misuse == misaligned && i == 5) *reinterpret_cast<float4*>(x) = *reinterpret_cast<float4*>(x + 1);
    if (misuse == out_of_bounds) values[i + 1] = 0;
  }
  __syncthreads();
  x[i] = values[63 - i];
}

}  // namespace

extern "C" const char* sum(const float* x,    // [n]
                           int64_t n,
                           int blocks,
                           int threads,
                           double* partials,  // [blocks]
                           double* result) {  // [1]
  return report([&] {
    launch(sum_kernel, blocks, threads, 0, nullptr, x, n, partials);
    launch(sum_partials, 1, 1024, 0, nullptr, partials, blocks, result);
  });
}

extern "C" const char* copy(const float4* from, float4* to, int64_t n) {  // [n], [n]
  return report([&] { launch(copy_kernel, unsigned((n + 255) / 256), 256, 0, nullptr, from, to, n); });
}

extern "C" const char* asynchronous_copies(const float* from,  // [2, 64]
                                           float* to,          // [3, 64]: what there is without waiting, after the first
                                           int blocks) {       // copy, and after the second
  return report([&] { launch(asynchronous_copies_kernel, blocks, 64, 64 * sizeof(float), nullptr, from, to); });
}

extern "C" const char* collectives(int* results, int threads) {  // [11, threads]
  return report([&] { launch(collectives_kernel, 1, threads, 0, nullptr, results); });
}

extern "C" const char* halves(int* results, int threads) {  // [threads]
  return report([&] { launch(halves_kernel, 1, threads, 0, nullptr, results); });
}

extern "C" const char* round_to_16_bits(const float* x, void* bfloat16, void* float16, int n) {  // [n] each
  return report([&] {
    launch(round_kernel, (n + 255) / 256, 256, 0, nullptr, x, static_cast<__nv_bfloat16*>(bfloat16),
           static_cast<__half*>(float16), n);
  });
}

extern "C" const char* widen(const void* bfloat16, const void* float16, float2* from_bfloat16, float2* from_float16,
                             int n) {  // [n] each
  return report([&] {
    launch(widen_kernel, (n / 2 + 255) / 256, 256, 0, nullptr, static_cast<const __nv_bfloat162*>(bfloat16),
           static_cast<const __half2*>(float16), from_bfloat16, from_float16, n);
  });
}

extern "C" const char* reverse(float* x, int threads, bool has_barrier) {  // [threads]
  return report([&] {
    launch(has_barrier ? reverse_kernel<true> : reverse_kernel<false>, 1, threads, threads * sizeof(float), nullptr, x);
  });
}

extern "C" const char* shared_contents(float* contents, int blocks) {  // [blocks, 2, 64]
  return report([&] { launch(shared_contents_kernel, blocks, 64, 64 * sizeof(float), nullptr, contents); });
}

extern "C" const char* block_order(int* counter, int* order, int blocks_x, int blocks_y) {  // [1], [blocks]
  return report([&] { launch(block_order_kernel, dim3(blocks_x, blocks_y), 32, 0, nullptr, counter, order); });
}

extern "C" const char* misuse(int misuse, float* x) {  // [64]
  return report([&] { launch(misuse_kernel, 3, 64, 64 * sizeof(float), nullptr, misuse, x); });
}

extern "C" const char* launch_with(float* x, int threads, int64_t shared_bytes) {  // [threads]
  return report([&] { launch(reverse_kernel<true>, 1, threads, shared_bytes, nullptr, x); });
}
