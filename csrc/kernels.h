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

struct Kernels {
  void (*batch_norm_relu_statistics)(const BatchNormReLUStatistics&);
  void (*batch_norm_relu_parameters)(const BatchNormReLUParameters&);
  void (*batch_norm_relu_forward)(const BatchNormReLUForward&);
  void (*batch_norm_relu_sums)(const BatchNormReLUSums&);
  void (*batch_norm_relu_correction)(const BatchNormReLUCorrection&);
  void (*batch_norm_relu_backward)(const BatchNormReLUBackward&);
  void (*prototype_similarity_forward)(const PrototypeSimilarity&);
  void (*prototype_similarity_backward)(const PrototypeSimilarity&);
  void (*prototype_info_nce_forward)(PrototypeInfoNCE&);
  void (*prototype_info_nce_backward)(const PrototypeInfoNCE&);
  void (*prototype_head_forward)(PrototypeHeadForward&);
  void (*prototype_head_backward)(const PrototypeHeadBackward&);
  void (*cluster_mean)(ClusterMean&);
  void (*momentum_update)(const MomentumUpdate&);
  void (*dice_ce_forward)(DiceCE&);
  void (*dice_ce_backward)(const DiceCE&);
  void (*prompt_mix_forward)(const PromptMix&);
  void (*prompt_mix_backward)(const PromptMix&);
  void (*masked_class_mean_forward)(const MaskedClassMean&);
  void (*masked_class_mean_backward)(const MaskedClassMean&);
  void (*convolution_matrices)(ConvolutionMatrices&);
  void (*convolution_forward)(const ConvolutionForward&);
  void (*convolution_weight)(const ConvolutionWeight&);
  void (*strided_convolution_forward)(const StridedConvolutionForward&);
  void (*strided_convolution_transposed)(const StridedConvolutionForward&);
  void (*strided_convolution_weight)(const StridedConvolutionWeight&);
  void (*linear_classifier_forward)(const LinearClassifier&);
  void (*linear_classifier_backward)(const LinearClassifier&);
  void (*largest_components)(const LargestComponents&);
};

#define SEMISEG_DECLARE_LEVEL(level)                                                   \
  namespace level {                                                                    \
  void batch_norm_relu_statistics(const BatchNormReLUStatistics&);                     \
  void batch_norm_relu_parameters(const BatchNormReLUParameters&);                     \
  void batch_norm_relu_forward(const BatchNormReLUForward&);                           \
  void batch_norm_relu_sums(const BatchNormReLUSums&);                                 \
  void batch_norm_relu_correction(const BatchNormReLUCorrection&);                     \
  void batch_norm_relu_backward(const BatchNormReLUBackward&);                         \
  void prototype_similarity_forward(const PrototypeSimilarity&);                       \
  void prototype_similarity_backward(const PrototypeSimilarity&);                      \
  void prototype_info_nce_forward(PrototypeInfoNCE&);                                  \
  void prototype_info_nce_backward(const PrototypeInfoNCE&);                           \
  void prototype_head_forward(PrototypeHeadForward&);                                  \
  void prototype_head_backward(const PrototypeHeadBackward&);                          \
  void cluster_mean(ClusterMean&);                                                     \
  void momentum_update(const MomentumUpdate&);                                         \
  void dice_ce_forward(DiceCE&);                                                       \
  void dice_ce_backward(const DiceCE&);                                                \
  void prompt_mix_forward(const PromptMix&);                                           \
  void prompt_mix_backward(const PromptMix&);                                          \
  void masked_class_mean_forward(const MaskedClassMean&);                              \
  void masked_class_mean_backward(const MaskedClassMean&);                             \
  void convolution_matrices(ConvolutionMatrices&);                                     \
  void narrow_convolution_matrices(ConvolutionMatrices&);                              \
  void convolution_forward(const ConvolutionForward&);                                 \
  void narrow_convolution_forward(const ConvolutionForward&);                          \
  void convolution_weight(const ConvolutionWeight&);                                   \
  void narrow_convolution_weight(const ConvolutionWeight&);                            \
  void strided_convolution_forward(const StridedConvolutionForward&);                  \
  void strided_convolution_transposed(const StridedConvolutionForward&);               \
  void strided_convolution_weight(const StridedConvolutionWeight&);                    \
  void linear_classifier_forward(const LinearClassifier&);                             \
  void linear_classifier_backward(const LinearClassifier&);                            \
  void largest_components(const LargestComponents&);                                   \
  inline constexpr Kernels kernels{                                                    \
      batch_norm_relu_statistics,   batch_norm_relu_parameters,                        \
      batch_norm_relu_forward,      batch_norm_relu_sums,                              \
      batch_norm_relu_correction,   batch_norm_relu_backward,                          \
      prototype_similarity_forward, prototype_similarity_backward,                     \
      prototype_info_nce_forward,   prototype_info_nce_backward,                       \
      prototype_head_forward,       prototype_head_backward,                           \
      cluster_mean,                 momentum_update,                                   \
      dice_ce_forward,              dice_ce_backward,                                  \
      prompt_mix_forward,           prompt_mix_backward,                               \
      masked_class_mean_forward,    masked_class_mean_backward,                        \
      convolution_matrices,         convolution_forward,                               \
      convolution_weight,           strided_convolution_forward,                       \
      strided_convolution_transposed, strided_convolution_weight,                      \
      linear_classifier_forward,    linear_classifier_backward,                        \
      largest_components,                                                              \
  };                                                                                   \
  }

SEMISEG_DECLARE_LEVEL(baseline)
SEMISEG_DECLARE_LEVEL(v3)
SEMISEG_DECLARE_LEVEL(v4)

#undef SEMISEG_DECLARE_LEVEL

}  // namespace semiseg
