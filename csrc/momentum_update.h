#pragma once

#include <cstdint>

namespace semiseg {

struct MomentumUpdate {
  float* prototypes;            // [clusters, d], updated in place
  const float* cluster_sum;     // [clusters, d]
  const double* cluster_count;  // [clusters]
  int64_t clusters, d;
  double momentum;
};

}  // namespace semiseg
