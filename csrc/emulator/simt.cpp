#include "simt.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <unordered_map>
#include <utility>
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

constexpr unsigned kMaxThreads = 1024;   // of a block
constexpr unsigned kMaxClusterSize = 8;  // that is portable
constexpr int kWarpSize = 32;
constexpr int kNamedBarriers = 16;
constexpr size_t kGuardBytes = 4096;
constexpr size_t kSharedAlignment = 1024;
constexpr size_t kLineBytes = 16;  // that one copy brings at most
constexpr int64_t kMaxIdleYields = int64_t{1} << 24;

// Even seeds: NaN in every float type, -1 in every integer. Odd seeds: small and positive in all of
// them, for kernels to which NaN or -1 means "not known".
unsigned char poison() { return options.seed % 2 == 0 ? 0xff : 0x3c; }

struct Copy {
  void* dst;
  const void* src;
  size_t bytes, src_bytes;
  int32_t number;  // among the thread's, from 1
  bool landed;
};

// What somebody knows of what has happened in the block: of the copies of each thread, how many,
// from the first on, have landed, and how many of those are fenced, none of threads past the end;
// and the last fence of the proxies, by its number.
struct Knowledge {
  std::vector<int32_t> landed, fenced;
  int32_t fence = 0;

  void clear() {
    landed.clear();
    fenced.clear();
    fence = 0;
  }

  void add(const Knowledge& other) {
    add(landed, other.landed);
    add(fenced, other.fenced);
    fence = std::max(fence, other.fence);
  }

  static void add(std::vector<int32_t>& mine, const std::vector<int32_t>& others) {
    mine.resize(std::max(mine.size(), others.size()));
    for (size_t i = 0; i < others.size(); ++i) mine[i] = std::max(mine[i], others[i]);
  }

  void add_landed(size_t thread, int32_t copies) {
    landed.resize(std::max(landed.size(), thread + 1));
    landed[thread] = std::max(landed[thread], copies);
  }
};

// The last copy to 16 bytes: its thread, and its number among the thread's copies, 0 if none.
struct CopiedLine {
  int32_t thread, number;
};

enum class State { kReady, kWaiting, kExited };

struct Block;

struct Thread {
  Fiber fiber;
  Block* block;
  int number;  // in the block
  uint3 index;
  State state;
  // Where it waits, and for a warp collective with which lanes and operands.
  const char* function;
  Site site;
  uint32_t mask;
  void* operands;
  const void* awaited;
  // Asynchronous copies that neither a wait nor an arrival after them has covered yet; how many
  // were started, all in all, how many of those an arrival will cover, and the last of each group.
  std::vector<Copy> copies;
  int32_t copies_started;
  int32_t copies_awaited;
  std::vector<int32_t> groups;
  Knowledge knowledge;
  int unwaited;             // operations of other kinds
  int64_t cluster_barrier;  // the one that it has arrived at and not waited for, or -1
  bool precedes;            // it may run before the launches before have ended
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

struct Block {
  Block() {
    block_barrier.waiting.reserve(kMaxThreads);  // once and for all: no thread's memory access
    for (Barrier& barrier : named_barriers) barrier.waiting.reserve(kMaxThreads);
  }

  uint3 index;
  int rank;  // in the cluster
  std::unique_ptr<SharedMemory> shared;
  std::shared_ptr<void> extension;
  std::vector<std::unique_ptr<Thread>> threads;
  Barrier block_barrier;
  Barrier named_barriers[kNamedBarriers];
  char warp_synced[kMaxThreads / kWarpSize];  // what the sanitizer orders memory accesses by
  std::vector<CopiedLine> copied_lines;       // of shared memory, or empty
  std::unordered_map<const void*, Knowledge> released;  // by the address
  int32_t proxy_fences;                                 // so far
};

// The launch in progress; there is one at a time.
struct Machine {
  Machine() {
    ready.reserve(kMaxClusterSize * kMaxThreads);
    cluster_barrier.waiting.reserve(kMaxClusterSize * kMaxThreads);
  }

  std::mutex mutex;
  Fiber scheduler;
  Block blocks[kMaxClusterSize];
  std::string error;
  std::map<std::string, int64_t> launch_counts;

