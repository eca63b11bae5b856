// Runs the threads of a block as fibers, and the blocks of a grid one after the other.
//
// Detected, and reported as the error of the kernel, with block and thread:
//   - a barrier or a collective of a warp that some thread never reaches, or reaches at another kind of collective,
//   - a shuffle that reads a lane which takes no part,
//   - writes beyond the end of dynamic shared memory,
//   - misaligned loads and stores, and indices outside arrays of known size (what is compiled with
//     -fsanitize=alignment,bounds calls the handlers below).
// Shared memory is full of NaN when a block starts, so a result that depends on what was not written shows it.
// A missing barrier changes results with the order of threads. The environment variable SEMISEG_EMULATED_ORDER sets
// that order, and the order of blocks: "forward" (the default) or "reverse", warp by warp, or "shuffled", all warps abreast.
// In reverse asynchronous copies are done at once.
// Not covered: loops that wait for another thread without a barrier; they never end.
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#error "the emulator switches stacks in x86-64 assembly"
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
bool emulator::copies_at_once = false;

// Saves the registers a function must preserve on the stack and its pointer in *from, and goes on where `to` was saved.
extern "C" EMULATOR_LOCAL void emulator_switch_stacks(void** from, void* to);
asm(R"(
  .text
  .hidden emulator_switch_stacks
  .globl emulator_switch_stacks
  .type emulator_switch_stacks, @function
emulator_switch_stacks:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
  .size emulator_switch_stacks, .-emulator_switch_stacks
)");

namespace emulator {
namespace {

constexpr int multiprocessors = 3;  // few, so that grids stay small
constexpr size_t max_threads = 1024, max_dynamic_shared = 227 * 1024, granted_dynamic_shared = 48 * 1024;
constexpr size_t stack_bytes = 256 * 1024, page_bytes = 4096, red_zone_bytes = 4096;
constexpr unsigned char poison = 0xFF;  // NaN in every floating-point format

// Where a fiber, or the scheduler, goes on.
struct Context {
  void* stack_pointer = nullptr;
  const void* stack = nullptr;  // lowest address and size: for the address sanitizer
  size_t bytes = 0;
  void* fake_stack = nullptr;
};

void switch_context(Context& from, Context& to, bool from_ends) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.fake_stack, to.stack, to.bytes);
#endif
  (void)from_ends;
  emulator_switch_stacks(&from.stack_pointer, to.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// Stacks above a guard page. A thread holds one from its first instruction to its last, so a kernel
// without barriers uses a single one.
class Stacks {
 public:
  char* take() {
    if (free_.empty()) free_.push_back(map());
    char* stack = free_.back();
    free_.pop_back();
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack, stack_bytes);  // a kernel that faulted leaves frames behind
#endif
    return stack;
  }

  void give_back(char* stack) { free_.push_back(stack); }

 private:
  static char* map() {
    void* memory = mmap(nullptr, page_bytes + stack_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page_bytes, PROT_NONE) != 0) {
      std::fprintf(stderr, "emulator: no memory for the stack of a thread\n");
      std::abort();
    }
    return static_cast<char*>(memory) + page_bytes;
  }

  std::vector<char*> free_;
};

struct Thread {
  Context context;
  char* stack = nullptr;  // null before the first and after the last instruction
  bool ended = false;
  uint3 index{};
  unsigned number = 0;
  const unsigned* awaited = nullptr;  // waits until this generation is no longer the one it saw
  unsigned seen_generation = 0;
  const char* waits_at = nullptr;

  bool runnable() const { return !ended && (awaited == nullptr || *awaited != seen_generation); }
};

// Lanes that wait for each other. Two buffers: a lane may arrive at the next collective while another still reads
// the last one's values, but no lane gets further ahead.
struct Meeting {
  unsigned mask;
  Collective collective{};
  unsigned arrived = 0, generation = 0;
  uint64_t values[2][warpSize] = {};
};

struct Warp {
  unsigned lanes = 0;
  std::deque<Meeting> meetings;  // one for each mask in use
};

struct Block {
  std::vector<Thread> threads = std::vector<Thread>(max_threads);
  std::vector<Warp> warps = std::vector<Warp>(max_threads / warpSize);
  unsigned count = 0;  // of threads
  Thread* current = nullptr;
  Context scheduler;
  Stacks stacks;

  Barrier barrier{};
  unsigned arrived = 0, generation = 0;
  int passed[2] = {};  // how many passed the barrier's predicate, of this generation and the last

  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
  std::string fault;
} block;

std::mutex running;
std::unique_ptr<unsigned char[]> dynamic_shared;
std::map<const void*, size_t> allowed_dynamic_shared;
int last_error = cudaSuccess;
std::string last_fault;

