// The names that Python gives an operation's arguments: visit(name, member) for every member of the operation's struct
// that the direction has.
#pragma once

#include "batch_norm_relu.h"
#include "cluster_mean.h"
#include "convolution.h"
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
#include "strided_convolution.h"

namespace semiseg {

enum class Direction { forward, backward };

template <class Visit>
void arguments(PrototypeSimilarity& a, Direction direction, const Visit& visit) {
  const bool forward = direction == Direction::forward;
  visit("z", a.z);
  visit("prototypes", a.prototypes);
  visit("C", a.C);
  visit("K", a.K);
  visit(forward ? "similarity" : "grad_similarity", a.similarity);
  visit("index", a.index);
  if (!forward) visit("grad_z", a.grad_z);
}

template <class Visit>
void arguments(PrototypeInfoNCE& a, Direction direction, const Visit& visit) {
  const bool forward = direction == Direction::forward;
  visit("z", a.z);
  visit("prototypes", a.prototypes);
  visit("C", a.C);
  visit("K", a.K);
  visit("labels", a.labels);
  visit("weight", a.weight);
  visit("temperature", a.temperature);
  visit("normalize", a.normalize);
  visit("ignore_prototype", a.ignore_prototype);
  visit("denominator", a.denominator);
  visit(forward ? "loss" : "grad_loss", a.loss);
  if (!forward) visit("grad_z", a.grad_z);
}

template <class Visit>
void common_arguments(PrototypeHead& a, const Visit& visit) {
  visit("z", a.z);
  visit("prototypes", a.prototypes);
  visit("C", a.C);
  visit("K", a.K);
  visit("labels", a.labels);
  visit("regions", a.regions);
  visit("num_regions", a.num_regions);
  visit("class_temperature", a.class_temperature);
  visit("temperature", a.temperature);
  visit("squared", a.squared);
  visit("normalize", a.normalize);
  visit("positive_of_label", a.positive_of_label);
  visit("ignore_prototype", a.ignore_prototype);
  visit("statistics", a.statistics);
}

template <class Visit>
void arguments(PrototypeHeadForward& a, Direction, const Visit& visit) {
  common_arguments(a, visit);
  visit("weight", a.weight);
  visit("unit_length", a.unit_length);
  visit("require_agreement", a.require_agreement);
  visit("similarity", a.similarity);
  visit("index", a.index);
  visit("ce", a.ce);
  visit("dice", a.dice);
  visit("info_nce", a.info_nce);
  visit("cluster_sum", a.cluster_sum);
  visit("cluster_count", a.cluster_count);
}

template <class Visit>
void arguments(PrototypeHeadBackward& a, Direction, const Visit& visit) {
  common_arguments(a, visit);
  visit("grad_similarity", a.grad_similarity);
  visit("grad_ce", a.grad_ce);
  visit("grad_dice", a.grad_dice);
  visit("grad_info_nce", a.grad_info_nce);
  visit("grad_z", a.grad_z);
}

template <class Visit>
void arguments(ClusterMean& a, Direction, const Visit& visit) {
  visit("z", a.z);
  visit("prototypes", a.prototypes);
  visit("C", a.C);
  visit("K", a.K);
  visit("labels", a.labels);
  visit("weight", a.weight);
  visit("unit_length", a.unit_length);
  visit("require_agreement", a.require_agreement);
  visit("cluster_sum", a.cluster_sum);
  visit("cluster_count", a.cluster_count);
}

template <class Visit>
void arguments(DiceCE& a, Direction direction, const Visit& visit) {
  const bool forward = direction == Direction::forward;
  visit("logits", a.logits);
  visit("labels", a.labels);
  visit("soft_target", a.soft_target);
  visit("regions", a.regions);
  visit("num_regions", a.num_regions);
  visit("temperature", a.temperature);
  visit("squared", a.squared);
  visit("first_class", a.first_class);
  visit("statistics", a.statistics);
  visit(forward ? "ce" : "grad_ce", a.ce);
  visit(forward ? "dice" : "grad_dice", a.dice);
  if (!forward) visit("grad_logits", a.grad_logits);
}

template <class Visit>
void arguments(PromptMix& a, Direction direction, const Visit& visit) {
  const bool forward = direction == Direction::forward;
  visit("logits", a.logits);
  visit("text", a.text);
  visit("E", a.E);
  visit(forward ? "prompt" : "grad_prompt", a.prompt);
  if (!forward) visit("grad_logits", a.grad_logits);
  if (!forward) visit("grad_text", a.grad_text);
}

// Of both kinds of convolution.
template <class Operation, class Visit>
void convolution_arguments(Operation& a, const Visit& visit) {
  visit("B", a.B);
  visit("D", a.D);
  visit("H", a.H);
  visit("W", a.W);
  visit("volume", a.volume);
  visit("I", a.I);
  visit("O", a.O);
  visit("out_stride", a.out_stride);
  visit("in_stride", a.in_stride);
  visit("tap_stride", a.tap_stride);
}

template <class Visit>
void arguments(ConvolutionMatrices& a, Direction, const Visit& visit) {
  convolution_arguments(a, visit);
  visit("weight", a.weight);
  visit("mirrored", a.mirrored);
  visit("matrices", a.matrices);
}

template <class Visit>
void arguments(ConvolutionForward& a, Direction, const Visit& visit) {
  convolution_arguments(a, visit);
  visit("x", a.x);
  visit("matrices", a.matrices);
  visit("bias", a.bias);
  visit("negative_slope", a.negative_slope);
  visit("y", a.y);
}

template <class Visit>
void arguments(ConvolutionWeight& a, Direction, const Visit& visit) {
  convolution_arguments(a, visit);
  visit("x", a.x);
  visit("grad_y", a.grad_y);
  visit("grad_weight", a.grad_weight);
}

template <class Visit>
void arguments(StridedConvolutionForward& a, Direction, const Visit& visit) {
  convolution_arguments(a, visit);
  visit("x", a.x);
  visit("weight", a.weight);
  visit("bias", a.bias);
  visit("negative_slope", a.negative_slope);
  visit("added", a.added);
  visit("y", a.y);
}

template <class Visit>
void arguments(StridedConvolutionWeight& a, Direction, const Visit& visit) {
  convolution_arguments(a, visit);
  visit("fine", a.fine);
  visit("coarse", a.coarse);
  visit("grad_weight", a.grad_weight);
}

template <class Visit>
void arguments(LinearUpsampling& a, Direction direction, const Visit& visit) {
  const bool forward = direction == Direction::forward;
  visit(forward ? "x" : "grad_x", a.x);
  visit(forward ? "y" : "grad_y", a.y);
  visit("depth", a.depth);
  visit("height", a.height);
  visit("width", a.width);
  visit("volumes", a.volumes);
}

template <class Visit>
void arguments(LinearClassifier& a, Direction direction, const Visit& visit) {
  const bool forward = direction == Direction::forward;
  visit("x", a.x);
  visit("matrix", a.matrix);
  visit("C", a.C);
  visit(forward ? "logits" : "grad_logits", a.logits);
  if (!forward) visit("grad_x", a.grad_x);
  if (!forward) visit("grad_matrix", a.grad_matrix);
}

template <class Visit>
void arguments(MaskedClassMean& a, Direction direction, const Visit& visit) {
  const bool forward = direction == Direction::forward;
  if (forward) visit("z", a.z);
  visit("weight", a.weight);
  visit("total", a.total);
  visit(forward ? "mean" : "grad_mean", a.mean);
  if (!forward) visit("grad_z", a.grad_z);
}

template <class Visit>
void arguments(BatchNormReLUStatistics& a, Direction, const Visit& visit) {
  visit("x", a.x);
  visit("mean", a.mean);
  visit("variance", a.variance);
}

template <class Visit>
void arguments(BatchNormReLUParameters& a, Direction, const Visit& visit) {
  visit("mean", a.mean);
  visit("variance", a.variance);
  visit("weight", a.weight);
  visit("bias", a.bias);
  visit("running_mean", a.running_mean);
  visit("running_variance", a.running_variance);
  visit("count", a.count);
  visit("voxels", a.voxels);
  visit("channels", a.channels);
  visit("momentum", a.momentum);
  visit("epsilon", a.epsilon);
  visit("parameters", a.parameters);
  visit("exact", a.exact);
}

template <class Visit>
void common_arguments(BatchNormReLU& a, const Visit& visit) {
  visit("x", a.x);
  visit("mean", a.mean);
  visit("scale", a.scale);
  visit("bias", a.bias);
  visit("negative_slope", a.negative_slope);
}

template <class Visit>
void arguments(BatchNormReLUForward& a, Direction, const Visit& visit) {
  common_arguments(a, visit);
  visit("y", a.y);
}

template <class Visit>
void arguments(BatchNormReLUSums& a, Direction, const Visit& visit) {
  common_arguments(a, visit);
  visit("grad_y", a.grad_y);
  visit("sums", a.sums);
}

template <class Visit>
void arguments(BatchNormReLUCorrection& a, Direction, const Visit& visit) {
  visit("sums", a.sums);
  visit("joined", a.joined);
  visit("exact", a.exact);
  visit("count", a.count);
  visit("voxels", a.voxels);
  visit("channels", a.channels);
  visit("correction", a.correction);
  visit("grad_weight", a.grad_weight);
  visit("grad_bias", a.grad_bias);
}

template <class Visit>
void arguments(BatchNormReLUBackward& a, Direction, const Visit& visit) {
  common_arguments(a, visit);
  visit("grad_y", a.grad_y);
  visit("offset", a.offset);
  visit("tilt", a.tilt);
  visit("grad_x", a.grad_x);
}

template <class Visit>
void arguments(LargestComponents& a, Direction, const Visit& visit) {
  visit("label", a.label);
  visit("B", a.B);
  visit("Z", a.Z);
  visit("Y", a.Y);
  visit("X", a.X);
  visit("C", a.C);
  visit("kept", a.kept);
}

template <class Visit>
void arguments(MomentumUpdate& a, Direction, const Visit& visit) {
  visit("prototypes", a.prototypes);
  visit("cluster_sum", a.cluster_sum);
  visit("cluster_count", a.cluster_count);
  visit("clusters", a.clusters);
  visit("d", a.d);
  visit("momentum", a.momentum);
}

}  // namespace semiseg
