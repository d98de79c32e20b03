// Barriers of a block and of a cluster, and collective functions of a warp.

#include <cstring>
#include <utility>

#include "machine.h"

namespace deeplab_fast::emulator {

namespace {

bool same(const char* a, const char* b) { return a == b || strcmp(a, b) == 0; }

bool same(Site a, Site b) { return a.line == b.line && same(a.file, b.file); }

// Lets the threads that wait at the barrier go on.
void complete(Barrier& barrier) {
  for (Thread* thread : barrier.waiting) {
    acquire(*thread, &barrier);
    make_ready(*thread);
  }
  barrier.reset();
}

// Arrives at a named barrier.
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

}  // namespace

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

}  // namespace deeplab_fast::emulator