std::string describe(const Thread& thread) {
  const auto& [x, y, z] = thread.index;
  return "thread (" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
}

void suspend(bool ends = false) { switch_context(block.current->context, block.scheduler, ends); }

void wait_for(const unsigned& generation, const char* where) {
  Thread& thread = *block.current;
  thread.awaited = &generation;
  thread.seen_generation = generation;
  thread.waits_at = where;
  suspend();
  thread.awaited = nullptr;
}

void run_thread() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler.stack, &block.scheduler.bytes);
#endif
  block.body(block.arguments);
  block.current->ended = true;
  suspend(true);
}

void start(Thread& thread) {
  thread.stack = block.stacks.take();
  // All stacks have the same alignment; with the same offset too they would compete for the same lines of the cache.
  char* top = thread.stack + stack_bytes - thread.number % 16 * 256;
  void** frame = reinterpret_cast<void**>(top) - 8;
  std::fill(frame, frame + 8, nullptr);                        // six registers, then where they return to
  frame[6] = reinterpret_cast<void*>(run_thread);
  thread.context = {frame, thread.stack, stack_bytes, nullptr};
}

void resume(Thread& thread) {
  if (thread.stack == nullptr) start(thread);
  block.current = &thread;
  threadIdx = thread.index;
  switch_context(block.scheduler, thread.context, false);
  block.current = nullptr;
  if (!thread.ended) return;
  block.stacks.give_back(thread.stack);
  thread.stack = nullptr;
}

std::string describe_deadlock() {
  std::map<std::string, std::pair<unsigned, const Thread*>> places;
  for (unsigned i = 0; i < block.count; ++i) {
    const Thread& thread = block.threads[i];
    auto& [count, example] = places[thread.ended ? "ended" : std::string("waits at ") + thread.waits_at];
    ++count;
    example = &thread;
  }
  std::string description = "threads wait for others that never come:";
  for (const auto& [place, entry] : places) {
    description += " " + std::to_string(entry.first) + " (" + describe(*entry.second) + "): " + place + ";";
  }
  description.pop_back();
  return description;
}

class Order {
 public:
  Order() {
    const char* given = std::getenv("SEMISEG_EMULATED_ORDER");
    name_ = given == nullptr ? "forward" : given;
  }
  bool valid() const { return name_ == "forward" || reverse() || shuffled(); }
  bool reverse() const { return name_ == "reverse"; }
  bool shuffled() const { return name_ == "shuffled"; }

  void arrange(std::vector<unsigned>& sequence) {
    for (unsigned i = 0; i < sequence.size(); ++i) sequence[i] = i;
    if (reverse()) std::reverse(sequence.begin(), sequence.end());
    if (shuffled()) std::shuffle(sequence.begin(), sequence.end(), generator_);
  }

 private:
  std::string name_;
  std::minstd_rand generator_;  // always with the same seed
};

thread_local volatile unsigned char touched;

// This thread's thread-local variables of this library: the kernels' static shared memory, and nothing else.
std::pair<unsigned char*, size_t> static_shared_memory() {
  touched = 0;  // they exist from the first access
  std::pair<unsigned char*, size_t> segment{};
  const auto find = [](dl_phdr_info* library, size_t, void* found) {
    const uintptr_t here = reinterpret_cast<uintptr_t>(&block);
    bool mine = false;
    size_t bytes = 0;
    for (int i = 0; i < library->dlpi_phnum; ++i) {
      const ElfW(Phdr)& header = library->dlpi_phdr[i];
      if (header.p_type == PT_LOAD && here - library->dlpi_addr - header.p_vaddr < header.p_memsz) mine = true;
      if (header.p_type == PT_TLS) bytes = header.p_memsz;
    }
    if (mine) *static_cast<decltype(segment)*>(found) = {static_cast<unsigned char*>(library->dlpi_tls_data), bytes};
    return int(mine);
  };
  dl_iterate_phdr(find, &segment);
  return segment;
}

struct SharedMemory {
  unsigned char* static_data;
  size_t static_bytes, dynamic_bytes;

  void poison_all() const {
    std::fill_n(static_data, static_bytes, poison);
    std::fill_n(dynamic_shared.get(), dynamic_bytes + red_zone_bytes, poison);
  }

  bool overrun() const {
    const unsigned char* red_zone = dynamic_shared.get() + dynamic_bytes;
    return std::count(red_zone, red_zone + red_zone_bytes, poison) != red_zone_bytes;
  }
};

