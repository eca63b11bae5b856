// The kernels of one x86-64 level as a table, so that the level is chosen once, when the extension is imported.
#pragma once

#include "batch_norm_relu.h"
#include "cluster_mean.h"
#include "convolution.h"
#include "dice_ce.h"
#include "largest_components.h"
#include "linear_classifier.h"
#include "masked_class_mean.h"
#include "momentum_update.h"
#include "prompt_mix.h"
#include "prototype_head.h"
#include "prototype_info_nce.h"
#include "prototype_similarity.h"
#include "strided_convolution.h"

namespace semiseg {

// X(name, its operation, direction), where the operation is const unless it tells something in the end.
#define SEMISEG_KERNELS(X)                                                    \
  X(batch_norm_relu_statistics, const BatchNormReLUStatistics, forward)       \
  X(batch_norm_relu_parameters, const BatchNormReLUParameters, forward)       \
  X(batch_norm_relu_forward, const BatchNormReLUForward, forward)             \
  X(batch_norm_relu_sums, const BatchNormReLUSums, backward)                  \
  X(batch_norm_relu_correction, const BatchNormReLUCorrection, backward)      \
  X(batch_norm_relu_backward, const BatchNormReLUBackward, backward)          \
  X(prototype_similarity_forward, const PrototypeSimilarity, forward)         \
  X(prototype_similarity_backward, const PrototypeSimilarity, backward)       \
  X(prototype_info_nce_forward, PrototypeInfoNCE, forward)                    \
  X(prototype_info_nce_backward, const PrototypeInfoNCE, backward)            \
  X(prototype_head_forward, PrototypeHeadForward, forward)                    \
  X(prototype_head_backward, const PrototypeHeadBackward, backward)           \
  X(cluster_mean_forward, ClusterMean, forward)                               \
  X(momentum_update_forward, const MomentumUpdate, forward)                   \
  X(dice_ce_forward, DiceCE, forward)                                         \
  X(dice_ce_backward, const DiceCE, backward)                                 \
  X(prompt_mix_forward, const PromptMix, forward)                             \
  X(prompt_mix_backward, const PromptMix, backward)                           \
  X(masked_class_mean_forward, const MaskedClassMean, forward)                \
  X(masked_class_mean_backward, const MaskedClassMean, backward)              \
  X(convolution_matrices, ConvolutionMatrices, forward)                       \
  X(convolution_forward, const ConvolutionForward, forward)                   \
  X(convolution_weight, const ConvolutionWeight, backward)                    \
  X(strided_convolution_forward, const StridedConvolutionForward, forward)    \
  X(strided_convolution_transposed, const StridedConvolutionForward, forward) \
  X(strided_convolution_weight, const StridedConvolutionWeight, backward)     \
  X(linear_classifier_forward, const LinearClassifier, forward)               \
  X(linear_classifier_backward, const LinearClassifier, backward)             \
  X(largest_components_forward, const LargestComponents, forward)

#define SEMISEG_POINTER(name, Operation, direction) void (*name)(Operation&);
struct Kernels {
  SEMISEG_KERNELS(SEMISEG_POINTER)
};
#undef SEMISEG_POINTER

#define SEMISEG_DECLARATION(name, Operation, direction) void name(Operation&);
#define SEMISEG_ADDRESS(name, Operation, direction) name,
#define SEMISEG_LEVEL_KERNELS(level)                                  \
  namespace level {                                                   \
  SEMISEG_KERNELS(SEMISEG_DECLARATION)                                \
  inline constexpr Kernels kernels{SEMISEG_KERNELS(SEMISEG_ADDRESS)}; \
  }

SEMISEG_LEVEL_KERNELS(baseline)
SEMISEG_LEVEL_KERNELS(v3)
SEMISEG_LEVEL_KERNELS(v4)

#undef SEMISEG_LEVEL_KERNELS
#undef SEMISEG_ADDRESS
#undef SEMISEG_DECLARATION

}  // namespace semiseg
