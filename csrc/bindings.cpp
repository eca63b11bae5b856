// Addresses, sizes and strides in; no tensor library is included anywhere in csrc.
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "python_voxels.h"

namespace py = pybind11;
using namespace semiseg;

namespace {

struct Level {
  const char* name;
  const Kernels* kernels;
};

// What this build holds and this processor runs, best last.
std::vector<Level> usable_levels() {
  std::vector<Level> levels{{"baseline", &baseline::kernels}};
#ifdef SEMISEG_HAS_V3
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    levels.push_back({"v3", &v3::kernels});
#endif
#ifdef SEMISEG_HAS_V4
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
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

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.attr("device_type") = "cpu";
  module.def("levels", [] {
    std::vector<std::string> names;
    for (const Level& level : levels) names.push_back(level.name);
    return names;
  });
  module.def("use_level", &use_level, "Compute with this x86-64 level; the best usable one is the default.");

  module.def(
      "prototype_similarity_forward",
      [](Voxels z, uintptr_t prototypes, int64_t C, int64_t K, Voxels similarity, Voxels index, int threads) {
        kernels->prototype_similarity_forward(
            {z, pointer<const float>(prototypes), C, K, similarity, index, {}, threads});
      },
      py::kw_only(), py::arg("z"), py::arg("prototypes"), py::arg("C"), py::arg("K"), py::arg("similarity"),
      py::arg("index"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  module.def(
      "prototype_similarity_backward",
      [](Voxels z, uintptr_t prototypes, int64_t C, int64_t K, Voxels grad_similarity, Voxels index, Voxels grad_z,
         int threads) {
        kernels->prototype_similarity_backward(
            {z, pointer<const float>(prototypes), C, K, grad_similarity, index, grad_z, threads});
      },
      py::kw_only(), py::arg("z"), py::arg("prototypes"), py::arg("C"), py::arg("K"), py::arg("grad_similarity"),
      py::arg("index"), py::arg("grad_z"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  module.def(
      "prototype_info_nce_forward",
      [](Voxels z, uintptr_t prototypes, int64_t C, int64_t K, Voxels labels, Voxels weight, float temperature,
         bool normalize, int32_t ignore_prototype, int threads, uintptr_t denominator, uintptr_t loss) {
        PrototypeInfoNCE a{z, pointer<const float>(prototypes), C, K, labels, weight, temperature, normalize,
                           ignore_prototype, threads, pointer<double>(denominator), pointer<float>(loss), {}, -1};
        kernels->prototype_info_nce_forward(a);
        return a.highest_label;
      },
      py::kw_only(), py::arg("z"), py::arg("prototypes"), py::arg("C"), py::arg("K"), py::arg("labels"),
      py::arg("weight"), py::arg("temperature"), py::arg("normalize"), py::arg("ignore_prototype"),
      py::arg("threads"), py::arg("denominator"), py::arg("loss"), py::call_guard<py::gil_scoped_release>());

  module.def(
      "prototype_info_nce_backward",
      [](Voxels z, uintptr_t prototypes, int64_t C, int64_t K, Voxels labels, Voxels weight, float temperature,
         bool normalize, int32_t ignore_prototype, int threads, uintptr_t denominator, uintptr_t grad_loss,
         Voxels grad_z) {
        kernels->prototype_info_nce_backward({z, pointer<const float>(prototypes), C, K, labels, weight, temperature,
                                              normalize, ignore_prototype, threads, pointer<double>(denominator),
                                              pointer<float>(grad_loss), grad_z, -1});
      },
      py::kw_only(), py::arg("z"), py::arg("prototypes"), py::arg("C"), py::arg("K"), py::arg("labels"),
      py::arg("weight"), py::arg("temperature"), py::arg("normalize"), py::arg("ignore_prototype"),
      py::arg("threads"), py::arg("denominator"), py::arg("grad_loss"), py::arg("grad_z"),
      py::call_guard<py::gil_scoped_release>());

  module.def(
      "prototype_head_forward",
      [](Voxels z, uintptr_t prototypes, int64_t C, int64_t K, Voxels labels, Voxels regions, Voxels weight,
         int64_t num_regions, float class_temperature, float temperature, bool normalize, bool positive_of_label,
         int32_t ignore_prototype, bool unit_length, bool require_agreement, int threads, Voxels similarity,
         Voxels index, uintptr_t ce, uintptr_t dice, uintptr_t info_nce, uintptr_t cluster_sum,
         uintptr_t cluster_count, uintptr_t statistics) {
        PrototypeHeadForward a{{z, pointer<const float>(prototypes), C, K, labels, regions, num_regions,
                                class_temperature, temperature, normalize, positive_of_label, ignore_prototype,
                                threads, pointer<double>(statistics)},
                               weight, unit_length, require_agreement, similarity, index, pointer<float>(ce),
                               pointer<float>(dice), pointer<float>(info_nce), pointer<float>(cluster_sum),
                               pointer<double>(cluster_count), -1, -1};
        kernels->prototype_head_forward(a);
        return std::make_pair(a.highest_label, a.highest_region);
      },
      py::kw_only(), py::arg("z"), py::arg("prototypes"), py::arg("C"), py::arg("K"), py::arg("labels"),
      py::arg("regions"), py::arg("weight"), py::arg("num_regions"), py::arg("class_temperature"),
      py::arg("temperature"), py::arg("normalize"), py::arg("positive_of_label"), py::arg("ignore_prototype"),
      py::arg("unit_length"), py::arg("require_agreement"), py::arg("threads"), py::arg("similarity"),
      py::arg("index"), py::arg("ce"), py::arg("dice"), py::arg("info_nce"), py::arg("cluster_sum"),
      py::arg("cluster_count"), py::arg("statistics"), py::call_guard<py::gil_scoped_release>());

  module.def(
      "prototype_head_backward",
      [](Voxels z, uintptr_t prototypes, int64_t C, int64_t K, Voxels labels, Voxels regions, int64_t num_regions,
         float class_temperature, float temperature, bool normalize, bool positive_of_label, int32_t ignore_prototype,
         int threads, uintptr_t statistics, Voxels grad_similarity, uintptr_t grad_ce, uintptr_t grad_dice,
         uintptr_t grad_info_nce, Voxels grad_z) {
        kernels->prototype_head_backward({{z, pointer<const float>(prototypes), C, K, labels, regions, num_regions,
                                           class_temperature, temperature, normalize, positive_of_label,
                                           ignore_prototype, threads, pointer<double>(statistics)},
                                          grad_similarity, pointer<const float>(grad_ce),
                                          pointer<const float>(grad_dice), pointer<const float>(grad_info_nce),
                                          grad_z});
      },
      py::kw_only(), py::arg("z"), py::arg("prototypes"), py::arg("C"), py::arg("K"), py::arg("labels"),
      py::arg("regions"), py::arg("num_regions"), py::arg("class_temperature"), py::arg("temperature"),
      py::arg("normalize"), py::arg("positive_of_label"), py::arg("ignore_prototype"), py::arg("threads"),
      py::arg("statistics"), py::arg("grad_similarity"), py::arg("grad_ce"), py::arg("grad_dice"),
      py::arg("grad_info_nce"), py::arg("grad_z"), py::call_guard<py::gil_scoped_release>());

  module.def(
      "cluster_mean",
      [](Voxels z, uintptr_t prototypes, int64_t C, int64_t K, Voxels labels, Voxels weight, bool unit_length,
         bool require_agreement, int threads, uintptr_t cluster_sum, uintptr_t cluster_count) {
        ClusterMean a{z, pointer<const float>(prototypes), C, K, labels, weight, unit_length, require_agreement,
                      threads, pointer<float>(cluster_sum), pointer<double>(cluster_count), -1};
        kernels->cluster_mean(a);
        return a.highest_label;
      },
      py::kw_only(), py::arg("z"), py::arg("prototypes"), py::arg("C"), py::arg("K"), py::arg("labels"),
      py::arg("weight"), py::arg("unit_length"), py::arg("require_agreement"), py::arg("threads"),
      py::arg("cluster_sum"), py::arg("cluster_count"), py::call_guard<py::gil_scoped_release>());

  module.def(
      "dice_ce_forward",
      [](Voxels logits, Voxels labels, Voxels soft_target, Voxels regions, int64_t num_regions, float temperature,
         int threads, uintptr_t statistics, uintptr_t ce, uintptr_t dice) {
        DiceCE a{logits, labels, soft_target, regions, num_regions, temperature, threads, pointer<double>(statistics),
                 pointer<float>(ce), pointer<float>(dice), {}, -1, -1};
        kernels->dice_ce_forward(a);
        return std::make_pair(a.highest_label, a.highest_region);
      },
      py::kw_only(), py::arg("logits"), py::arg("labels"), py::arg("soft_target"), py::arg("regions"),
      py::arg("num_regions"), py::arg("temperature"), py::arg("threads"), py::arg("statistics"), py::arg("ce"),
      py::arg("dice"), py::call_guard<py::gil_scoped_release>());

  module.def(
      "dice_ce_backward",
      [](Voxels logits, Voxels labels, Voxels soft_target, Voxels regions, int64_t num_regions, float temperature,
         int threads, uintptr_t statistics, uintptr_t grad_ce, uintptr_t grad_dice, Voxels grad_logits) {
        kernels->dice_ce_backward({logits, labels, soft_target, regions, num_regions, temperature, threads,
                                   pointer<double>(statistics), pointer<float>(grad_ce), pointer<float>(grad_dice),
                                   grad_logits, -1, -1});
      },
      py::kw_only(), py::arg("logits"), py::arg("labels"), py::arg("soft_target"), py::arg("regions"),
      py::arg("num_regions"), py::arg("temperature"), py::arg("threads"), py::arg("statistics"), py::arg("grad_ce"),
      py::arg("grad_dice"), py::arg("grad_logits"), py::call_guard<py::gil_scoped_release>());

  module.def(
      "momentum_update",
      [](uintptr_t prototypes, uintptr_t cluster_sum, uintptr_t cluster_count, int64_t clusters, int64_t d,
         double momentum) {
        kernels->momentum_update({pointer<float>(prototypes), pointer<const float>(cluster_sum),
                                  pointer<const double>(cluster_count), clusters, d, momentum});
      },
      py::kw_only(), py::arg("prototypes"), py::arg("cluster_sum"), py::arg("cluster_count"), py::arg("clusters"),
      py::arg("d"), py::arg("momentum"), py::call_guard<py::gil_scoped_release>());
}
