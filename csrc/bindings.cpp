// Addresses, sizes and strides in; no tensor library is included anywhere in csrc.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "voxels.h"

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

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("levels", [] {
    std::vector<std::string> names;
    for (const Level& level : levels) names.push_back(level.name);
    return names;
  });
  module.def("use_level", &use_level, "Compute with this x86-64 level; the best usable one is the default.");

  module.def(
      "momentum_update",
      [](uintptr_t prototypes, uintptr_t cluster_sum, uintptr_t cluster_count, int64_t clusters, int64_t d,
         double momentum) {
        kernels->momentum_update({pointer<float>(prototypes), pointer<const float>(cluster_sum),
                                  pointer<const double>(cluster_count), clusters, d, momentum});
      },
      py::call_guard<py::gil_scoped_release>());
}
