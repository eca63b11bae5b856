// Where an operation runs, and memory carved into arrays.
#pragma once

#include "launch.cuh"
#include "rounding.h"
#include "voxels.h"

namespace semiseg {

struct Device {
  int index = 0;
  cudaStream_t stream = nullptr;
  void* workspace = nullptr;  // null: the operation only says how many bytes it needs
};

// Hands out aligned arrays one after the other; from a null address it only counts.
struct Arena {
  char* base;
  int64_t bytes = 0;

  template <class T>
  __host__ __device__ T* take(int64_t n) {
    constexpr int64_t alignment = 16;
    T* array = reinterpret_cast<T*>(base + bytes);
    bytes += round_up(n * int64_t(sizeof(T)), alignment);
    return array;
  }
};

// Makes a device the current one for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int index) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != index) check(cudaSetDevice(index), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

inline int multiprocessors(const Device& device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device.index), "cudaDeviceGetAttribute");
  return count;
}

constexpr int THREADS = 128;  // of every block
// At least so many blocks run at once on a multiprocessor: the compiler has registers enough, and knows how many.
constexpr int FORWARD_BLOCKS = 3;
// For compute capability 9.0 the compiler needs fewer registers than for the others, which share their intermediate code
// (setup.py).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr bool SPARES_REGISTERS = true;
#else
constexpr bool SPARES_REGISTERS = false;
#endif
constexpr int WARP = 32, WARPS = THREADS / WARP;
constexpr unsigned ALL_LANES = 0xffffffffu;

}  // namespace semiseg
