// Where an operation runs, and memory carved into arrays.
#pragma once

#include "launch.cuh"
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
    bytes += (n * int64_t(sizeof(T)) + alignment - 1) / alignment * alignment;
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

// 2^x, but 0 where it is not a normal number: half of the instructions of exp2f are for those.
__device__ __forceinline__ float approximate_exp2(float x) {
#ifdef SEMISEG_EMULATED
  return exp2f(x);
#else
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#endif
}

// 1 / x of a normal number whose reciprocal is one: most of a division's instructions are for the others.
__device__ __forceinline__ float reciprocal(float x) {
#ifdef SEMISEG_EMULATED
  return 1 / x;
#else
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return fmaf(fmaf(-inverse, x, 1.f), inverse, inverse);
#endif
}

// What a softmax's logits are divided by.
struct Temperature {
  float inverse, of_exponent;  // of_exponent: e^(x / temperature) = 2^(x of_exponent)

  __host__ __device__ explicit Temperature(float temperature)
      : inverse(1 / temperature), of_exponent(1.44269504f / temperature) {}
  __device__ __forceinline__ float exponential(float x) const { return approximate_exp2(x * of_exponent); }
};

}  // namespace semiseg
