// Circular buffer of shared-memory stages between copies and wgmma, synchronised by mbarriers.
#pragma once

#include <cstdint>

#include "cuda/common/ptx_sm90.cuh"

namespace deeplab_fast::cuda {

// Position in the circular buffer: the stage, and the phase of the stage's two barriers.
template <int kStages>
struct PipelineState {
  int stage = 0, phase = 0;

  __device__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    phase ^= 1;
  }
};

// full[i]: the copies into stage i have completed. empty[i]: all consumers have read stage i.
template <int kStages>
struct PipelineBarriers {
  uint64_t full[kStages], empty[kStages];
};

__device__ inline void wait(uint64_t* barrier, int phase) {
  while (!ptx::mbarrier_try_wait_parity(barrier, phase)) {
  }
}

// Tells all CTAs of the cluster that a consumer warp has read the stage; one arrival per warp.
template <int kClusterSize>
__device__ void release_stage(uint64_t* empty) {
  if (threadIdx.x % 32 != 0) return;
  for (int cta = 0; cta < kClusterSize; ++cta) ptx::mbarrier_arrive_cluster(empty, cta);
}

// Waits until all stages have been read; `state` follows the last stage filled. The producer ends
// with this call: a CTA must not exit before the arrivals from other CTAs have reached its
// barriers, and a relaxed cluster barrier does not wait for them.
template <int kStages>
__device__ void wait_for_readers(PipelineState<kStages> state, uint64_t (&empty)[kStages]) {
  for (int i = 0; i < kStages; ++i) {
    wait(&empty[state.stage], state.phase ^ 1);
    state.advance();
  }
}

}  // namespace deeplab_fast::cuda
