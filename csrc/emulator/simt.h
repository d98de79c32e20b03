// Emulator of a GPU: runs CUDA kernels on the CPU, to test them without a GPU. Every thread of a
// block is a fiber, blocks run one after another, and all of them on the calling OS thread. Threads
// and blocks run in a random order, asynchronous copies land at a random moment that their waits
// allow, and shared memory starts as poison, so that a kernel that is right by luck fails for some
// seed. A thread that waits for ever, or that does what CUDA leaves undefined, fails the launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "api.h"
#include "sanitizers.h"

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace deeplab_fast::emulator {

// The order of threads and the moments at which copies land repeat for the same seed. Seed 0 lands
// every copy when it is issued, seed 1 as late as its wait allows, the others in between.
struct Options {
  uint64_t seed = 0;
  size_t shared_memory_limit = 163 * 1024;  // bytes a block can have; this is sm_80's
  // Clusters [begin, end) of the grid that run, by kernel; a negative begin counts from the end of
  // the grid. A launch of a huge grid runs only its last clusters, because all would take too long.
  std::map<std::string, std::pair<int64_t, int64_t>> clusters{};
};
extern Options options;

// A line of a .cu file. As a default argument, here() is the caller's line.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// Calls `thread` once for each thread of the grid. The cluster_size blocks of a cluster, neighbours
// in x, run at once. Kernels run one after another, but if `overlaps` is set, every thread has to
// wait for the kernel before, as on a GPU where the two may overlap. The message of a failed Status
// lives until the next launch.
Status run(const char* kernel, dim3 grid, dim3 block, unsigned cluster_size, bool overlaps,
           size_t shared_bytes, const std::function<void()>& thread);

template <typename... Params, typename... Args>
Status launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block,
              unsigned cluster_size, bool overlaps, size_t shared_bytes, const Args&... args) {
  return run(name, grid, block, cluster_size, overlaps, shared_bytes, [&] { kernel(args...); });
}

// Number of launches of each kernel in this process.
const std::map<std::string, int64_t>& launch_counts();

// The rest is called by the threads of a running kernel. `function` is the name for error messages.

// Number of this thread in its warp and in its block.
int lane();
int thread_number();

// The block's shared memory, aligned to 1024 bytes.
void* shared_memory();
size_t shared_bytes();

// Number of the block in its cluster, and the number of blocks there.
int cluster_rank();
int cluster_size();

// The address in the shared memory of another block of the cluster that corresponds to p in this
// one.
void* in_block(int rank, const void* p);

// True if all threads of another block of the cluster have exited: its shared memory is gone.
bool has_exited(int rank);

// State that a layer above keeps for a block; null when the block starts.
std::shared_ptr<void>& block_extension(int rank);

// Fails the launch unless [address, address + bytes) is in shared memory and aligned to its size.
void check_shared(const char* function, const void* address, size_t bytes, Site site);

// Abandons the launch with this message, formatted as by printf.
[[noreturn]] __attribute__((format(printf, 3, 4))) void fail(const char* function, Site site,
                                                             const char* format, ...);

// A random number below n.
uint64_t random(uint64_t n);

// Suspends the thread until another calls wake with the same address.
void wait_on(const void* address, const char* function, Site site);
void wake(const void* address);

// Orders what the thread does before `release` before what others do after `acquire`.
void release(void* address);
void acquire(void* address);

// An asynchronous operation. It lands when it is started for seed 0, when no thread can go on
// otherwise for seed 1, and at a random moment for the other seeds; or when a thread calls `land`.
struct Operation {
  std::function<void()> effect;
  bool landed = false;
};
void start(const std::shared_ptr<Operation>& operation);
void land(Operation& operation);

// Adds to the number of operations that only this thread can wait for: positive when it starts
// some, negative when it has waited for them. It is an error if the number is not 0 when the thread
// exits.
void add_unwaited(int operations);

// Lets other threads run.
void yield(const char* function, Site site);

// Returns once every thread of the block is here, at the same line.
void block_barrier(const char* function, Site site);

// Returns once `threads` threads have arrived at barrier 1 to 15.
void named_barrier_sync(const char* function, int id, int threads, Site site);

// Every thread of the cluster arrives, then waits. Orders no accesses to memory.
void cluster_barrier_arrive(const char* function, Site site);
void cluster_barrier_wait(const char* function, Site site);

// Returns once every lane of mask is here, at the same line and with the same mask. By then
// `evaluate` has run, once, on the lanes' operands (null for lanes not in mask). With
// orders_memory, each lane sees what the others wrote before.
using Evaluate = void (*)(void* const operands[32]);
void warp_collective(const char* function, uint32_t mask, void* operands, Evaluate evaluate,
                     bool orders_memory, Site site);

// From here on this thread may read what earlier kernels wrote, and write what they read.
void wait_for_launches_before();

// Fails the launch if the thread has not waited for the earlier kernels.
void check_waited_for_launches(const char* function, Site site);

// cp.async and its groups, a FIFO per thread. Bytes of dst from src_bytes on become zeros.
void copy_async(void* dst, const void* src, size_t bytes, size_t src_bytes);
void commit_copies();
void wait_for_copies(int groups_left);

// Starts an operation that calls `arrive` when the copies that this thread has started so far have
// landed. They are released, in its name, to threads that acquire `address` then.
void after_copies(void* address, std::function<void()> arrive);

// A fence between the proxies: makes the copies that this thread knows to have landed, its own that
// it has waited for and those that it has acquired, visible to the asynchronous proxy. Returns the
// number of the fence, which counts from 1 in each block.
int32_t fence_proxies();

// Number of the last fence that every lane of this warp knows of, its own or acquired; 0 if none.
int32_t last_fence_of_warp();

// The thread whose copy was the last to these 16 bytes of the block's shared memory, if some lane
// of this warp does not know that the copy was fenced; else -1.
int unfenced_copy(const void* p);

// Forgets copies to these bytes of a block's shared memory, which something else overwrites.
void forget_copies(int rank, const void* p, size_t bytes);

}  // namespace deeplab_fast::emulator
