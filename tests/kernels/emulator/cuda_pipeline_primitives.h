// Copies to shared memory that go on while a thread does. Here they are done when it waits for them, so that who reads too
// early finds what was there; or at once too (see emulator.cpp), so that who reads too late does not.
#pragma once

#include <cstring>
#include <deque>
#include <map>
#include <vector>

#include "cuda_runtime.h"

namespace emulator {

struct AsynchronousCopy {
  void* shared;
  const void* global;
  size_t bytes;
};

struct AsynchronousCopies {
  std::vector<AsynchronousCopy> begun;
  std::deque<std::vector<AsynchronousCopy>> committed;  // group by group
};

// Of the threads of the block that runs.
inline std::map<unsigned, AsynchronousCopies> asynchronous_copies;

inline AsynchronousCopies& own_copies() {
  return asynchronous_copies[threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)];
}

}  // namespace emulator

inline void __pipeline_memcpy_async(void* shared, const void* global, size_t bytes) {
  if (emulator::copies_at_once) std::memcpy(shared, global, bytes);
  emulator::own_copies().begun.push_back({shared, global, bytes});
}

inline void __pipeline_commit() {
  emulator::AsynchronousCopies& copies = emulator::own_copies();
  copies.committed.push_back(std::move(copies.begun));
  copies.begun.clear();
}

// Waits for all groups but the last `left`.
inline void __pipeline_wait_prior(size_t left) {
  std::deque<std::vector<emulator::AsynchronousCopy>>& committed = emulator::own_copies().committed;
  for (; committed.size() > left; committed.pop_front())
    for (const emulator::AsynchronousCopy& copy : committed.front()) std::memcpy(copy.shared, copy.global, copy.bytes);
}
