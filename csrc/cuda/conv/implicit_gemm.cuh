// The main loop of dilated convolution as an implicit GEMM: 128 listed pixels times 128 output
// channels, summed in steps of one tap and 64 bytes of its channels (32 in 16 bits, 16 in tf32).
// Four stages of cp.async, which zero-fills what lies outside; ldmatrix; mma.sync. A warp issues in
// order, so what it does beside mma.sync is written between the products: while it multiplies the
// first half of a step it starts the copies of a later step and loads the fragments of the second
// half, and while it multiplies that, the fragments of the next step.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <climits>
#include <cstdint>
#include <type_traits>

#include "api.h"
#include "cuda/common/elements.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/conv/conv_epilogue.cuh"
#include "schedule/work_list.h"

namespace deeplab_fast::cuda {

constexpr int kBlockM = 128, kBlockN = 128;
constexpr int kWarpM = 64, kWarpN = 64;
constexpr int kStages = 4;
constexpr int kConvThreads = 32 * (kBlockM / kWarpM) * (kBlockN / kWarpN);
constexpr int kBlocksPerSM = 2;

constexpr int kChunks = 4;                         // copies of 16 bytes in a row of a stage
constexpr int kCopyRows = kConvThreads / kChunks;  // that the block copies at once
constexpr int kCopies = kBlockM / kCopyRows;       // of a thread, for each operand

constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;  // of a warp
constexpr size_t kConvSmem = size_t{kStages} * (kBlockM + kBlockN) * kChunks * 16;

template <typename T>
constexpr int kChunk = 16 / sizeof(T);  // elements of a copy
template <typename T>
constexpr int kBlockK = kChunks * kChunk<T>;

// Where a chunk of a row of 64 bytes lies in its operand's part of a stage: permuted so that the
// same chunk of 8 rows, as ldmatrix reads, and all chunks of 2 rows, as cp.async writes, are in
// different banks.
template <typename T>
__device__ int swizzled(int row, int chunk) {
  static_assert(kChunks == 4, "two rows fill the 128 bytes of all banks");
  return row * kBlockK<T> + (chunk ^ (row / 2 % kChunks)) * kChunk<T>;
}

// Fragments of 16 x 32 bytes of `a` and 8 x 32 bytes of `b`: 32 bits of them hold two channels, or
// one in tf32, where ldmatrix moves floats as pairs of 16 bits.
template <typename T>
__device__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, float>) {
    ptx::mma_m16n8k8_tf32(d, a, b);
  } else {
    ptx::mma_m16n8k16<T>(d, a, b);
  }
}

// The tensor core would cut fp32 off instead.
template <typename T>
__device__ void round_operand(uint32_t (&r)[4]) {
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (uint32_t& bits : r) bits = ptx::cvt_rna_tf32(__uint_as_float(bits));
  }
}

// Where the sums of row and column are in shared memory, four columns in a row: permuted so that
// the fragments of a warp go to all banks.
__device__ inline int sum_at(int row, int col) {
  return row * kBlockN + ((col / 4) ^ (row % 8 * 2)) * 4 + col % 4;
}

// Operands of a warp for half a step.
struct Fragments {
  uint32_t a[kTilesM][4], b[kTilesN / 2][4];
};

// Where a step is copied from, the same for all rows of a thread.
struct StepSource {
  bool has_channels;
  int channel;      // of the input
  int pixels;       // from an output pixel to its input pixel
  int64_t weights;  // elements from the weights of the step before
};

