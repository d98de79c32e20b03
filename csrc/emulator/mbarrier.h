// The mbarrier functions of cuda/common/ptx_sm90.cuh.
#pragma once

#include <cstdint>
#include <memory>

#include "block_state.h"
#include "ptx.h"
#include "simt.h"

namespace deeplab_fast::emulator {

// An mbarrier, packed into its 64 bits: the phase, the arrivals expected and still pending, the
// bytes that copies have yet to bring, and the state of its initialisation.
struct Barrier64 {
  enum Tag { kUninitialised, kInitialised, kFenced };
  static constexpr uint64_t kMaxCount = (1 << 20) - 1;
  bool phase;
  int64_t expected, pending, bytes;
  Tag tag;

  static Barrier64 load(const uint64_t* p) {
    const uint64_t word = *p;
    const auto bytes = static_cast<int64_t>(word << 2) >> 43;
    const auto tag = word >> 62 == 3 ? kUninitialised : static_cast<Tag>(word >> 62);
    return {(word & 1) != 0, static_cast<int64_t>(word >> 1 & kMaxCount),
            static_cast<int64_t>(word >> 21 & kMaxCount), bytes, tag};
  }

  void store(uint64_t* p) const {
    *p = static_cast<uint64_t>(phase) | static_cast<uint64_t>(expected) << 1 |
         static_cast<uint64_t>(pending) << 21 | (static_cast<uint64_t>(bytes) << 43) >> 2 |
         static_cast<uint64_t>(tag) << 62;
  }

  // Stores the mbarrier, in the next phase if this one is complete.
  void update(uint64_t* p) {
    const bool completes = pending == 0 && bytes == 0;
    if (completes) {
      phase = !phase;
      pending = expected;
    }
    store(p);
    if (completes) wake(p);
  }
};

inline Barrier64 load_barrier(const char* function, const uint64_t* p, Site site) {
  const Barrier64 barrier = Barrier64::load(p);
  if (barrier.tag == Barrier64::kUninitialised)
    fail(function, site, "this is no mbarrier: it was not initialised, or written over");
  return barrier;
}

// Fails unless the initialisation is visible to other blocks of the cluster and to copies.
inline void check_shown(const char* function, const uint64_t* p, Site site) {
  const IgnoreAccesses ignore;
  if (load_barrier(function, p, site).tag != Barrier64::kFenced)
    fail(function, site, "no fence.mbarrier_init since the mbarrier was initialised");
}

inline void count_arrival(const char* function, uint64_t* p, int64_t bytes, Site site) {
  const IgnoreAccesses ignore;
  Barrier64 barrier = load_barrier(function, p, site);
  if (barrier.pending == 0) fail(function, site, "more arrivals than the mbarrier expects");
  barrier.bytes += bytes;
  if (barrier.bytes > static_cast<int64_t>(Barrier64::kMaxCount))
    fail(function, site, "an mbarrier cannot expect %lld bytes",
         static_cast<long long>(barrier.bytes));
  --barrier.pending;
  barrier.update(p);
}

inline void arrive(const char* function, uint64_t* p, int64_t bytes, Site site) {
  release(p);
  count_arrival(function, p, bytes, site);
}

}  // namespace deeplab_fast::emulator

namespace deeplab_fast::ptx {

inline void mbarrier_init(uint64_t* barrier, int count, Site site = Site::here()) {
  using emulator::Barrier64;
  emulator::check_shared("mbarrier_init", barrier, sizeof(*barrier), site);
  if (count < 1 || count > static_cast<int>(Barrier64::kMaxCount))
    emulator::fail("mbarrier_init", site, "count %d is not 1 to 2^20 - 1", count);
  const emulator::IgnoreAccesses ignore;
  Barrier64{false, count, count, 0, Barrier64::kInitialised}.store(barrier);
  emulator::block_state().unfenced_barriers[emulator::thread_number()].push_back(barrier);
}

inline void fence_mbarrier_init() {
  using emulator::Barrier64;
  const emulator::IgnoreAccesses ignore;
  auto& barriers = emulator::block_state().unfenced_barriers[emulator::thread_number()];
  for (uint64_t* p : barriers) {
    Barrier64 barrier = Barrier64::load(p);
    barrier.tag = Barrier64::kFenced;
    barrier.store(p);
  }
  barriers.clear();
}

inline void mbarrier_arrive(uint64_t* barrier, Site site = Site::here()) {
  emulator::check_shared("mbarrier_arrive", barrier, sizeof(*barrier), site);
  emulator::arrive("mbarrier_arrive", barrier, 0, site);
}

inline void mbarrier_arrive_cluster(uint64_t* barrier, int rank, Site site = Site::here()) {
  using namespace emulator;
  constexpr const char* kName = "mbarrier_arrive_cluster";
  check_shared(kName, barrier, sizeof(*barrier), site);
  if (rank < 0 || rank >= cluster_size()) fail(kName, site, "no block %d in the cluster", rank);
  if (rank == cluster_rank()) return arrive(kName, barrier, 0, site);
  if (has_exited(rank)) fail(kName, site, "block %d of the cluster has exited", rank);
  auto* p = static_cast<uint64_t*>(in_block(rank, barrier));
  check_shown(kName, p, site);
  release(p);
  const IgnoreAccesses ignore;
  auto operation = std::make_shared<Operation>();
  operation->effect = [=] {
    if (has_exited(rank)) fail(kName, site, "block %d of the cluster has exited", rank);
    count_arrival(kName, p, 0, site);
  };
  start(operation);
}

inline void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes, Site site = Site::here()) {
  emulator::check_shared("mbarrier_arrive_expect_tx", barrier, sizeof(*barrier), site);
  emulator::arrive("mbarrier_arrive_expect_tx", barrier, bytes, site);
}

inline void cp_async_mbarrier_arrive_noinc(uint64_t* barrier, Site site = Site::here()) {
  constexpr const char* kName = "cp_async_mbarrier_arrive_noinc";
  emulator::check_shared(kName, barrier, sizeof(*barrier), site);
  const emulator::IgnoreAccesses ignore;
  emulator::load_barrier(kName, barrier, site);
  const int block = emulator::cluster_rank();
  emulator::after_copies(barrier, [=] {
    if (emulator::has_exited(block)) emulator::fail(kName, site, "the block has exited");
    emulator::count_arrival(kName, barrier, 0, site);
  });
}

// Times out now and then before the phase completes, as hardware may.
inline bool mbarrier_try_wait_parity(uint64_t* barrier, int parity, Site site = Site::here()) {
  constexpr const char* kName = "mbarrier_try_wait_parity";
  emulator::check_shared(kName, barrier, sizeof(*barrier), site);
  const auto is_complete = [&] {
    const emulator::IgnoreAccesses ignore;
    return emulator::load_barrier(kName, barrier, site).phase != (parity != 0);
  };
  if (emulator::options.seed > 0 && emulator::random(8) == 0) {
    emulator::yield(kName, site);
    return false;
  }
  if (!is_complete()) emulator::wait_on(barrier, kName, site);
  if (!is_complete()) return false;
  emulator::acquire(barrier);
  return true;
}

}  // namespace deeplab_fast::ptx
