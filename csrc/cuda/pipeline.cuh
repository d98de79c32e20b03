// Stages in shared memory that copies fill and wgmma reads, each with two mbarriers: that it is
// full and that it is empty.
#pragma once

#include <cstdint>

#include "ptx_sm90.cuh"

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

}  // namespace deeplab_fast::cuda
