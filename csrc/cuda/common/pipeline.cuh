// Stages in shared memory that copies fill and wgmma reads, each with two mbarriers: that it is
// full and that it is empty.
#pragma once

#include <cstdint>

#include "cuda/common/ptx_sm90.cuh"

namespace deeplab_fast::cuda {

// A stage, and the parity of the phase of its barriers.
template <int kStages>
struct Place {
  int stage = 0, parity = 0;

  __device__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

__device__ inline void wait(uint64_t* barrier, int parity) {
  while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
}

// Before a producer's last instruction: waits until all its stages have been read, `place` being
// the one after the last it filled. A block must not exit before the other blocks' arrivals at its
// barriers have come, which a barrier of the cluster without release would not wait for.
template <int kStages>
__device__ void wait_for_readers(Place<kStages> place, uint64_t (&empty)[kStages]) {
  for (int i = 0; i < kStages; ++i) {
    wait(&empty[place.stage], place.parity ^ 1);
    place.advance();
  }
}

}  // namespace deeplab_fast::cuda
