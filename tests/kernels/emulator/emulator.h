// What the emulated device functions ask of the emulator: the places where a thread waits for others, and misuse.
#pragma once

#include <cstddef>
#include <cstdint>

// Each library has an emulator of its own.
#define EMULATOR_LOCAL __attribute__((visibility("hidden")))

struct dim3;

namespace emulator {

enum class Collective { shuffle, ballot, reduce, match, synchronize };

// The values of all 32 lanes, once every lane of the mask has called this; valid until the lane calls it again.
EMULATOR_LOCAL const uint64_t* gather(Collective collective, unsigned mask, uint64_t value);

EMULATOR_LOCAL unsigned lane();
EMULATOR_LOCAL unsigned lanes_of_warp();  // one bit for each of the warp's threads

// Waits for all threads of the block; how many of them passed a predicate that is not 0.
enum class Barrier { plain, count, all_of, any_of };
EMULATOR_LOCAL int barrier(Barrier kind, bool predicate);

EMULATOR_LOCAL void* dynamic_shared_memory();

EMULATOR_LOCAL extern bool copies_at_once;  // see cuda_pipeline_primitives.h

// Ends the kernel that calls it, which then reports the message as its error.
[[noreturn]] EMULATOR_LOCAL void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Runs body(arguments) in every thread of the grid, one block after the other.
EMULATOR_LOCAL int run(const void* kernel, const dim3& grid, const dim3& block, size_t shared_bytes,
                       void (*body)(void* arguments), void* arguments);

// Reported to cudaGetErrorString and cudaGetLastError.
int set_last_error(int error);

}  // namespace emulator