void set_up_threads() {
  block.count = blockDim.x * blockDim.y * blockDim.z;
  for (unsigned i = 0; i < block.count; ++i) {
    Thread& thread = block.threads[i];
    thread.number = i;
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  }
  for (unsigned i = 0; i < block.warps.size(); ++i) {
    const unsigned lanes = std::min<unsigned>(warpSize, block.count - std::min<unsigned>(block.count, i * warpSize));
    block.warps[i].lanes = lanes == warpSize ? ~0u : (1u << lanes) - 1;
  }
}

void run_block(Order& order, std::vector<unsigned>& sequence, const SharedMemory& shared_memory) {
  shared_memory.poison_all();
  for (unsigned i = 0; i < block.count; ++i) block.threads[i].ended = false;
  unsigned ended = 0;
  // Runs those of the sequence that can go on, each to where it waits or ends; false where none can.
  const auto run = [&](size_t first, size_t last) {
    bool progress = false;
    for (size_t i = first; i < last && block.fault.empty(); ++i) {
      Thread& thread = block.threads[sequence[i]];
      if (!thread.runnable()) continue;
      resume(thread);
      progress = true;
      ended += thread.ended;
    }
    return progress;
  };
  while (ended < block.count && block.fault.empty()) {
    bool progress = false;
    if (order.shuffled()) {
      order.arrange(sequence);
      progress = run(0, block.count);
    } else {
      // Warp by warp, each as far ahead of the others as the block's barriers let it.
      for (size_t first = 0; first < block.count; first += warpSize)
        while (run(first, std::min<size_t>(first + warpSize, block.count))) progress = true;
    }
    if (!progress && block.fault.empty()) block.fault = describe_deadlock();
  }
  if (block.fault.empty() && shared_memory.overrun()) block.fault = "a write beyond the end of dynamic shared memory";
}

// Leaves nothing of a kernel that faulted for the next one.
void clean_up() {
  for (Thread& thread : block.threads) {
    if (thread.stack != nullptr) block.stacks.give_back(thread.stack);
    thread = {};
  }
  for (Warp& warp : block.warps) warp.meetings.clear();
  block.arrived = 0;
  std::fill(std::begin(block.passed), std::end(block.passed), 0);
  block.fault.clear();
}

bool fits(const dim3& grid, const dim3& block) {
  return grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x <= 0x7FFFFFFF && grid.y <= 65535 && grid.z <= 65535 &&
         block.x >= 1 && block.y >= 1 && block.z >= 1 && block.x <= 1024 && block.y <= 1024 && block.z <= 64 &&
         uint64_t(block.x) * block.y * block.z <= max_threads;
}

const char* name_of(Collective collective) {
  switch (collective) {
    case Collective::shuffle: return "a shuffle";
    case Collective::ballot: return "a vote";
    case Collective::reduce: return "a reduction";
    case Collective::match: return "a match";
    case Collective::synchronize: return "__syncwarp";
  }
  return "";
}

}  // namespace

unsigned lane() { return block.current->number % warpSize; }

unsigned lanes_of_warp() { return block.warps[block.current->number / warpSize].lanes; }

const uint64_t* gather(Collective collective, unsigned mask, uint64_t value) {
  if (!(mask >> lane() & 1)) fault("%s whose mask 0x%08x leaves out the calling lane", name_of(collective), mask);
  Warp& warp = block.warps[block.current->number / warpSize];
  auto meeting = std::find_if(warp.meetings.begin(), warp.meetings.end(), [&](auto& m) { return m.mask == mask; });
  if (meeting == warp.meetings.end()) meeting = warp.meetings.insert(meeting, Meeting{mask});
  if (meeting->arrived == 0) meeting->collective = collective;
  if (meeting->collective != collective) {
    fault("at %s while other lanes of the warp wait at %s", name_of(collective), name_of(meeting->collective));
  }
  uint64_t* values = meeting->values[meeting->generation % 2];
  values[lane()] = value;
  meeting->arrived |= 1u << lane();
  if (meeting->arrived == (mask & warp.lanes)) {
    meeting->arrived = 0;
    ++meeting->generation;
  } else {
    wait_for(meeting->generation, name_of(collective));
  }
  return values;
}

int barrier(Barrier kind, bool predicate) {
  if (block.arrived == 0) block.barrier = kind;
  if (block.barrier != kind) fault("at another kind of barrier than other threads of the block");
  int& passed = block.passed[block.generation % 2];
  passed += predicate;
  if (++block.arrived == block.count) {
    block.arrived = 0;
    ++block.generation;
    block.passed[block.generation % 2] = 0;
  } else {
    wait_for(block.generation, "__syncthreads");
  }
  return passed;
}

void* dynamic_shared_memory() { return dynamic_shared.get(); }

