// mean[c] = sum_v weight[c, v] z[v] / total[c],  total[c] = sum_v weight[c, v];  0 where total[c] = 0
// grad_z[v] = sum_c weight[c, v] grad_mean[c] / total[c]
#include "class_products.cuh"
#include "kernels.cuh"

namespace semiseg::cuda {

using namespace class_products;

namespace {

__device__ __forceinline__ float over_total(double x, double total) { return total == 0 ? 0.f : float(x / total); }

__global__ void __launch_bounds__(THREADS) finish(
    MaskedClassMean a,
    const double* sums  // [C, d], [C]
) {
  const int C = int(a.weight.channels), d = int(a.z.channels);  // 32 bits, as division in 64 spills
  for_grid(C * (d + 1), [&](int i) {
    if (i < C * d) a.mean[i] = over_total(sums[i], sums[C * d + i / d]);
    else a.total[i - C * d] = sums[i];
  });
}

__global__ void __launch_bounds__(THREADS) share_gradient(
    MaskedClassMean a, int64_t width,
    float* share  // [C, width], grad_mean / total, and 0 from channel d on
) {
  const int64_t C = a.weight.channels, d = a.grad_z.channels;
  for_grid(C * width, [&](int64_t i) {
    const int64_t c = i / width, j = i - c * width;
    share[i] = j < d ? over_total(a.mean[c * d + j], a.total[c]) : 0.f;
  });
}

}  // namespace

int64_t masked_class_mean_forward(const MaskedClassMean& a, const Device& device) {
  Arena workspace{static_cast<char*>(device.workspace)};
  const double* sums = launch_sum_by_class(workspace, a.z, a.weight, 1, device);
  if (device.workspace == nullptr) return workspace.bytes;
  const int64_t count = a.weight.channels * (a.z.channels + 1);
  launch(finish, dim3(blocks_without_sums(ceil_div(count, THREADS), device)), dim3(THREADS), 0, device.stream, a, sums);
  return workspace.bytes;
}

int64_t masked_class_mean_backward(const MaskedClassMean& a, const Device& device) {
  Arena workspace{static_cast<char*>(device.workspace)};
  const int64_t C = a.weight.channels, width = share_width(a.grad_z.channels);
  float* share = workspace.take<float>(C * width);
  if (device.workspace == nullptr) return workspace.bytes;
  launch(share_gradient, dim3(blocks_without_sums(ceil_div(C * width, THREADS), device)), dim3(THREADS), 0,
         device.stream, a, width, share);
  launch_mix_by_class(a.weight, a.grad_z, 0, share, device);
  return workspace.bytes;
}

}  // namespace semiseg::cuda
