#include "simt.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include "fiber.h"

#ifdef __x86_64__
asm(R"(
.text
.globl deeplab_fast_switch_stack
.hidden deeplab_fast_switch_stack
.type deeplab_fast_switch_stack, @function
deeplab_fast_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size deeplab_fast_switch_stack, . - deeplab_fast_switch_stack
)");
#endif

// Absent, and so null, in a build without the sanitizer.
extern "C" {
__attribute__((weak)) void __tsan_acquire(void* address);
__attribute__((weak)) void __tsan_release(void* address);
__attribute__((weak)) void AnnotateIgnoreReadsBegin(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreReadsEnd(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreWritesBegin(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreWritesEnd(const char* file, int line);
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* address, size_t size);
}

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace deeplab_fast::emulator {

Options options;

namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr int kWarpSize = 32;
constexpr int kNamedBarriers = 16;
constexpr size_t kGuardBytes = 4096;
constexpr size_t kSharedAlignment = 1024;
constexpr int64_t kMaxIdleYields = int64_t{1} << 24;

// Even seeds: NaN in every float type, -1 in every integer. Odd seeds: small and positive in all of
// them, for kernels to which NaN or -1 means "not known".
unsigned char poison() { return options.seed % 2 == 0 ? 0xff : 0x3c; }

struct Copy {
  void* dst;
  const void* src;
  size_t bytes, src_bytes;
  int64_t group;
  bool landed;
};

enum class State { kReady, kWaiting, kExited };

struct Thread {
  Fiber fiber;
  int number;  // in the block
  uint3 index;
  State state;
  // Where it waits, and for a warp collective with which lanes and operands.
  const char* function;
  Site site;
  uint32_t mask;
  void* operands;
  // Asynchronous copies that no wait has covered yet.
  std::vector<Copy> copies;
  int64_t committed_groups;
};

struct Barrier {
  int arrived = 0, expected = 0;
  std::vector<Thread*> waiting;
};

struct Random {
  uint64_t state;
  // Below n <= 2^32; splitmix64 (Steele, Lea, Flood, OOPSLA 2014).
  uint64_t operator()(uint64_t n) {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return ((z ^ (z >> 31)) >> 32) * n >> 32;
  }
};

// A block's shared memory, poisoned, between guards in which stray writes show afterwards.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : bytes_(bytes) {
    allocation_.resize(bytes + 2 * kGuardBytes + kSharedAlignment, poison());
    const auto start = reinterpret_cast<uintptr_t>(allocation_.data()) + kGuardBytes;
    data_ = allocation_.data() + kGuardBytes + (-start & (kSharedAlignment - 1));
    if (__asan_poison_memory_region) {
      __asan_poison_memory_region(data_ - kGuardBytes, kGuardBytes);
      __asan_poison_memory_region(data_ + bytes_, kGuardBytes);
    }
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory() { open_guards(); }

  unsigned char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

  bool guards_are_intact() const {
    open_guards();
    const auto poisoned = [](unsigned char byte) { return byte == poison(); };
    return std::all_of(data_ - kGuardBytes, data_, poisoned) &&
           std::all_of(data_ + bytes_, data_ + bytes_ + kGuardBytes, poisoned);
  }

 private:
  void open_guards() const {
    if (__asan_unpoison_memory_region)
      __asan_unpoison_memory_region(data_ - kGuardBytes, bytes_ + 2 * kGuardBytes);
  }

  std::vector<unsigned char> allocation_;
  unsigned char* data_;
  size_t bytes_;
};

// ThreadSanitizer ignores what the running thread does to memory while one of these lives.
struct IgnoreAccesses {
  IgnoreAccesses() {
    if (AnnotateIgnoreReadsBegin) AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    if (AnnotateIgnoreWritesBegin) AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~IgnoreAccesses() {
    if (AnnotateIgnoreWritesEnd) AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    if (AnnotateIgnoreReadsEnd) AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};

// The launch in progress; there is one at a time.
struct Machine {
  Machine() {
    ready.reserve(kMaxThreads);  // once and for all, here: no thread's memory access
    block_barrier.waiting.reserve(kMaxThreads);
    for (Barrier& barrier : named_barriers) barrier.waiting.reserve(kMaxThreads);
  }

  std::mutex mutex;
  Fiber scheduler;
  std::vector<std::unique_ptr<Thread>> threads;
  std::string error;

  const std::function<void()>* body;
  Random random;
  SharedMemory* shared;
  int num_threads, num_exited;
  int64_t idle_yields;
  Thread* running;
  std::vector<Thread*> ready;
  Barrier block_barrier;
  Barrier named_barriers[kNamedBarriers];
  // What the sanitizer orders memory accesses by; its address is all that matters.
  char launch_started, block_exited, warp_synced[kMaxThreads / kWarpSize];
};
Machine machine;

void release(void* address) {
  if (__tsan_release) __tsan_release(address);
}

void acquire(void* address) {
  if (__tsan_acquire) __tsan_acquire(address);
}

// On behalf of a thread that is waiting.
void acquire_as(const Thread& thread, void* address) {
  if (!__tsan_switch_to_fiber) return;
  __tsan_switch_to_fiber(thread.fiber.tsan(), kTsanNoSync);
  __tsan_acquire(address);
  __tsan_switch_to_fiber(machine.running->fiber.tsan(), kTsanNoSync);
}

std::string text(const char* format, va_list args) {
  char buffer[512];
  vsnprintf(buffer, sizeof(buffer), format, args);
  return buffer;
}

__attribute__((format(printf, 1, 2))) std::string text(const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::string result = text(format, args);
  va_end(args);
  return result;
}

std::string describe(Site site) {
  const char* slash = strrchr(site.file, '/');
  return text("%s:%d", slash ? slash + 1 : site.file, site.line);
}

std::string describe(const char* what, uint3 index) {
  return text("%s (%u, %u, %u)", what, index.x, index.y, index.z);
}

std::string describe(const Thread& thread) {
  if (thread.state == State::kExited) return "exited";
  return std::string("in ") + thread.function + " at " + describe(thread.site);
}

// "; warp 0: lanes 0-15 in __syncthreads at a.cu:3, lanes 16-31 exited; warp 1: ..."
std::string describe_warps() {
  std::string result;
  for (int first = 0; first < machine.num_threads; first += kWarpSize) {
    result += text("; warp %d:", first / kWarpSize);
    const int end = std::min(first + kWarpSize, machine.num_threads);
    for (int begin = first, i = first; i < end; ++i) {
      const std::string place = describe(*machine.threads[i]);
      if (i + 1 < end && describe(*machine.threads[i + 1]) == place) continue;
      result += text("%s lanes %d-%d ", begin > first ? "," : "", begin - first, i - first) + place;
      begin = i + 1;
    }
  }
  return result;
}

bool same(const char* a, const char* b) { return a == b || strcmp(a, b) == 0; }

bool same(Site a, Site b) { return a.line == b.line && same(a.file, b.file); }

[[noreturn]] void abandon(const std::string& error) {
  {
    const IgnoreAccesses ignore;
    machine.error = error;
  }
  machine.running->fiber.switch_to(machine.scheduler, /*dies=*/true);
  __builtin_unreachable();
}

// memcpy and memset are the sanitizers' own where there is one, and so check both ranges.
void land(Copy& copy) {
  memcpy(copy.dst, copy.src, copy.src_bytes);
  memset(static_cast<char*>(copy.dst) + copy.src_bytes, 0, copy.bytes - copy.src_bytes);
  copy.landed = true;
}

void land_some(Thread& thread) {
  if (options.seed < 2) return;
  for (Copy& copy : thread.copies)
    if (!copy.landed && machine.random(4) == 0) land(copy);
}

// Lets others run until this thread is ready and its turn comes.
void suspend(Thread& thread) {
  land_some(thread);
  thread.fiber.switch_to(machine.scheduler);
  land_some(thread);
}

// The thread is waiting from here on; it may be made ready before it is suspended.
Thread& begin_wait(const char* function, Site site) {
  Thread& thread = *machine.running;
  thread.state = State::kWaiting;
  thread.function = function;
  thread.site = site;
  thread.mask = 0;
  return thread;
}

void make_ready(Thread& thread) {
  thread.state = State::kReady;
  machine.ready.push_back(&thread);
  machine.idle_yields = 0;
}

void reset(Barrier& barrier) {
  barrier.waiting.clear();
  barrier.arrived = 0;
}

void complete(Barrier& barrier) {
  for (Thread* thread : barrier.waiting) {
    acquire_as(*thread, &barrier);
    make_ready(*thread);
  }
  reset(barrier);
}

void arrive(const char* function, Barrier& barrier, int id, int threads, Site site) {
  if (threads <= 0 || threads % kWarpSize != 0)
    fail(function, site, "%d threads are not whole warps", threads);
  if (barrier.arrived > 0 && barrier.expected != threads) {
    fail(function, site, "barrier %d is for %d threads here and for %d elsewhere", id, threads,
         barrier.expected);
  }
  barrier.expected = threads;
  ++barrier.arrived;
  release(&barrier);
}

Barrier& named_barrier(const char* function, int id, Site site) {
  if (id < 1 || id >= kNamedBarriers) fail(function, site, "barrier %d is not 1 to 15", id);
  return machine.named_barriers[id];
}

void thread_main() {
  Thread& thread = *machine.running;
  acquire(&machine.launch_started);
  (*machine.body)();
  release(&machine.block_exited);
  if (!thread.copies.empty()) {
    abandon(describe("thread", threadIdx) + describe(" of block", blockIdx) +
            text(" exited with %zu asynchronous copies never waited for", thread.copies.size()));
  }
  thread.state = State::kExited;
  ++machine.num_exited;
  machine.idle_yields = 0;
  thread.fiber.switch_to(machine.scheduler, /*dies=*/true);
}

void start_threads() {
  machine.ready.clear();
  machine.num_exited = 0;
  reset(machine.block_barrier);
  for (Barrier& barrier : machine.named_barriers) reset(barrier);
  for (int i = 0; i < machine.num_threads; ++i) {
    if (static_cast<int>(machine.threads.size()) == i)
      machine.threads.push_back(std::make_unique<Thread>());
    Thread& thread = *machine.threads[i];
    const auto number = static_cast<unsigned>(i);
    thread.number = i;
    thread.index = {number % blockDim.x, number / blockDim.x % blockDim.y,
                    number / blockDim.x / blockDim.y};
    thread.copies.clear();
    thread.committed_groups = 0;
    thread.fiber.start(&thread_main);
    make_ready(thread);
  }
}

// Runs a block until all its threads have exited, or machine.error says why they cannot.
void run_block(size_t shared_bytes) {
  auto shared = std::make_unique<SharedMemory>(shared_bytes);
  machine.shared = shared.get();
  release(&machine.launch_started);
  start_threads();
  while (machine.error.empty() && !machine.ready.empty()) {
    std::swap(machine.ready[machine.random(machine.ready.size())], machine.ready.back());
    machine.running = machine.ready.back();
    machine.ready.pop_back();
    threadIdx = machine.running->index;
    machine.scheduler.switch_to(machine.running->fiber);
  }
  if (machine.error.empty()) {
    if (machine.num_exited < machine.num_threads) {
      machine.error = describe("block", blockIdx) + " waits for ever" + describe_warps();
    } else if (!shared->guards_are_intact()) {
      machine.error = describe("block", blockIdx) +
                      text(" wrote outside its %zu bytes of shared memory", shared->bytes());
    }
  }
  if (__tsan_switch_to_fiber) {
    for (int i = 0; i < machine.num_threads; ++i) {
      if (machine.threads[i]->state == State::kExited) continue;
      __tsan_switch_to_fiber(machine.threads[i]->fiber.tsan(), kTsanNoSync);
      release(&machine.block_exited);
    }
    // Freed as a fiber that comes after this block: the scheduler, which later blocks come after,
    // must not, or accesses of two blocks to the same memory would seem to be in order.
    void* after = __tsan_create_fiber(0);
    __tsan_switch_to_fiber(after, kTsanNoSync);
    acquire(&machine.block_exited);
    shared.reset();
    release(&machine.block_exited);
    __tsan_switch_to_fiber(machine.scheduler.tsan(), kTsanNoSync);
    __tsan_destroy_fiber(after);
  }
  for (int i = 0; i < machine.num_threads; ++i) machine.threads[i]->fiber.forget();
}

std::string invalid_configuration(dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64)
    return text("block (%u, %u, %u) is not 1 to 1024 threads", block.x, block.y, block.z);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > UINT16_MAX ||
      grid.z > UINT16_MAX)
    return text("grid (%u, %u, %u) is empty or too large", grid.x, grid.y, grid.z);
  if (shared_bytes > options.shared_memory_limit) {
    return text("needs %zu bytes of shared memory, the device has %zu", shared_bytes,
                options.shared_memory_limit);
  }
  return {};
}

}  // namespace

Status run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes,
           const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  machine.error = invalid_configuration(grid, block, shared_bytes);
  if (!machine.error.empty()) return {kernel, machine.error.c_str()};

  gridDim = grid;
  blockDim = block;
  machine.body = &thread;
  machine.random = {options.seed};
  machine.num_threads = static_cast<int>(block.x * block.y * block.z);
  machine.scheduler.adopt_current_thread();
  std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), uint64_t{0});
  for (; !blocks.empty() && machine.error.empty(); blocks.pop_back()) {
    std::swap(blocks[machine.random(blocks.size())], blocks.back());
    const uint64_t i = blocks.back();
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    run_block(shared_bytes);
  }
  acquire(&machine.block_exited);
  if (!machine.error.empty()) return {kernel, machine.error.c_str()};
  return {};
}

