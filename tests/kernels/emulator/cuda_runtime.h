// CUDA's runtime for a C++ compiler: kernels run on the CPU, on ordinary memory, for tests without a GPU.
//
// Threads of a block are fibers that take turns where CUDA lets them wait for each other: at barriers and at the
// collectives of a warp. Blocks run one after the other. See emulator.cpp for what is detected beyond wrong numbers.
// Left out on purpose: atomics on floating-point numbers, whose sums depend on the order.
#pragma once

#include "emulated_vectors.h"
#include "emulator.h"

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __constant__ static const
// One copy is enough. Thread-local variables lie side by side, apart from all others, so that the emulator can
// fill them with NaN before each block.
#define __shared__ thread_local

EMULATOR_LOCAL extern uint3 threadIdx, blockIdx;
EMULATOR_LOCAL extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#include "emulated_intrinsics.h"
#include "emulated_host.h"