void fault(const char* format, ...) {
  char message[512];
  va_list values;
  va_start(values, format);
  std::vsnprintf(message, sizeof message, format, values);
  va_end(values);
  if (block.current == nullptr) {
    std::fprintf(stderr, "emulator: outside of a kernel: %s\n", message);
    std::abort();
  }
  block.fault = describe(*block.current) + ": " + message;
  suspend(true);
  __builtin_unreachable();
}

int set_last_error(int error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

int run(const void* kernel, const dim3& grid, const dim3& block_shape, size_t shared_bytes, void (*body)(void*),
        void* arguments) {
  std::lock_guard<std::mutex> lock(running);
  Order order;
  if (!fits(grid, block_shape)) return set_last_error(cudaErrorInvalidConfiguration);
  const auto allowed = allowed_dynamic_shared.find(kernel);
  if (shared_bytes > (allowed == allowed_dynamic_shared.end() ? granted_dynamic_shared : allowed->second) ||
      !order.valid()) {
    return set_last_error(cudaErrorInvalidValue);
  }
  if (!dynamic_shared) dynamic_shared = std::make_unique<unsigned char[]>(max_dynamic_shared + red_zone_bytes);
  const auto [static_data, static_bytes] = static_shared_memory();
  const SharedMemory shared_memory{static_data, static_bytes, shared_bytes};
  gridDim = grid;
  blockDim = block_shape;
  copies_at_once = order.reverse();
  block.body = body;
  block.arguments = arguments;
  set_up_threads();
  std::vector<unsigned> threads(block.count), blocks(size_t(grid.x) * grid.y * grid.z);
  order.arrange(threads);
  order.arrange(blocks);
  for (unsigned i : blocks) {
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    run_block(order, threads, shared_memory);
    if (block.fault.empty()) continue;
    last_fault = "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
                 std::to_string(blockIdx.z) + "): " + block.fault;
    clean_up();
    return set_last_error(cudaErrorLaunchFailure);
  }
  return cudaSuccess;
}

}  // namespace emulator

using namespace emulator;

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorLaunchFailure: return last_fault.c_str();
    default: return "unknown error";
  }
}

cudaError_t cudaPeekAtLastError() { return cudaError_t(last_error); }

cudaError_t cudaGetLastError() { return cudaError_t(std::exchange(last_error, cudaSuccess)); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaError_t(set_last_error(cudaErrorInvalidDevice));
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = max_threads; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = granted_dynamic_shared; break;
    case cudaDevAttrWarpSize: *value = warpSize; break;
    case cudaDevAttrMultiProcessorCount: *value = multiprocessors; break;
    case cudaDevAttrL2CacheSize: *value = 50 * 1024 * 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = max_dynamic_shared + 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = max_dynamic_shared; break;
    default: return cudaError_t(set_last_error(cudaErrorInvalidValue));
  }
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || size_t(value) > max_dynamic_shared) return cudaError_t(set_last_error(cudaErrorInvalidValue));
  std::lock_guard<std::mutex> lock(running);
  allowed_dynamic_shared[kernel] = value;
  return cudaSuccess;
}

// The mangled name. The dynamic symbols lack kernels in anonymous namespaces; addr2line reads all symbols.
cudaError_t cudaFuncGetName(const char** name, const void* kernel) {
  static std::string found;
  Dl_info library;
  if (dladdr(kernel, &library) == 0) return cudaErrorInvalidDeviceFunction;
  const auto offset = reinterpret_cast<uintptr_t>(kernel) - reinterpret_cast<uintptr_t>(library.dli_fbase);
  char command[4096 + 64];
  std::snprintf(command, sizeof command, "addr2line -f -e '%s' 0x%zx", library.dli_fname, size_t(offset));
  std::unique_ptr<FILE, int (*)(FILE*)> output(popen(command, "r"), pclose);
  char line[4096] = "";
  if (!output || std::fgets(line, sizeof line, output.get()) == nullptr) return cudaErrorInvalidDeviceFunction;
  found.assign(line, std::find(line, line + sizeof line, '\n'));
  *name = found.c_str();
  return cudaSuccess;
}

// What code compiled with -fsanitize=alignment,bounds calls; the compiler defines the arguments.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

extern "C" EMULATOR_LOCAL void __ubsan_handle_type_mismatch_v1(SourceLocation* location, uintptr_t address) {
  emulator::fault("misaligned access to 0x%zx at %s:%u", size_t(address), location->file, location->line);
}

extern "C" EMULATOR_LOCAL void __ubsan_handle_out_of_bounds(SourceLocation* location, uintptr_t index) {
  emulator::fault("index %zd is out of bounds at %s:%u", ssize_t(index), location->file, location->line);
}
