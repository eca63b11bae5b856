// Addresses, sizes and strides in; no tensor library is included anywhere in csrc.
#include <pybind11/stl.h>

#ifdef SEMISEG_HAS_V3
#include <cpuid.h>
#endif

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "python_arguments.h"

namespace semiseg {

struct Processor {
  int threads = 1;
};

template <class Visit>
void machine_arguments(Processor& processor, const Visit& visit) {
  visit("threads", processor.threads);
}

}  // namespace semiseg

namespace py = pybind11;
using namespace semiseg;

namespace {

struct Level {
  const char* name;
  const Kernels* kernels;
};

#ifdef SEMISEG_HAS_V3
bool runs_v3() {
  // Not every compiler's __builtin_cpu_supports knows the names of these three.
  unsigned a, b, c, d;
  const bool f16c_and_movbe = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) && (c & bit_MOVBE);
  const bool lzcnt = __get_cpuid(0x80000001, &a, &b, &c, &d) && (c & bit_LZCNT);
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && f16c_and_movbe && lzcnt;
}
#endif

// What this build holds and this processor runs, best last.
std::vector<Level> usable_levels() {
  std::vector<Level> levels{{"baseline", &baseline::kernels}};
#ifdef SEMISEG_HAS_V3
  if (runs_v3()) levels.push_back({"v3", &v3::kernels});
#endif
#ifdef SEMISEG_HAS_V4
  if (runs_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    levels.push_back({"v4", &v4::kernels});
#endif
  return levels;
}

const std::vector<Level> levels = usable_levels();
const Kernels* kernels = levels.back().kernels;

void use_level(const std::string& name) {
  for (const Level& level : levels) {
    if (level.name == name) {
      kernels = level.kernels;
      return;
    }
  }
  throw std::invalid_argument("level " + name + " is not usable here, see levels()");
}

// The smallest operations have none to tell.
template <class Operation, class = void>
constexpr bool has_threads = false;
template <class Operation>
constexpr bool has_threads<Operation, std::void_t<decltype(Operation::threads)>> = true;

// Binds the kernel that the level in use has in this place; result(operation) is what Python gets.
template <class Operation, class Argument, class Result>
void bind_kernel(py::module_& module, const char* name, Direction direction, void (*Kernels::*kernel)(Argument),
                 const Result& result) {
  bind<Operation, Processor>(module, name, direction,
                             [kernel, result](Operation& operation, const Processor& processor) {
                               if constexpr (has_threads<Operation>) operation.threads = processor.threads;
                               (kernels->*kernel)(operation);
                               return result(operation);
                             });
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.attr("device_type") = "cpu";
  module.def("levels", [] {
    std::vector<std::string> names;
    for (const Level& level : levels) names.push_back(level.name);
    return names;
  });
  module.def("use_level", &use_level, "Compute with this x86-64 level; the best usable one is the default.");

  const auto forward = Direction::forward, backward = Direction::backward;
  const auto nothing = [](const auto&) { return std::tuple<>(); };
  const auto highest_label = [](const auto& a) { return std::make_tuple(a.highest_label); };
  const auto highest = [](const auto& a) { return std::make_tuple(a.highest_label, a.highest_region); };
  bind_kernel<BatchNormReLUStatistics>(module, "batch_norm_relu_statistics", forward,
                                       &Kernels::batch_norm_relu_statistics, nothing);
  bind_kernel<BatchNormReLUParameters>(module, "batch_norm_relu_parameters", forward,
                                       &Kernels::batch_norm_relu_parameters, nothing);
  bind_kernel<BatchNormReLUForward>(module, "batch_norm_relu_forward", forward, &Kernels::batch_norm_relu_forward,
                                    nothing);
  bind_kernel<BatchNormReLUSums>(module, "batch_norm_relu_sums", backward, &Kernels::batch_norm_relu_sums, nothing);
  bind_kernel<BatchNormReLUCorrection>(module, "batch_norm_relu_correction", backward,
                                       &Kernels::batch_norm_relu_correction, nothing);
  bind_kernel<BatchNormReLUBackward>(module, "batch_norm_relu_backward", backward, &Kernels::batch_norm_relu_backward,
                                     nothing);
  bind_kernel<PrototypeSimilarity>(module, "prototype_similarity_forward", forward,
                                   &Kernels::prototype_similarity_forward, nothing);
  bind_kernel<PrototypeSimilarity>(module, "prototype_similarity_backward", backward,
                                   &Kernels::prototype_similarity_backward, nothing);
  bind_kernel<PrototypeInfoNCE>(module, "prototype_info_nce_forward", forward, &Kernels::prototype_info_nce_forward,
                                highest_label);
  bind_kernel<PrototypeInfoNCE>(module, "prototype_info_nce_backward", backward, &Kernels::prototype_info_nce_backward,
                                nothing);
  bind_kernel<PrototypeHeadForward>(module, "prototype_head_forward", forward, &Kernels::prototype_head_forward,
                                    highest);
  bind_kernel<PrototypeHeadBackward>(module, "prototype_head_backward", backward, &Kernels::prototype_head_backward,
                                     nothing);
  bind_kernel<ClusterMean>(module, "cluster_mean", forward, &Kernels::cluster_mean, highest_label);
  bind_kernel<MomentumUpdate>(module, "momentum_update", forward, &Kernels::momentum_update, nothing);
  bind_kernel<DiceCE>(module, "dice_ce_forward", forward, &Kernels::dice_ce_forward, highest);
  bind_kernel<DiceCE>(module, "dice_ce_backward", backward, &Kernels::dice_ce_backward, nothing);
  bind_kernel<PromptMix>(module, "prompt_mix_forward", forward, &Kernels::prompt_mix_forward, nothing);
  bind_kernel<PromptMix>(module, "prompt_mix_backward", backward, &Kernels::prompt_mix_backward, nothing);
  bind_kernel<MaskedClassMean>(module, "masked_class_mean_forward", forward, &Kernels::masked_class_mean_forward,
                               nothing);
  bind_kernel<MaskedClassMean>(module, "masked_class_mean_backward", backward, &Kernels::masked_class_mean_backward,
                               nothing);
  const auto layout = [](const auto& a) { return std::make_tuple(a.count, a.columns); };
  bind_kernel<ConvolutionMatrices>(module, "convolution_matrices", forward, &Kernels::convolution_matrices, layout);
  bind_kernel<ConvolutionForward>(module, "convolution_forward", forward, &Kernels::convolution_forward, nothing);
  bind_kernel<ConvolutionWeight>(module, "convolution_weight", backward, &Kernels::convolution_weight, nothing);
  bind_kernel<StridedConvolutionForward>(module, "strided_convolution_forward", forward,
                                         &Kernels::strided_convolution_forward, nothing);
  bind_kernel<StridedConvolutionForward>(module, "strided_convolution_transposed", forward,
                                         &Kernels::strided_convolution_transposed, nothing);
  bind_kernel<StridedConvolutionWeight>(module, "strided_convolution_weight", backward,
                                        &Kernels::strided_convolution_weight, nothing);
  bind_kernel<LinearClassifier>(module, "linear_classifier_forward", forward, &Kernels::linear_classifier_forward,
                                nothing);
  bind_kernel<LinearClassifier>(module, "linear_classifier_backward", backward, &Kernels::linear_classifier_backward,
                                nothing);
  bind_kernel<LargestComponents>(module, "largest_components", forward, &Kernels::largest_components, nothing);
}
