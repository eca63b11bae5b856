// Exponentials and reciprocals in as few instructions as the losses can do with.
#pragma once

#include <cuda_runtime.h>

namespace semiseg {

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