// The sums of a work item, for all threads, into sums [kBlockM, kBlockN] as sum_at tells, which lie
// where the stages were. Those of rows and columns past the end are whatever they are.
template <typename T>
__device__ __forceinline__ const float* sum_products(const T* input, const WorkItem& item,
                                                     const Tile& tile, const ConvOperands& operands,
                                                     const ConvWork& work, const ConvShape& shape) {
  T* stages = shared_memory<T>();
  constexpr int kStage = (kBlockM + kBlockN) * kBlockK<T>;
  const ConvOutput& output = operands.outputs[tile.output];
  const Tap* taps = work.taps + tile.first_tap;
  const int32_t* pixels = work.pixels + tile.first_pixel;
  const int first_k = item.block * kBlockN;

  // The rows that this thread copies a chunk of. Those past the end repeat the last one, so that
  // the loads of all pixels are issued together and every address is valid, but are zero-filled:
  // no tap gets inside from y = INT_MIN.
  static_assert(kBlockM == kBlockN && kBlockM % kCopyRows == 0, "one row index for both operands");
  const int chunk = threadIdx.x % kChunks, first_row = threadIdx.x / kChunks;
  int pixel[kCopies], y[kCopies], x[kCopies];
  const T* weight_row[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i)
    pixel[i] = pixels[min(first_row + i * kCopyRows, tile.num_pixels - 1)];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int row = first_row + i * kCopyRows, k = min(first_k + row, output.K - 1);
    const unsigned image_row = static_cast<unsigned>(pixel[i]) / static_cast<unsigned>(shape.W);
    const int in_image = image_row % static_cast<unsigned>(shape.H);
    x[i] = pixel[i] - static_cast<int>(image_row) * shape.W;
    y[i] = row < tile.num_pixels ? in_image : INT_MIN;
    weight_row[i] = static_cast<const T*>(output.weight) + k * output.weight_stride;
  }

  // Copies of the next step: find_step, copy_row of each row, end_step. Past the last step they
  // write zeros, so that the loop needs no branch around them.
  int steps_left = item.num_k_iters;
  int next_tap = item.first_k_iter % tile.num_taps;
  int next_c = item.first_k_iter / tile.num_taps * kBlockK<T> + chunk * kChunk<T>;
  Tap tap = taps[next_tap];
  StepSource from;
  int64_t weights_before = 0;
  const auto find_step = [&] {
    const ConvSource& source = operands.sources[tap.branch];
    from.has_channels = (steps_left > 0) & (next_c < source.C);
    const int c = from.has_channels ? next_c : 0;
    from.channel = source.first_channel + c;
    from.pixels = tap.dy * shape.W + tap.dx;
    const int64_t weights = static_cast<int64_t>(tap.index) * source.C + source.first_weight + c;
    from.weights = weights - weights_before;
    weights_before = weights;
  };
  const auto copy_row = [&](T* stage, int i) {
    static_assert(kCopyRows / 2 % kChunks == 0, "these rows permute their chunks alike");
    const int row = first_row + i * kCopyRows;
    const bool has_input = from.has_channels & is_inside(tap, y[i], x[i], shape.H, shape.W);
    const bool has_weight = from.has_channels & (first_k + row < output.K);
    const auto p = static_cast<uint32_t>(pixel[i] + (has_input ? from.pixels : 0));
    weight_row[i] += from.weights;
    T* to = stage + swizzled<T>(first_row, chunk) + i * kCopyRows * kBlockK<T>;
    ptx::cp_async<16>(
        to, input + (uint64_t{p} * static_cast<uint32_t>(shape.in_channels) + from.channel),
        has_input ? 16 : 0);
    ptx::cp_async<16>(to + kBlockM * kBlockK<T>, weight_row[i], has_weight ? 16 : 0);
  };
  const auto end_step = [&] {
    ptx::cp_async_commit_group();
    --steps_left;
    if (++next_tap == tile.num_taps) {
      next_tap = 0;
      next_c += kBlockK<T>;
    }
    tap = taps[next_tap];  // arrives during the products
  };
  const auto copy_step = [&](T* stage) {
    find_step();
#pragma unroll
    for (int i = 0; i < kCopies; ++i) copy_row(stage, i);
    end_step();
  };

  // What this warp multiplies; nothing where its pixels or channels are all past the end. A pair of
  // chunks is what one mma sums over, half a step.
  static_assert(kChunks == 4, "bit 1 of a chunk tells the halves apart");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / (kBlockN / kWarpN) * kWarpM;
  const int warp_col = warp % (kBlockN / kWarpN) * kWarpN;
  const int input_at = swizzled<T>(warp_row + lane % 16, lane / 16);
  const int weight_at =
      kBlockM * kBlockK<T> + swizzled<T>(warp_col + lane / 16 * 8 + lane % 8, lane / 8 % 2);
  const bool has_work = warp_row < tile.num_pixels && first_k + warp_col < output.K;
  float sum[kTilesM][kTilesN][4] = {};

  Fragments fragments[2];  // of the halves
  const auto load_fragments = [&](int stage, int half) {
    static_assert(16 / 2 % kChunks == 0, "16 rows on, chunks are permuted alike");
    auto& [a, b] = fragments[half];
    const T* input_tile = stages + ((stage * kStage + input_at) ^ (half * 2 * kChunk<T>));
    const T* weight_tile = stages + ((stage * kStage + weight_at) ^ (half * 2 * kChunk<T>));
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) ptx::ldmatrix(a[i], input_tile + i * 16 * kBlockK<T>);
#pragma unroll
    for (int j = 0; j < kTilesN / 2; ++j) ptx::ldmatrix(b[j], weight_tile + j * 16 * kBlockK<T>);
  };
  const auto multiply_row = [&](int half, int i) {
    auto& [a, b] = fragments[half];
    round_operand<T>(a[i]);
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
      if (i == 0 && j % 2 == 0) round_operand<T>(b[j / 2]);
      const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
      multiply_add<T>(sum[i][j], a[i], pair);
    }
  };

  // Copies run kStages - 1 steps ahead of the products. Warps that have work and warps that only
  // copy run a loop each, both with this barrier.
  const auto wait_for_next_step = [] {
    ptx::cp_async_wait_group<kStages - 2>();
    ptx::bar_sync(1, kConvThreads);
  };
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) copy_step(stages + step * kStage);
  wait_for_next_step();
  if (has_work) {
    static_assert(kCopies == kTilesM, "a row of copies for a row of products");
    load_fragments(0, 0);
    for (int step = 0; step < item.num_k_iters; ++step) {
      T* free_stage = stages + (step + kStages - 1) % kStages * kStage;
      load_fragments(step % kStages, 1);
      find_step();
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        multiply_row(0, i);
        copy_row(free_stage, i);
      }
      end_step();
      wait_for_next_step();  // all have the fragments of this one: its stage is free
      load_fragments((step + 1) % kStages, 0);
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) multiply_row(1, i);
    }
  } else {
    for (int step = 0; step < item.num_k_iters; ++step) {
      copy_step(stages + (step + kStages - 1) % kStages * kStage);
      wait_for_next_step();
    }
  }
  ptx::cp_async_wait_all();  // the zeros past the last step

  static_assert(kBlockM * kBlockN * sizeof(float) <= kConvSmem, "the sums lie over the stages");
  float* sums = shared_memory<float>();
  __syncthreads();  // all are done with the stages
#pragma unroll
  for (int i = 0; i < kTilesM * 2; ++i) {
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
      const float pair[2] = {sum[i / 2][j][i % 2 * 2], sum[i / 2][j][i % 2 * 2 + 1]};
      store(sums + sum_at(warp_row + i * 8 + lane / 4, warp_col + j * 8 + lane % 4 * 2), pair);
    }
  }
  __syncthreads();
  return sums;
}

}  // namespace deeplab_fast::cuda
