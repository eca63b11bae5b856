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

int64_t batch_norm_relu_statistics(const BatchNormReLUStatistics&, const Device&);
int64_t batch_norm_relu_parameters(const BatchNormReLUParameters&, const Device&);
int64_t batch_norm_relu_forward(const BatchNormReLUForward&, const Device&);
int64_t batch_norm_relu_sums(const BatchNormReLUSums&, const Device&);
int64_t batch_norm_relu_correction(const BatchNormReLUCorrection&, const Device&);
int64_t batch_norm_relu_backward(const BatchNormReLUBackward&, const Device&);
int64_t prototype_similarity_forward(const PrototypeSimilarity&, const Device&);
int64_t prototype_similarity_backward(const PrototypeSimilarity&, const Device&);
int64_t prototype_info_nce_forward(const PrototypeInfoNCE&, const Device&);
int64_t prototype_info_nce_backward(const PrototypeInfoNCE&, const Device&);
int64_t prototype_head_forward(const PrototypeHeadForward&, const Device&);
int64_t prototype_head_backward(const PrototypeHeadBackward&, const Device&);
int64_t cluster_mean(const ClusterMean&, const Device&);
int64_t momentum_update(const MomentumUpdate&, const Device&);
int64_t dice_ce_forward(const DiceCE&, const Device&);
int64_t dice_ce_backward(const DiceCE&, const Device&);
int64_t masked_class_mean_forward(const MaskedClassMean&, const Device&);
int64_t masked_class_mean_backward(const MaskedClassMean&, const Device&);
int64_t linear_classifier_forward(const LinearClassifier&, const Device&);
int64_t linear_classifier_backward(const LinearClassifier&, const Device&);
int64_t linear_upsampling_forward(const LinearUpsampling&, const Device&);
int64_t linear_upsampling_backward(const LinearUpsampling&, const Device&);
int64_t prompt_mix_forward(const PromptMix&, const Device&);
int64_t prompt_mix_backward(const PromptMix&, const Device&);
int64_t largest_components(const LargestComponents&, const Device&);

}  // namespace semiseg::cuda
