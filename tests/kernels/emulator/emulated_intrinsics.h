// CUDA's functions for kernels.
#pragma once

#include <math.h>

#include <cstring>
#include <type_traits>

namespace emulator {

template <typename To, typename From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

template <typename Value>
uint64_t to_word(Value value) {
  static_assert(sizeof(Value) <= sizeof(uint64_t));
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  return word;
}

template <typename Value>
Value from_word(uint64_t word) {
  Value value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

template <typename Value>
Value shuffle(unsigned mask, Value value, int source, int width) {
  if (width < 1 || width > warpSize || (width & (width - 1))) fault("a shuffle of width %d", width);
  const uint64_t* words = gather(Collective::shuffle, mask, to_word(value));
  if (!(mask & lanes_of_warp() & (1u << source))) fault("a shuffle reads lane %d, which takes no part", source);
  return from_word<Value>(words[source]);
}

template <typename Value, typename Combine>
Value reduce(unsigned mask, Value value, Combine combine) {
  const uint64_t* words = gather(Collective::reduce, mask, to_word(value));
  bool first = true;
  Value result{};
  for (int lane = 0; lane < warpSize; ++lane) {
    if (!(mask & lanes_of_warp() & (1u << lane))) continue;
    const Value operand = from_word<Value>(words[lane]);
    result = first ? operand : combine(result, operand);
    first = false;
  }
  return result;
}

template <typename Value>
Value exchange(Value* address, Value desired) {
  const Value old = *address;
  *address = desired;
  return old;
}

}  // namespace emulator

// Barriers and memory fences

inline void __syncthreads() { emulator::barrier(emulator::Barrier::plain, false); }
inline int __syncthreads_count(int predicate) { return emulator::barrier(emulator::Barrier::count, predicate); }
inline int __syncthreads_or(int predicate) { return emulator::barrier(emulator::Barrier::any_of, predicate) > 0; }
inline int __syncthreads_and(int predicate) { return emulator::barrier(emulator::Barrier::all_of, !predicate) == 0; }
inline void __syncwarp(unsigned mask = ~0u) { emulator::gather(emulator::Collective::synchronize, mask, 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
[[noreturn]] inline void __trap() { emulator::fault("__trap()"); }

// Collectives of a warp

template <typename Value>
Value __shfl_sync(unsigned mask, Value value, int source, int width = warpSize) {
  const int lane = emulator::lane();
  return emulator::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), width);
}

template <typename Value>
Value __shfl_xor_sync(unsigned mask, Value value, int flipped, int width = warpSize) {
  const int lane = emulator::lane(), source = lane ^ flipped;
  return emulator::shuffle(mask, value, source < (lane & ~(width - 1)) + width ? source : lane, width);
}

template <typename Value>
Value __shfl_down_sync(unsigned mask, Value value, unsigned distance, int width = warpSize) {
  const int lane = emulator::lane(), source = lane + int(distance);
  return emulator::shuffle(mask, value, source < (lane & ~(width - 1)) + width ? source : lane, width);
}

template <typename Value>
Value __shfl_up_sync(unsigned mask, Value value, unsigned distance, int width = warpSize) {
  const int lane = emulator::lane(), source = lane - int(distance);
  return emulator::shuffle(mask, value, source >= (lane & ~(width - 1)) ? source : lane, width);
}

inline unsigned __activemask() { return emulator::lanes_of_warp(); }

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* words = emulator::gather(emulator::Collective::ballot, mask, predicate != 0);
  unsigned ballot = 0;
  for (int lane = 0; lane < warpSize; ++lane) ballot |= unsigned(words[lane]) << lane;
  return ballot & mask & emulator::lanes_of_warp();
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

template <typename Value>
unsigned __match_any_sync(unsigned mask, Value value) {
  const uint64_t* words = emulator::gather(emulator::Collective::match, mask, emulator::to_word(value));
  unsigned equal = 0;
  for (int lane = 0; lane < warpSize; ++lane) equal |= unsigned(words[lane] == emulator::to_word(value)) << lane;
  return equal & mask & emulator::lanes_of_warp();
}

#define EMULATED_REDUCTION(Value)                                                                                   \
  inline Value __reduce_add_sync(unsigned mask, Value value) {                                                      \
    return emulator::reduce(mask, value, [](Value a, Value b) { return Value(unsigned(a) + unsigned(b)); });         \
  }                                                                                                                 \
  inline Value __reduce_max_sync(unsigned mask, Value value) {                                                      \
    return emulator::reduce(mask, value, [](Value a, Value b) { return a > b ? a : b; });                            \
  }                                                                                                                 \
  inline Value __reduce_min_sync(unsigned mask, Value value) {                                                      \
    return emulator::reduce(mask, value, [](Value a, Value b) { return a < b ? a : b; });                            \
  }
EMULATED_REDUCTION(int)
EMULATED_REDUCTION(unsigned)
#undef EMULATED_REDUCTION

inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return emulator::reduce(mask, value, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return emulator::reduce(mask, value, [](unsigned a, unsigned b) { return a & b; });
}

// Atomics on integers: threads never interrupt each other between two collectives

#define EMULATED_ATOMICS(Value)                                                                                     \
  inline Value atomicAdd(Value* address, Value value) { return emulator::exchange(address, *address + value); }      \
  inline Value atomicExch(Value* address, Value value) { return emulator::exchange(address, value); }                \
  inline Value atomicMax(Value* address, Value value) {                                                             \
    return emulator::exchange(address, *address > value ? *address : value);                                        \
  }                                                                                                                 \
  inline Value atomicMin(Value* address, Value value) {                                                             \
    return emulator::exchange(address, *address < value ? *address : value);                                        \
  }                                                                                                                 \
  inline Value atomicOr(Value* address, Value value) { return emulator::exchange(address, *address | value); }       \
  inline Value atomicAnd(Value* address, Value value) { return emulator::exchange(address, *address & value); }      \
  inline Value atomicCAS(Value* address, Value expected, Value desired) {                                           \
    return emulator::exchange(address, *address == expected ? desired : *address);                                  \
  }
EMULATED_ATOMICS(int)
EMULATED_ATOMICS(unsigned)
EMULATED_ATOMICS(unsigned long long)
#undef EMULATED_ATOMICS

// Loads and stores that say how memory is cached

template <typename Value> Value __ldg(const Value* address) { return *address; }
template <typename Value> Value __ldca(const Value* address) { return *address; }
template <typename Value> Value __ldcg(const Value* address) { return *address; }
template <typename Value> Value __ldcs(const Value* address) { return *address; }
template <typename Value> Value __ldlu(const Value* address) { return *address; }
template <typename Value> void __stwb(Value* address, std::common_type_t<Value> value) { *address = value; }
template <typename Value> void __stcg(Value* address, std::common_type_t<Value> value) { *address = value; }
template <typename Value> void __stcs(Value* address, std::common_type_t<Value> value) { *address = value; }

// Arithmetic. Macros where the C library reserves the name. The approximations round as the GPU's do for large
// arguments: e^x as 2^(x log2 e), with the product in float.

#define __expf(x) emulator::approximate_exp(x)
#define __exp10f(x) exp2f(3.32192809f * (x))
#define __logf(x) emulator::approximate_log(x)
#define __log2f(x) log2f(x)
#define __powf(x, y) exp2f((y) * log2f(x))

namespace emulator {
inline float approximate_exp(float x) { return exp2f(1.44269504f * x); }
inline float approximate_log(float x) { return 0.693147181f * log2f(x); }
}  // namespace emulator

inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return float(1 / sqrt(double(x))); }
inline float rsqrtf(float x) { return float(1 / sqrt(double(x))); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline double __fma_rn(double x, double y, double z) { return fma(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
// The sum with another number must not become a fused multiplication and addition: the compiler loses sight of the
// product.
inline float __fmul_rn(float x, float y) {
  float product = x * y;
  __asm__("" : "+x"(product));
  return product;
}
inline double __dadd_rn(double x, double y) { return x + y; }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }

inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline float __double2float_rn(double x) { return float(x); }
inline int __float2int_rn(float x) { return int(rintf(x)); }
inline int __float2int_rd(float x) { return int(floorf(x)); }
inline int __float2int_rz(float x) { return int(x); }
inline int __float_as_int(float x) { return emulator::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return emulator::bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return emulator::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return emulator::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return emulator::bits_as<double>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline unsigned __umulhi(unsigned x, unsigned y) { return (uint64_t(x) * y) >> 32; }

#define EMULATED_MIN_MAX(Value)                                        \
  inline Value min(Value a, Value b) { return b < a ? b : a; }          \
  inline Value max(Value a, Value b) { return a < b ? b : a; }
EMULATED_MIN_MAX(int)
EMULATED_MIN_MAX(unsigned)
EMULATED_MIN_MAX(long)
EMULATED_MIN_MAX(unsigned long)
EMULATED_MIN_MAX(long long)
EMULATED_MIN_MAX(unsigned long long)
#undef EMULATED_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }  // like fminf and fmaxf, they prefer a number to NaN
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
