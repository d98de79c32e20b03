// Runs a launch: its clusters one after another, the threads of a cluster in a random order.

#include <algorithm>
#include <numeric>
#include <utility>

#include "machine.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace deeplab_fast::emulator {

Options options;
Machine machine;

namespace {

constexpr int64_t kMaxIdleYields = int64_t{1} << 24;  // in a row, before a block counts as spinning

// Runs one thread of the kernel, in its fiber. Fails if it exits with something not waited for.
void thread_main() {
  Thread& thread = *machine.running;
  tsan_acquire(&machine.launch_started);
  (*machine.body)();
  tsan_release(&machine.block_exited);
  const int64_t never_waited =
      std::count_if(thread.copies.begin(), thread.copies.end(),
                    [&](const Copy& copy) { return copy.number > thread.copies_awaited; });
  const auto fail_exit = [](const std::string& problem) {
    abandon(describe("thread", threadIdx) + describe(" of block", blockIdx) + " exited " + problem);
  };
  if (never_waited > 0) {
    fail_exit(text("with %d asynchronous copies never waited for", static_cast<int>(never_waited)));
  }
  if (thread.unwaited > 0)
    fail_exit(text("with %d asynchronous operations never waited for", thread.unwaited));
  if (thread.precedes)
    fail_exit("without griddepcontrol_wait in a launch that may overlap the one before");
  thread.state = State::kExited;
  ++machine.num_exited;
  machine.idle_yields = 0;
  thread.fiber.switch_to(machine.scheduler, /*dies=*/true);
}

void start_threads(Block& block) {
  block.block_barrier.reset();
  for (Barrier& barrier : block.named_barriers) barrier.reset();
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

// Takes a random thread from those that can run. In a cluster one block is favoured for a while and
// so runs ahead, then another.
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

// Frees shared memory in the name of a fiber that comes after all threads of the cluster. The
// scheduler must not: later blocks come after it, so accesses of two blocks to the same memory
// would seem to be in order.
void free_shared_memory_for_tsan() {
  for (int b = 0; b < machine.num_blocks; ++b) {
    for (int i = 0; i < machine.num_threads; ++i) {
      const Thread& thread = *machine.blocks[b].threads[i];
      if (thread.state == State::kExited) continue;
      __tsan_switch_to_fiber(thread.fiber.tsan(), kTsanNoSync);
      tsan_release(&machine.block_exited);
    }
  }
  void* after = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(after, kTsanNoSync);
  tsan_acquire(&machine.block_exited);
  for (Block& block : machine.blocks) block.shared.reset();
  tsan_release(&machine.block_exited);
  __tsan_switch_to_fiber(machine.scheduler.tsan(), kTsanNoSync);
  __tsan_destroy_fiber(after);
}

// Runs the blocks of a cluster until all their threads have exited, or machine.error has the reason
// why they cannot.
void run_cluster(size_t shared_bytes) {
  machine.ready.clear();
  machine.operations.clear();
  machine.num_exited = 0;
  machine.landing = false;
  machine.cluster_barriers_completed = 0;
  machine.cluster_barrier.reset();
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
  if (__tsan_switch_to_fiber) free_shared_memory_for_tsan();
  for (int b = 0; b < machine.num_blocks; ++b) {
    machine.blocks[b].extension.reset();
    machine.blocks[b].shared.reset();
    for (int i = 0; i < machine.num_threads; ++i) machine.blocks[b].threads[i]->fiber.forget();
  }
}

// Error of a launch with this configuration; empty if it can run.
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

void make_ready(Thread& thread) {
  thread.state = State::kReady;
  machine.ready.push_back(&thread);
  machine.idle_yields = 0;
}

void suspend(Thread& thread) {
  land_some(thread);
  thread.fiber.switch_to(machine.scheduler);
  land_some(thread);
}

Thread& begin_wait(const char* function, Site site) {
  Thread& thread = *machine.running;
  thread.state = State::kWaiting;
  thread.function = function;
  thread.site = site;
  thread.mask = 0;
  thread.awaited = nullptr;
  return thread;
}

void yield(const char* function, Site site) {
  if (++machine.idle_yields > kMaxIdleYields) fail(function, site, "the block spins for ever");
  machine.ready.push_back(machine.running);
  suspend(*machine.running);
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

void wait_for_launches_before() { machine.running->precedes = false; }

void check_waited_for_launches(const char* function, Site site) {
  if (machine.running->precedes)
    fail(function, site, "no griddepcontrol_wait before this access to global memory");
}

}  // namespace deeplab_fast::emulator
