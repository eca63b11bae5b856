// p <- momentum * p + (1 - momentum) * sum / count, where count is not 0.
#include "kernels.h"

namespace semiseg::SEMISEG_LEVEL {

void momentum_update_forward(const MomentumUpdate& a) {
  for (int64_t i = 0; i < a.clusters; ++i) {
    if (a.cluster_count[i] == 0) continue;
    const double scale = (1 - a.momentum) / a.cluster_count[i];
    float* p = a.prototypes + i * a.d;
    const float* sum = a.cluster_sum + i * a.d;
    for (int64_t j = 0; j < a.d; ++j) p[j] = float(a.momentum * p[j] + scale * sum[j]);
  }
}

}  // namespace semiseg::SEMISEG_LEVEL
