// Addresses, sizes and strides in; no tensor library is included anywhere in csrc.
#include <pybind11/stl.h>

#ifdef SEMISEG_HAS_V3
#include <cpuid.h>
#endif

#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
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
  std::string usable;
  for (const Level& level : levels) {
    if (level.name == name) {
      kernels = level.kernels;
      return;
    }
    usable += (usable.empty() ? "" : ", ") + std::string(level.name);
  }
  throw std::invalid_argument("level " + name + " is not usable here, but only " + usable);
}

// The smallest operations have none to tell.
template <class Operation, class = void>
constexpr bool has_threads = false;
template <class Operation>
constexpr bool has_threads<Operation, std::void_t<decltype(Operation::threads)>> = true;

// What Python gets of the operations that tell something in the end.
auto result(const PrototypeInfoNCE& a) { return std::make_tuple(a.highest_label); }
auto result(const ClusterMean& a) { return std::make_tuple(a.highest_label); }
auto result(const PrototypeHeadForward& a) { return std::make_tuple(a.highest_label, a.highest_region); }
auto result(const DiceCE& a) { return std::make_tuple(a.highest_label, a.highest_region); }
auto result(const ConvolutionMatrices& a) { return std::make_tuple(a.count, a.columns, a.turned); }

// Binds the kernel that the level in use has in this place.
template <class Operation>
void bind_kernel(py::module_& module, const char* name, Direction direction, void (*Kernels::*kernel)(Operation&)) {
  using Given = std::remove_const_t<Operation>;
  bind<Given, Processor>(module, name, direction, [kernel](Given& operation, const Processor& processor) {
    if constexpr (has_threads<Given>) operation.threads = processor.threads;
    (kernels->*kernel)(operation);
    if constexpr (std::is_const_v<Operation>) return std::tuple<>();
    else return result(operation);
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

#define SEMISEG_BIND(name, Operation, direction) bind_kernel(module, #name, Direction::direction, &Kernels::name);
  SEMISEG_KERNELS(SEMISEG_BIND)
#undef SEMISEG_BIND
}
