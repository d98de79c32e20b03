// Split-K reduction of the weight gradient, and the branches parameter of its kernels.
#pragma once

#include <cstdint>

#include "api.h"
#include "cuda/common/elements.cuh"
#include "cuda/common/launch.cuh"
#include "schedule/work_list.h"

namespace deeplab_fast::cuda {

struct WgradBranches {
  ConvWgradBranch branch[kMaxConvBranches];
};

constexpr int kWgradReduceThreads = 256;

// Adds the workspace slots [kTile, kTile] of each split output tile, in order. One thread per
// output channel and two input channels.
template <typename T, int kTile>
__global__ void __launch_bounds__(kWgradReduceThreads)
    dilated_conv2d_wgrad_reduce_kernel(const float* __restrict__ partial_sums,
                                       const __grid_constant__ WgradBranches branches,
                                       const __grid_constant__ ConvWgradWork work,
                                       const __grid_constant__ ConvWgradShape shape) {
  constexpr int kRowThreads = kTile / 2, kRows = kWgradReduceThreads / kRowThreads;
  constexpr int kBlocks = kTile / kRows;  // thread blocks per output tile
  const Reduction reduction = work.reductions[blockIdx.x / kBlocks];
  const Tap tap = work.rectangles[reduction.tile].tap;
  const ConvWgradBranch& branch = branches.branch[tap.branch];
  const int blocks_n = (shape.C + kTile - 1) / kTile;
  const int row = blockIdx.x % kBlocks * kRows + threadIdx.x / kRowThreads;
  const int col = threadIdx.x % kRowThreads * 2;
  const int k = reduction.block / blocks_n * kTile + row;
  const int c = reduction.block % blocks_n * kTile + col;
  if (k >= branch.K || c >= shape.C) return;

  float sum[2] = {};
  for (int i = 0; i < reduction.num_slots; ++i) {
    const int64_t slot = reduction.first_slot + i;
    float partial[2];
    load(partial, partial_sums + (slot * kTile + row) * kTile + col);
    sum[0] += partial[0];
    sum[1] += partial[1];
  }
  store(static_cast<T*>(branch.grad_weight) +
            (static_cast<int64_t>(k) * branch.num_taps + tap.index) * shape.C + c,
        sum);
}

// Launches the split-K reduction, if any output tile is split.
template <typename T, int kTile>
Status launch_wgrad_reduce(const float* partial_sums, const WgradBranches& branches,
                           const ConvWgradWork& work, const ConvWgradShape& shape, void* stream) {
  if (work.num_reductions == 0) return {};
  constexpr int kBlocks = kTile * kTile / 2 / kWgradReduceThreads;
  return launch("dilated_conv2d_wgrad_reduce_kernel", dilated_conv2d_wgrad_reduce_kernel<T, kTile>,
                work.num_reductions * kBlocks, kWgradReduceThreads, 0, stream, partial_sums,
                branches, work, shape);
}

}  // namespace deeplab_fast::cuda