int lane() { return machine.running->number % kWarpSize; }

void* shared_memory() { return machine.shared->data(); }

void check_shared(const char* function, const void* address, size_t bytes, Site site) {
  const auto offset =
      reinterpret_cast<intptr_t>(address) - reinterpret_cast<intptr_t>(machine.shared->data());
  const auto end = static_cast<intptr_t>(machine.shared->bytes());
  const auto size = static_cast<intptr_t>(bytes);
  if (offset < 0 || offset + size > end)
    fail(function, site, "offset %td is not in the %td bytes of shared memory", offset, end);
  if (offset % size != 0)
    fail(function, site, "offset %td in shared memory is no multiple of %td", offset, size);
}

void fail(const char* function, Site site, const char* format, ...) {
  va_list args;
  va_start(args, format);
  const std::string message = text(format, args);
  va_end(args);
  abandon(std::string(function) + " at " + describe(site) + ": " + message +
          describe(", thread", threadIdx) + describe(" of block", blockIdx));
}

void yield(const char* function, Site site) {
  if (++machine.idle_yields > kMaxIdleYields) fail(function, site, "the block spins for ever");
  machine.ready.push_back(machine.running);
  suspend(*machine.running);
}

void block_barrier(const char* function, Site site) {
  Barrier& barrier = machine.block_barrier;
  release(&barrier);
  Thread& thread = begin_wait(function, site);
  barrier.waiting.push_back(&thread);
  if (++barrier.arrived == machine.num_threads) {
    for (const Thread* other : barrier.waiting) {
      if (!same(other->site, site)) {
        fail(function, site, "other threads of the block are in the one at %s",
             describe(other->site).c_str());
      }
    }
    complete(barrier);
  }
  suspend(thread);
}

