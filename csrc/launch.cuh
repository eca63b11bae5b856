// The launch of a kernel, the check of CUDA's return codes, and dynamic shared memory. Sources that launch through this
// header, and not with <<< >>>, also compile with a plain C++ compiler, for tests without a GPU (SEMISEG_EMULATED).
#pragma once

#include <cuda_runtime.h>
#include <cxxabi.h>

#include <cstddef>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>

namespace semiseg {

// Throws std::runtime_error("<what>: <CUDA's description>") unless the call succeeded.
inline void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the error is reported here: a later check must not see it again
  throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

template <typename... Parameters>
std::string kernel_name(void (*kernel)(Parameters...)) {
  const char* mangled = nullptr;
  if (cudaFuncGetName(&mangled, reinterpret_cast<const void*>(kernel)) != cudaSuccess) return "CUDA kernel";
  int status = 0;
  char* demangled = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  std::string name = status == 0 ? demangled : mangled;
  std::free(demangled);
  return name;
}

// Lets a kernel have more dynamic shared memory than it is granted without asking.
template <typename... Parameters>
void allow_shared_bytes(void (*kernel)(Parameters...), std::size_t shared_bytes) {
  constexpr std::size_t granted = 48 * 1024;
  if (shared_bytes <= granted) return;
  const cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(shared_bytes));
  if (error != cudaSuccess) check(error, kernel_name(kernel));
}

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...); throws std::runtime_error naming the kernel if it fails.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream,
            Arguments&&... arguments) {
  allow_shared_bytes(kernel, shared_bytes);
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = grid;
  configuration.blockDim = block;
  configuration.dynamicSmemBytes = shared_bytes;
  configuration.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&configuration, kernel, std::forward<Arguments>(arguments)...);
  if (error != cudaSuccess) check(error, kernel_name(kernel));
}

// The block's dynamic shared memory, 16-byte aligned: what `extern __shared__` declares.
template <typename Element>
__device__ __forceinline__ Element* dynamic_shared() {
#ifdef SEMISEG_EMULATED
  return static_cast<Element*>(emulator::dynamic_shared_memory());
#else
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<Element*>(dynamic_shared_memory);
#endif
}

}  // namespace semiseg
