// The operations on a GPU. Each returns how many bytes of workspace it needs; given none, it does nothing else.
#pragma once

#include "batch_norm_relu.h"
#include "cluster_mean.h"
#include "device.cuh"
#include "dice_ce.h"
#include "largest_components.h"
#include "linear_classifier.h"
#include "linear_upsampling.h"
#include "masked_class_mean.h"
#include "momentum_update.h"
#include "prompt_mix.h"
#include "prototype_head.h"
#include "prototype_info_nce.h"
#include "prototype_similarity.h"

namespace semiseg::cuda {

// X(name, its operation, direction)
#define SEMISEG_CUDA_KERNELS(X)                                    \
  X(batch_norm_relu_statistics, BatchNormReLUStatistics, forward)  \
  X(batch_norm_relu_parameters, BatchNormReLUParameters, forward)  \
  X(batch_norm_relu_forward, BatchNormReLUForward, forward)        \
  X(batch_norm_relu_sums, BatchNormReLUSums, backward)             \
  X(batch_norm_relu_correction, BatchNormReLUCorrection, backward) \
  X(batch_norm_relu_backward, BatchNormReLUBackward, backward)     \
  X(prototype_similarity_forward, PrototypeSimilarity, forward)    \
  X(prototype_similarity_backward, PrototypeSimilarity, backward)  \
  X(prototype_info_nce_forward, PrototypeInfoNCE, forward)         \
  X(prototype_info_nce_backward, PrototypeInfoNCE, backward)       \
  X(prototype_head_forward, PrototypeHeadForward, forward)         \
  X(prototype_head_backward, PrototypeHeadBackward, backward)      \
  X(cluster_mean_forward, ClusterMean, forward)                    \
  X(momentum_update_forward, MomentumUpdate, forward)              \
  X(dice_ce_forward, DiceCE, forward)                              \
  X(dice_ce_backward, DiceCE, backward)                            \
  X(masked_class_mean_forward, MaskedClassMean, forward)           \
  X(masked_class_mean_backward, MaskedClassMean, backward)         \
  X(linear_classifier_forward, LinearClassifier, forward)          \
  X(linear_classifier_backward, LinearClassifier, backward)        \
  X(linear_upsampling_forward, LinearUpsampling, forward)          \
  X(linear_upsampling_backward, LinearUpsampling, backward)        \
  X(prompt_mix_forward, PromptMix, forward)                        \
  X(prompt_mix_backward, PromptMix, backward)                      \
  X(largest_components_forward, LargestComponents, forward)

#define SEMISEG_DECLARATION(name, Operation, direction) int64_t name(const Operation&, const Device&);
SEMISEG_CUDA_KERNELS(SEMISEG_DECLARATION)
#undef SEMISEG_DECLARATION

}  // namespace semiseg::cuda