void named_barrier_sync(const char* function, int id, int threads, Site site) {
  Barrier& barrier = named_barrier(function, id, site);
  arrive(function, barrier, id, threads, site);
  Thread& thread = begin_wait(function, site);
  barrier.waiting.push_back(&thread);
  if (barrier.arrived == threads) complete(barrier);
  suspend(thread);
}

void named_barrier_arrive(const char* function, int id, int threads, Site site) {
  Barrier& barrier = named_barrier(function, id, site);
  arrive(function, barrier, id, threads, site);
  if (barrier.arrived == threads) complete(barrier);
}

void warp_collective(const char* function, uint32_t mask, void* operands, Evaluate evaluate,
                     bool orders_memory, Site site) {
  const int warp = machine.running->number / kWarpSize;
  char* synced = &machine.warp_synced[warp];
  if ((mask >> lane() & 1) == 0)
    fail(function, site, "lane %d is not in its mask %08x", lane(), mask);
  if (orders_memory) release(synced);
  Thread& thread = begin_wait(function, site);
  thread.mask = mask;
  thread.operands = operands;

  Thread* lanes[kWarpSize] = {};
  void* all_operands[kWarpSize] = {};
  bool all_here = true;
  for (int i = 0; i < kWarpSize && all_here; ++i) {
    if ((mask >> i & 1) == 0) continue;
    const int number = warp * kWarpSize + i;
    if (number >= machine.num_threads)
      fail(function, site, "mask %08x names lane %d, which does not exist", mask, i);
    lanes[i] = machine.threads[number].get();
    all_operands[i] = lanes[i]->operands;
    all_here = lanes[i]->state == State::kWaiting && lanes[i]->mask == mask &&
               same(lanes[i]->site, site) && same(lanes[i]->function, function);
  }
  if (all_here) {
    {
      const IgnoreAccesses ignore;  // operands are registers, which no other lane can race for
      evaluate(all_operands);
    }
    for (Thread* other : lanes) {
      if (!other) continue;
      if (orders_memory) acquire_as(*other, synced);
      make_ready(*other);
    }
  }
  suspend(thread);
}

void copy_async(void* dst, const void* src, size_t bytes, size_t src_bytes) {
  Thread& thread = *machine.running;
  Copy copy{dst, src, bytes, src_bytes, thread.committed_groups, false};
  if (options.seed == 0) {
    land(copy);
  } else {
    memset(dst, poison(), bytes);  // neither the old contents nor the new may be relied on
  }
  {
    const IgnoreAccesses ignore;
    thread.copies.push_back(copy);
  }
  land_some(thread);
}

void commit_copies() {
  Thread& thread = *machine.running;
  ++thread.committed_groups;
  land_some(thread);
}

void wait_for_copies(int groups_left) {
  Thread& thread = *machine.running;
  const auto covered = [&](const Copy& copy) {
    return copy.group + groups_left < thread.committed_groups;
  };
  for (Copy& copy : thread.copies)
    if (covered(copy) && !copy.landed) land(copy);
  const IgnoreAccesses ignore;
  thread.copies.erase(std::remove_if(thread.copies.begin(), thread.copies.end(), covered),
                      thread.copies.end());
}

}  // namespace deeplab_fast::emulator