  const std::function<void()>* body;
  Random random;
  int num_blocks, num_threads;  // in a cluster, in a block
  bool overlaps;
  int num_exited;
  int64_t idle_yields;
  uint64_t favoured;  // block, modulo their number
  bool landing;       // an operation, whose failure is an exception
  Thread* running;
  std::vector<Thread*> ready;
  std::vector<std::shared_ptr<Operation>> operations;  // that have not landed
  Barrier cluster_barrier;
  int64_t cluster_barriers_completed;
  // What the sanitizer orders memory accesses by; its address is all that matters.
  char launch_started, block_exited;
};
Machine machine;

Block& this_block() { return *machine.running->block; }

// Of the block's shared memory.
size_t line_of(const Block& block, const void* p) {
  return static_cast<size_t>(static_cast<const unsigned char*>(p) - block.shared->data()) /
         kLineBytes;
}

// Lets the sanitizer take what action does for what this thread does.
template <typename Action>
void as(const Thread& thread, Action action) {
  if (!__tsan_switch_to_fiber) return action();
  void* current = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(thread.fiber.tsan(), kTsanNoSync);
  action();
  __tsan_switch_to_fiber(current, kTsanNoSync);
}

void tsan_release(void* address) {
  if (__tsan_release) __tsan_release(address);
}

void tsan_acquire(void* address) {
  if (__tsan_acquire) __tsan_acquire(address);
}

// What the sanitizer is not told: the knowledge that was released there.
void learn(Thread& thread, const void* address) {
  const auto found = thread.block->released.find(address);
  if (found == thread.block->released.end()) return;
  const IgnoreAccesses ignore;
  thread.knowledge.add(found->second);
}

void acquire(Thread& thread, void* address) {
  as(thread, [&] { tsan_acquire(address); });
  learn(thread, address);
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
std::string describe_warps(const Block& block) {
  std::string result;
  for (int first = 0; first < machine.num_threads; first += kWarpSize) {
    result += text("; warp %d:", first / kWarpSize);
    const int end = std::min(first + kWarpSize, machine.num_threads);
    for (int begin = first, i = first; i < end; ++i) {
      const std::string place = describe(*block.threads[i]);
      if (i + 1 < end && describe(*block.threads[i + 1]) == place) continue;
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
    if (machine.landing) throw error;
    if (machine.error.empty()) machine.error = error;
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

// Its copies up to this one.
void land_until(Thread& thread, int32_t last) {
  const auto covered = [&](const Copy& copy) { return copy.number <= last; };
  for (Copy& copy : thread.copies)
    if (covered(copy) && !copy.landed) land(copy);
  const IgnoreAccesses ignore;
  thread.copies.erase(std::remove_if(thread.copies.begin(), thread.copies.end(), covered),
                      thread.copies.end());
}

// There must be one under way.
void land_any_operation() {
  const std::shared_ptr<Operation> operation =
      machine.operations[machine.random(machine.operations.size())];
  land(*operation);
}

void land_some(Thread& thread) {
  if (options.seed < 2) return;
  for (Copy& copy : thread.copies)
    if (!copy.landed && machine.random(4) == 0) land(copy);
  if (!machine.operations.empty() && machine.random(4) == 0) land_any_operation();
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
  thread.awaited = nullptr;
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
    acquire(*thread, &barrier);
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
  return this_block().named_barriers[id];
}

void thread_main() {
  Thread& thread = *machine.running;
  tsan_acquire(&machine.launch_started);
  (*machine.body)();
  tsan_release(&machine.block_exited);
  const int64_t never_waited =
      std::count_if(thread.copies.begin(), thread.copies.end(),
                    [&](const Copy& copy) { return copy.number > thread.copies_awaited; });
  if (never_waited > 0) {
    abandon(describe("thread", threadIdx) + describe(" of block", blockIdx) +
            text(" exited with %d asynchronous copies never waited for",
                 static_cast<int>(never_waited)));
  }
  if (thread.unwaited > 0) {
    abandon(describe("thread", threadIdx) + describe(" of block", blockIdx) +
            text(" exited with %d asynchronous operations never waited for", thread.unwaited));
  }
  if (thread.precedes) {
    abandon(describe("thread", threadIdx) + describe(" of block", blockIdx) +
            " exited without griddepcontrol_wait in a launch that may overlap the one before");
  }
  thread.state = State::kExited;
  ++machine.num_exited;
  machine.idle_yields = 0;
  thread.fiber.switch_to(machine.scheduler, /*dies=*/true);
}

void start_threads(Block& block) {
  reset(block.block_barrier);
  for (Barrier& barrier : block.named_barriers) reset(barrier);
  block.copied_lines.clear();
  block.released.clear();
  block.proxy_fences = 0;
  for (int i = 0; i < machine.num_threads; ++i) {
    if (static_cast<int>(block.threads.size()) == i)
      block.threads.push_back(std::make_unique<Thread>());
    Thread& thread = *block.threads[i];
    const auto number = static_cast<unsigned>(i);
    thread.block = &block;
    thread.number = i;
    thread.index = {number % blockDim.x, number / blockDim.x % blockDim.y,
                    number / blockDim.x / blockDim.y};
    thread.copies.clear();
    thread.copies_started = 0;
    thread.copies_awaited = 0;
    thread.groups.clear();
    thread.knowledge.clear();
    thread.unwaited = 0;
    thread.cluster_barrier = -1;
    thread.precedes = machine.overlaps;
    thread.fiber.start(&thread_main);
    make_ready(thread);
  }
}

// Any of those that can run, but one block of a cluster runs ahead for a while, then another.
Thread* next_thread() {
  auto& ready = machine.ready;
  size_t i = machine.random(ready.size());
  if (machine.num_blocks > 1) {
    if (machine.random(1024) == 0) machine.favoured = machine.random(kMaxClusterSize);
    const Block* favoured = &machine.blocks[machine.favoured % machine.num_blocks];
    for (int trials = 8; trials > 0 && ready[i]->block != favoured; --trials)
      i = machine.random(ready.size());
  }
  std::swap(ready[i], ready.back());
  Thread* thread = ready.back();
  ready.pop_back();
  return thread;
}

std::string describe(const Block& block) { return describe("block", block.index); }

// What is wrong after all threads have exited or none can go on.
std::string describe_end() {
  std::string waiting;
  for (int i = 0; i < machine.num_blocks; ++i)
    waiting += (i > 0 ? "; " : "") + describe(machine.blocks[i]) + " waits for ever" +
               describe_warps(machine.blocks[i]);
  if (machine.num_exited < machine.num_blocks * machine.num_threads) return waiting;
  for (int i = 0; i < machine.num_blocks; ++i) {
    const SharedMemory& shared = *machine.blocks[i].shared;
    if (shared.guards_are_intact()) continue;
    return describe(machine.blocks[i]) +
           text(" wrote outside its %zu bytes of shared memory", shared.bytes());
  }
  if (machine.operations.empty()) return {};
  return describe(machine.blocks[0]) +
         text(" exited with %zu asynchronous operations under way", machine.operations.size());
}

// Runs the blocks of a cluster until all their threads have exited, or machine.error says why they
// cannot.
void run_cluster(size_t shared_bytes) {
  machine.ready.clear();
  machine.operations.clear();
  machine.num_exited = 0;
  machine.landing = false;
  machine.cluster_barriers_completed = 0;
  reset(machine.cluster_barrier);
  for (int i = 0; i < machine.num_blocks; ++i)
    machine.blocks[i].shared = std::make_unique<SharedMemory>(shared_bytes);
  tsan_release(&machine.launch_started);
  for (int i = 0; i < machine.num_blocks; ++i) start_threads(machine.blocks[i]);
  const int num_threads = machine.num_blocks * machine.num_threads;
  while (machine.error.empty() && machine.num_exited < num_threads) {
    if (!machine.ready.empty()) {
      machine.running = next_thread();
      threadIdx = machine.running->index;
      blockIdx = this_block().index;
      machine.scheduler.switch_to(machine.running->fiber);
    } else if (!machine.operations.empty()) {
      land_any_operation();
    } else {
      break;
    }
  }
  if (machine.error.empty()) machine.error = describe_end();
  machine.operations.clear();
  if (__tsan_switch_to_fiber) {
    for (int b = 0; b < machine.num_blocks; ++b) {
      for (int i = 0; i < machine.num_threads; ++i) {
        const Thread& thread = *machine.blocks[b].threads[i];
        if (thread.state == State::kExited) continue;
        __tsan_switch_to_fiber(thread.fiber.tsan(), kTsanNoSync);
        tsan_release(&machine.block_exited);
      }
    }
    // Freed as a fiber that comes after this block: the scheduler, which later blocks come after,
    // must not, or accesses of two blocks to the same memory would seem to be in order.
    void* after = __tsan_create_fiber(0);
    __tsan_switch_to_fiber(after, kTsanNoSync);
    tsan_acquire(&machine.block_exited);
    for (Block& block : machine.blocks) block.shared.reset();
    tsan_release(&machine.block_exited);
    __tsan_switch_to_fiber(machine.scheduler.tsan(), kTsanNoSync);
    __tsan_destroy_fiber(after);
  }
  for (int b = 0; b < machine.num_blocks; ++b) {
    machine.blocks[b].extension.reset();
    machine.blocks[b].shared.reset();
    for (int i = 0; i < machine.num_threads; ++i) machine.blocks[b].threads[i]->fiber.forget();
  }
}

std::string invalid_configuration(dim3 grid, dim3 block, unsigned cluster_size,
                                  size_t shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64)
    return text("block (%u, %u, %u) is not 1 to 1024 threads", block.x, block.y, block.z);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > UINT16_MAX ||
      grid.z > UINT16_MAX)
    return text("grid (%u, %u, %u) is empty or too large", grid.x, grid.y, grid.z);
  if (cluster_size < 1 || cluster_size > kMaxClusterSize || grid.x % cluster_size != 0)
    return text("grid (%u, %u, %u) is not clusters of 1 to 8: %u", grid.x, grid.y, grid.z,
                cluster_size);
  if (shared_bytes > options.shared_memory_limit) {
    return text("needs %zu bytes of shared memory, the device has %zu", shared_bytes,
                options.shared_memory_limit);
  }
  return {};
}

// The range of clusters that options.clusters selects from the `count` clusters of a grid.
std::pair<int64_t, int64_t> clusters_to_run(const char* kernel, int64_t count) {
  const auto found = options.clusters.find(kernel);
  if (found == options.clusters.end()) return {0, count};
  const auto [begin, end] = found->second;
  const int64_t first = std::clamp<int64_t>(begin < 0 ? count + begin : begin, 0, count);
  return {first, std::clamp(end, first, count)};
}

}  // namespace

IgnoreAccesses::IgnoreAccesses() {
  if (AnnotateIgnoreReadsBegin) AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  if (AnnotateIgnoreWritesBegin) AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}

IgnoreAccesses::~IgnoreAccesses() {
  if (AnnotateIgnoreWritesEnd) AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  if (AnnotateIgnoreReadsEnd) AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}

Status run(const char* kernel, dim3 grid, dim3 block, unsigned cluster_size, bool overlaps,
           size_t shared_bytes, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  machine.error = invalid_configuration(grid, block, cluster_size, shared_bytes);
  if (!machine.error.empty()) return {kernel, machine.error.c_str()};

  ++machine.launch_counts[kernel];
  gridDim = grid;
  blockDim = block;
  machine.body = &thread;
  machine.overlaps = overlaps;
  machine.random = {options.seed};
  machine.favoured = options.seed;
  machine.num_blocks = static_cast<int>(cluster_size);
  machine.num_threads = static_cast<int>(block.x * block.y * block.z);
  machine.scheduler.adopt_current_thread();
  const unsigned clusters_x = grid.x / cluster_size;
  const auto [begin, end] = clusters_to_run(kernel, int64_t{clusters_x} * grid.y * grid.z);
  std::vector<uint64_t> clusters(static_cast<size_t>(end - begin));
  std::iota(clusters.begin(), clusters.end(), static_cast<uint64_t>(begin));
  for (; !clusters.empty() && machine.error.empty(); clusters.pop_back()) {
    std::swap(clusters[machine.random(clusters.size())], clusters.back());
    const uint64_t i = clusters.back();
    for (unsigned rank = 0; rank < cluster_size; ++rank) {
      machine.blocks[rank].rank = static_cast<int>(rank);
      machine.blocks[rank].index = {static_cast<unsigned>(i % clusters_x * cluster_size + rank),
                                    static_cast<unsigned>(i / clusters_x % grid.y),
                                    static_cast<unsigned>(i / clusters_x / grid.y)};
    }
    run_cluster(shared_bytes);
  }
  tsan_acquire(&machine.block_exited);
  if (!machine.error.empty()) return {kernel, machine.error.c_str()};
  return {};
}

const std::map<std::string, int64_t>& launch_counts() { return machine.launch_counts; }

int lane() { return machine.running->number % kWarpSize; }

int thread_number() { return machine.running->number; }

void* shared_memory() { return this_block().shared->data(); }

size_t shared_bytes() { return this_block().shared->bytes(); }

int cluster_rank() { return this_block().rank; }

int cluster_size() { return machine.num_blocks; }

void* in_block(int rank, const void* p) {
  const auto offset = static_cast<const unsigned char*>(p) - this_block().shared->data();
  return machine.blocks[rank].shared->data() + offset;
}

bool has_exited(int rank) {
  const auto& threads = machine.blocks[rank].threads;
  return std::all_of(threads.begin(), threads.begin() + machine.num_threads,
                     [](const auto& thread) { return thread->state == State::kExited; });
}

std::shared_ptr<void>& block_extension(int rank) { return machine.blocks[rank].extension; }

uint64_t random(uint64_t n) { return machine.random(n); }

void release(void* address) {
  tsan_release(address);
  const Knowledge& mine = machine.running->knowledge;
  if (mine.landed.empty() && mine.fence == 0) return;
  const IgnoreAccesses ignore;
  this_block().released[address].add(mine);
}

void acquire(void* address) {
  tsan_acquire(address);
  learn(*machine.running, address);
}

void start(const std::shared_ptr<Operation>& operation) {
  if (options.seed == 0) {
    land(*operation);
    return;
  }
  const IgnoreAccesses ignore;
  machine.operations.push_back(operation);
}

void land(Operation& operation) {
  if (operation.landed) return;
  operation.landed = true;
  const IgnoreAccesses ignore;
  auto& all = machine.operations;
  all.erase(std::remove_if(all.begin(), all.end(),
                           [&](const auto& other) { return other.get() == &operation; }),
            all.end());
  const std::function<void()> effect = std::exchange(operation.effect, nullptr);
  const bool outer = std::exchange(machine.landing, true);
  try {
    effect();
  } catch (const std::string& error) {
    if (machine.error.empty()) machine.error = error;
  }
  machine.landing = outer;
}

void add_unwaited(int operations) { machine.running->unwaited += operations; }

void check_shared(const char* function, const void* address, size_t bytes, Site site) {
  const auto offset =
      reinterpret_cast<intptr_t>(address) - reinterpret_cast<intptr_t>(shared_memory());
  const auto end = static_cast<intptr_t>(shared_bytes());
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
  Barrier& barrier = this_block().block_barrier;
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

void cluster_barrier_arrive(const char* function, Site site) {
  Barrier& barrier = machine.cluster_barrier;
  int64_t& arrived_at = machine.running->cluster_barrier;
  if (arrived_at >= 0) fail(function, site, "this thread has arrived before and not waited");
  arrived_at = machine.cluster_barriers_completed;
  if (++barrier.arrived < machine.num_blocks * machine.num_threads) return;
  ++machine.cluster_barriers_completed;
  complete(barrier);
}

void cluster_barrier_wait(const char* function, Site site) {
  Barrier& barrier = machine.cluster_barrier;
  const int64_t arrived_at = std::exchange(machine.running->cluster_barrier, -1);
  if (arrived_at < 0) fail(function, site, "this thread has not arrived");
  if (arrived_at < machine.cluster_barriers_completed) return;
  Thread& thread = begin_wait(function, site);
  barrier.waiting.push_back(&thread);
  suspend(thread);
}

void wait_on(const void* address, const char* function, Site site) {
  Thread& thread = begin_wait(function, site);
  thread.awaited = address;
  suspend(thread);
}

void wake(const void* address) {
  for (int b = 0; b < machine.num_blocks; ++b) {
    for (int i = 0; i < machine.num_threads; ++i) {
      Thread& thread = *machine.blocks[b].threads[i];
      if (thread.state != State::kWaiting || thread.awaited != address) continue;
      thread.awaited = nullptr;
      make_ready(thread);
    }
  }
}

void warp_collective(const char* function, uint32_t mask, void* operands, Evaluate evaluate,
                     bool orders_memory, Site site) {
  const int warp = machine.running->number / kWarpSize;
  char* synced = &this_block().warp_synced[warp];
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
    lanes[i] = this_block().threads[number].get();
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
      if (orders_memory) acquire(*other, synced);
      make_ready(*other);
    }
  }
  suspend(thread);
}

void wait_for_launches_before() { machine.running->precedes = false; }

void check_waited_for_launches(const char* function, Site site) {
  if (machine.running->precedes)
    fail(function, site, "no griddepcontrol_wait before this access to global memory");
}

void copy_async(void* dst, const void* src, size_t bytes, size_t src_bytes) {
  Thread& thread = *machine.running;
  Copy copy{dst, src, bytes, src_bytes, ++thread.copies_started, false};
  if (options.seed == 0) {
    land(copy);
  } else {
    memset(dst, poison(), bytes);  // neither the old contents nor the new may be relied on
  }
  {
    const IgnoreAccesses ignore;
    thread.copies.push_back(copy);
    this_block().copied_lines.resize(shared_bytes() / kLineBytes + 1);
    this_block().copied_lines[line_of(this_block(), dst)] = {thread.number, copy.number};
  }
  land_some(thread);
}

void commit_copies() {
  Thread& thread = *machine.running;
  {
    const IgnoreAccesses ignore;
    thread.groups.push_back(thread.copies_started);
  }
  land_some(thread);
}

void wait_for_copies(int groups_left) {
  Thread& thread = *machine.running;
  const auto groups = static_cast<int>(thread.groups.size());
  if (groups <= groups_left) return;
  const int32_t last = thread.groups[groups - groups_left - 1];
  land_until(thread, last);
  const IgnoreAccesses ignore;
  thread.knowledge.add_landed(static_cast<size_t>(thread.number), last);
}

void after_copies(void* address, std::function<void()> arrive) {
  Thread& thread = *machine.running;
  const int32_t last = thread.copies_started;
  thread.copies_awaited = last;
  auto operation = std::make_shared<Operation>();
  operation->effect = [=, &thread] {
    as(thread, [&] {
      land_until(thread, last);
      tsan_release(address);
    });
    thread.block->released[address].add_landed(static_cast<size_t>(thread.number), last);
    arrive();
  };
  start(operation);
}

int32_t fence_proxies() {
  const IgnoreAccesses ignore;
  Knowledge& mine = machine.running->knowledge;
  mine.fenced = mine.landed;
  mine.fence = ++this_block().proxy_fences;
  return mine.fence;
}

int32_t last_fence_of_warp() {
  int32_t fence = INT32_MAX;
  const int first = machine.running->number / kWarpSize * kWarpSize;
  for (int i = first; i < first + kWarpSize; ++i)
    fence = std::min(fence, this_block().threads[i]->knowledge.fence);
  return fence;
}

int unfenced_copy(const void* p) {
  const Block& block = this_block();
  if (block.copied_lines.empty()) return -1;
  const auto [copier, number] = block.copied_lines[line_of(block, p)];
  const int warp = machine.running->number / kWarpSize;
  for (int i = 0; number > 0 && i < kWarpSize; ++i) {
    const std::vector<int32_t>& fenced = block.threads[warp * kWarpSize + i]->knowledge.fenced;
    if (static_cast<size_t>(copier) >= fenced.size() || fenced[copier] < number) return copier;
  }
  return -1;
}

void forget_copies(int rank, const void* p, size_t bytes) {
  Block& block = machine.blocks[rank];
  if (block.copied_lines.empty()) return;
  const size_t first = line_of(block, p);
  std::fill_n(block.copied_lines.begin() + static_cast<std::ptrdiff_t>(first), bytes / kLineBytes,
              CopiedLine{});
}

}  // namespace deeplab_fast::emulator
