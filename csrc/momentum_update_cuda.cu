// p <- momentum * p + (1 - momentum) * sum / count, where count is not 0.
#include "kernels.cuh"

namespace semiseg::cuda {

namespace {

// A block for every cluster.
__global__ void __launch_bounds__(THREADS) update(MomentumUpdate a) {
  const double count = a.cluster_count[blockIdx.x];
  if (count == 0) return;
  const double scale = (1 - a.momentum) / count;
  float* p = a.prototypes + blockIdx.x * a.d;
  const float* sum = a.cluster_sum + blockIdx.x * a.d;
  for (int64_t j = threadIdx.x; j < a.d; j += THREADS) p[j] = float(a.momentum * p[j] + scale * sum[j]);
}

}  // namespace

int64_t momentum_update_forward(const MomentumUpdate& a, const Device& device) {
  if (device.workspace != nullptr && a.clusters > 0)
    launch(update, dim3(unsigned(a.clusters)), dim3(THREADS), 0, device.stream, a);
  return 0;
}

}  // namespace semiseg::cuda
