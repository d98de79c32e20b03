// State of the emulator: the launch in progress, its blocks and their threads. Only the emulator's
// own sources include this; kernels see simt.h.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "fiber.h"
#include "sanitizers.h"
#include "shared_memory.h"
#include "simt.h"

namespace deeplab_fast::emulator {

constexpr unsigned kMaxThreads = 1024;   // threads in a block
constexpr unsigned kMaxClusterSize = 8;  // the largest portable size
constexpr int kWarpSize = 32;
constexpr int kNamedBarriers = 16;

// An asynchronous copy (cp.async) in flight.
struct Copy {
  void* dst;
  const void* src;
  size_t bytes, src_bytes;
  int32_t number;  // counts the copies of its thread, from 1
  bool landed;
};

// Events in its block that a thread knows of, by its own waits and by what it has acquired.
struct Knowledge {
  std::vector<int32_t>
      landed;  // number of copies, by the thread that issued them, that have landed
  std::vector<int32_t> fenced;  // number of these that a fence between the proxies covers
  int32_t fence = 0;            // number of the last fence between the proxies

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

// The last copy to a line of shared memory.
struct CopiedLine {
  int32_t thread;
  int32_t number;  // among the copies of this thread; 0: no copy went to the line
};

enum class State { kReady, kWaiting, kExited };

struct Block;

struct Thread {
  Fiber fiber;
  Block* block;
  int number;  // in the block
  uint3 index;
  State state;

  // While it waits: the function and line, the lanes and operands of a warp collective, and the
  // address that it waits on.
  const char* function;
  Site site;
  uint32_t mask;
  void* operands;
  const void* awaited;

  std::vector<Copy> copies;     // that neither a wait nor an arrival after them has covered yet
  int32_t copies_started;       // number of all copies so far
  int32_t copies_awaited;       // number of these that an arrival will cover
  std::vector<int32_t> groups;  // the last copy of each committed group
  Knowledge knowledge;
  int unwaited;             // operations other than copies that only it can wait for
  int64_t cluster_barrier;  // the one that it has arrived at and not waited for, or -1
  bool precedes;            // it may run before the previous launches have ended
};

struct Barrier {
  int arrived = 0, expected = 0;
  std::vector<Thread*> waiting;

  void reset() {
    waiting.clear();
    arrived = 0;
  }
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

struct Block {
  Block() {
    // Reserved once and for all, so that a thread that waits does not allocate memory.
    block_barrier.waiting.reserve(kMaxThreads);
    for (Barrier& barrier : named_barriers) barrier.waiting.reserve(kMaxThreads);
  }

  uint3 index;
  int rank;  // in the cluster
  std::unique_ptr<SharedMemory> shared;
  std::shared_ptr<void> extension;
  std::vector<std::unique_ptr<Thread>> threads;
  Barrier block_barrier;
  Barrier named_barriers[kNamedBarriers];
  char warp_synced[kMaxThreads / kWarpSize];  // addresses by which ThreadSanitizer orders accesses
  std::vector<CopiedLine> copied_lines;       // of the shared memory; empty before the first copy
  std::unordered_map<const void*, Knowledge> released;  // by the address of the release
  int32_t proxy_fences;                                 // number of fences between the proxies
};

// The launch in progress; there is one at a time.
struct Machine {
  Machine() {
    ready.reserve(kMaxClusterSize * kMaxThreads);
    cluster_barrier.waiting.reserve(kMaxClusterSize * kMaxThreads);
  }

  std::mutex mutex;
  Fiber scheduler;
  Block blocks[kMaxClusterSize];  // the cluster that runs
  std::string error;
  std::map<std::string, int64_t> launch_counts;

  const std::function<void()>* body;  // the kernel, as one thread calls it
  Random random;
  int num_blocks;   // in a cluster
  int num_threads;  // in a block
  bool overlaps;
  int num_exited;
  int64_t idle_yields;
  uint64_t favoured;  // number of the favoured block, modulo num_blocks
  bool landing;       // an operation is landing: its failure is a C++ exception
  Thread* running;
  std::vector<Thread*> ready;
  std::vector<std::shared_ptr<Operation>> operations;  // in flight
  Barrier cluster_barrier;
  int64_t cluster_barriers_completed;
  char launch_started, block_exited;  // addresses by which ThreadSanitizer orders accesses
};
extern Machine machine;

inline Block& this_block() { return *machine.running->block; }

// failure.cpp

__attribute__((format(printf, 1, 0))) std::string text(const char* format, va_list args);
__attribute__((format(printf, 1, 2))) std::string text(const char* format, ...);
std::string describe(Site site);
std::string describe(const char* what, uint3 index);

// Error of the cluster that has just run: threads that wait for ever, a stray write, or an
// operation still in flight; empty if there is none.
std::string describe_end();

// Ends the launch with this error.
[[noreturn]] void abandon(const std::string& error);

// scheduler.cpp

void make_ready(Thread& thread);

// Lets others run until this thread is ready and its turn comes.
void suspend(Thread& thread);

// Marks the running thread as waiting. It may be made ready again before it is suspended.
Thread& begin_wait(const char* function, Site site);

// async.cpp

// Lets ThreadSanitizer attribute what `action` does to `thread`.
template <typename Action>
void as(const Thread& thread, Action action) {
  if (!__tsan_switch_to_fiber) return action();
  void* current = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(thread.fiber.tsan(), kTsanNoSync);
  action();
  __tsan_switch_to_fiber(current, kTsanNoSync);
}

// Acquires for a thread that is not the running one.
void acquire(Thread& thread, void* address);

// Lands one operation; there must be one in flight.
void land_any_operation();

// Lands some of the thread's copies and of all operations, at random; none for seeds 0 and 1.
void land_some(Thread& thread);

}  // namespace deeplab_fast::emulator
