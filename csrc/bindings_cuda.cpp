// The operations on a GPU as a Python module; see python_arguments.h.
#include <pybind11/stl.h>

#include <optional>

#include "kernels.cuh"
#include "python_arguments.h"

namespace semiseg {

template <class Visit>
void machine_arguments(Device& device, const Visit& visit) {
  visit("device", device.index);
  visit("stream", device.stream);
  visit("workspace", device.workspace);
}

}  // namespace semiseg

namespace py = pybind11;
using namespace semiseg;

namespace {

// Why the CUDA runtime in this module cannot work with the driver of this machine; nothing if it can.
std::optional<std::string> driver_problem() {
  int runtime = 0, driver = 0, devices = 0;
  const auto version = [](int number) {
    return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
  };
  cudaRuntimeGetVersion(&runtime);
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "there is no NVIDIA driver";
  if (driver / 1000 < runtime / 1000)
    return "the driver serves CUDA " + version(driver) + ", the extension was built with CUDA " + version(runtime);
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess || devices == 0) {
    cudaGetLastError();
    return std::string("CUDA finds no device: ") + cudaGetErrorString(error);
  }
  return std::nullopt;
}

template <class Operation>
void bind_kernel(py::module_& module, const char* name, Direction direction,
                 int64_t (*kernel)(const Operation&, const Device&)) {
  bind<Operation, Device>(module, name, direction, [name, kernel](const Operation& operation, const Device& device) {
    try {
      const DeviceGuard guard(device.index);
      return kernel(operation, device);
    } catch (const std::exception& error) {
      throw std::runtime_error(std::string(name) + ": " + error.what());
    }
  });
}

}  // namespace

PYBIND11_MODULE(_CUDA, module) {
#ifdef SEMISEG_EMULATED
  module.attr("device_type") = "cpu";
#else
  module.attr("device_type") = "cuda";
#endif
  module.def("driver_problem", &driver_problem);

  // Each returns the bytes of workspace it needs; given none (0), it does nothing else.
#define SEMISEG_BIND(name, Operation, direction) bind_kernel(module, #name, Direction::direction, cuda::name);
  SEMISEG_CUDA_KERNELS(SEMISEG_BIND)
#undef SEMISEG_BIND
}
