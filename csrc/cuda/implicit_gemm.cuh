// The main loop of dilated convolution as an implicit GEMM: 128 listed pixels times 128 output
// channels, summed in steps of one tap and 64 bytes of its channels (32 in 16 bits, 16 in tf32).
// Four stages of cp.async, which zero-fills what lies outside; ldmatrix; mma.sync.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <climits>
#include <cstdint>
#include <type_traits>

#include "../api.h"
#include "../common/zones.h"
#include "conv_epilogue.cuh"
#include "elements.cuh"
#include "launch.cuh"
#include "ptx.cuh"

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

  // The rows that this thread copies a chunk of.
  static_assert(kBlockM == kBlockN && kBlockM % kCopyRows == 0, "one row index for both operands");
  const int chunk = threadIdx.x % kChunks, first_row = threadIdx.x / kChunks;
  const auto* weight = static_cast<const T*>(output.weight);
  const T *input_row[kCopies], *weight_row[kCopies];
  int y[kCopies], x[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int row = first_row + i * kCopyRows, k = first_k + row;
    const bool is_listed = row < tile.num_pixels;
    const int pixel = is_listed ? pixels[row] : 0;
    x[i] = pixel % shape.W;
    y[i] = is_listed ? pixel / shape.W % shape.H : INT_MIN;  // no tap gets inside from there
    input_row[i] = input + static_cast<int64_t>(pixel) * shape.in_channels + chunk * kChunk<T>;
    weight_row[i] = k < output.K ? weight + k * output.weight_stride + chunk * kChunk<T> : nullptr;
  }

  int next_tap = item.first_step % tile.num_taps;
  int next_c = item.first_step / tile.num_taps * kBlockK<T>;
  Tap tap = taps[next_tap];
  const auto copy_next_step = [&](int stage) {
    const ConvSource& source = operands.sources[tap.branch];
    const int64_t input_offset =
        (static_cast<int64_t>(tap.dy) * shape.W + tap.dx) * shape.in_channels +
        source.first_channel + next_c;
    const int64_t weight_offset =
        static_cast<int64_t>(tap.index) * source.C + source.first_weight + next_c;
    const bool has_channels = next_c + chunk * kChunk<T> < source.C;
    T* input_tile = stages + stage * kStage;
    T* weight_tile = input_tile + kBlockM * kBlockK<T>;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int at = swizzled<T>(first_row, chunk) + i * kCopyRows * kBlockK<T>;
      static_assert(kCopyRows / 2 % kChunks == 0, "these rows permute their chunks alike");
      const bool has_input = has_channels && is_inside(tap, y[i], x[i], shape.H, shape.W);
      const bool has_weight = has_channels && weight_row[i] != nullptr;
      ptx::cp_async<16>(input_tile + at, has_input ? input_row[i] + input_offset : input,
                        has_input ? 16 : 0);
      ptx::cp_async<16>(weight_tile + at, has_weight ? weight_row[i] + weight_offset : weight,
                        has_weight ? 16 : 0);
    }
    if (++next_tap == tile.num_taps) {
      next_tap = 0;
      next_c += kBlockK<T>;
    }
    tap = taps[next_tap];  // arrives during the products
  };

  // What this warp multiplies; nothing where its pixels or channels are all past the end. A pair of
  // chunks is what one mma sums over.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / (kBlockN / kWarpN) * kWarpM;
  const int warp_col = warp % (kBlockN / kWarpN) * kWarpN;
  int input_at[kChunks / 2], weight_at[kChunks / 2];
#pragma unroll
  for (int k = 0; k < kChunks / 2; ++k) {
    input_at[k] = swizzled<T>(warp_row + lane % 16, 2 * k + lane / 16);
    weight_at[k] = swizzled<T>(warp_col + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2);
  }
  const bool has_work = warp_row < tile.num_pixels && first_k + warp_col < output.K;
  float sum[kTilesM][kTilesN][4] = {};

  const auto multiply = [&](int stage) {
    const T* input_tile = stages + stage * kStage;
    const T* weight_tile = input_tile + kBlockM * kBlockK<T>;
#pragma unroll
    for (int k = 0; k < kChunks / 2; ++k) {
      static_assert(16 / 2 % kChunks == 0, "16 rows on, chunks are permuted alike");
      uint32_t a[kTilesM][4], b[kTilesN / 2][4];
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        ptx::ldmatrix(a[i], input_tile + input_at[k] + i * 16 * kBlockK<T>);
        round_operand<T>(a[i]);
      }
#pragma unroll
      for (int j = 0; j < kTilesN / 2; ++j) {
        ptx::ldmatrix(b[j], weight_tile + weight_at[k] + j * 16 * kBlockK<T>);
        round_operand<T>(b[j]);
      }
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
          const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          multiply_add<T>(sum[i][j], a[i], pair);
        }
      }
    }
  };

  // Copies run kStages - 1 steps ahead of the products.
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < item.num_steps) copy_next_step(step);
    ptx::cp_async_commit_group();
  }
  for (int step = 0; step < item.num_steps; ++step) {
    ptx::cp_async_wait_group<kStages - 2>();
    __syncthreads();  // the stage is here, and all are done with the one before
    const int ahead = step + kStages - 1;
    if (ahead < item.num_steps) copy_next_step(ahead % kStages);
    ptx::cp_async_commit_group();
    if (has_work) multiply(step % kStages);
  }

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
