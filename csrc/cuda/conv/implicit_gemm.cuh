// Main loop of dilated convolution as an implicit GEMM for sm_80: cp.async, ldmatrix and mma.sync.
//
// An output tile is 128 listed pixels x 128 output channels. A k-iteration is one tap x 64 bytes of
// input channels (32 channels of 16 bits, 16 in TF32). Four stages of cp.async, which zero-fills
// pixels outside the map. A warp issues in order, so its other instructions are placed between the
// products: during the first half of a k-iteration it starts the copies of a later one and loads
// the fragments of the second half, and during that half the fragments of the next k-iteration.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <climits>
#include <cstdint>

#include "api.h"
#include "cuda/common/elements.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/conv/conv_epilogue.cuh"
#include "cuda/conv/warp_mma.cuh"
#include "schedule/work_list.h"

namespace deeplab_fast::cuda {

constexpr int kBlockM = 128, kBlockN = 128;
constexpr int kStages = 4;
constexpr int kConvThreads = 32 * (kBlockM / kWarpM) * (kBlockN / kWarpN);
constexpr int kCtasPerSM = 2;

constexpr int kChunks = 4;                         // copies of 16 bytes per row of a stage
constexpr int kCopyRows = kConvThreads / kChunks;  // rows that the CTA copies at once
constexpr int kCopies = kBlockM / kCopyRows;       // copies per thread and operand

constexpr size_t kConvSmem = size_t{kStages} * (kBlockM + kBlockN) * kChunks * 16;

template <typename T>
constexpr int kChunk = 16 / sizeof(T);  // elements per copy
template <typename T>
constexpr int kBlockK = kChunks * kChunk<T>;

// Offset of a chunk of a 64-byte row within its operand's part of a stage, in elements. Swizzled so
// that the same chunk of 8 rows (ldmatrix) and all chunks of 2 rows (cp.async) are in different
// banks.
template <typename T>
__device__ int swizzled(int row, int chunk) {
  static_assert(kChunks == 4, "two rows fill the 128 bytes of all banks");
  return row * kBlockK<T> + (chunk ^ (row / 2 % kChunks)) * kChunk<T>;
}

// Offset of a sum in shared memory. Groups of four columns are swizzled by row, so that a warp's
// fragments are stored to all banks.
__device__ inline int sum_at(int row, int col) {
  return row * kBlockN + ((col / 4) ^ (row % 8 * 2)) * 4 + col % 4;
}

// Source of a k-iteration's copies, the same for all rows of a thread.
struct KIterSource {
  bool has_channels;
  int channel;      // first input channel
  int pixels;       // offset from an output pixel to its input pixel
  int64_t weights;  // elements from the previous k-iteration's weights to these
};

// Computes the sums of a work item, by all threads of the CTA. Returns them in shared memory, in
// the place of the stages: [kBlockM, kBlockN] with the layout of sum_at. Rows and columns past the
// end have unspecified values.
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

  // Rows of which this thread copies a chunk. Rows past the end repeat the last pixel, so that all
  // pixels are loaded at once from valid addresses, but are zero-filled: with y = INT_MIN no tap is
  // inside the map.
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

  // Copies of the next k-iteration: find_k_iter, copy_row for each row, end_k_iter. Past the last
  // k-iteration they write zeros, so that the loop needs no branch around them.
  int k_iters_left = item.num_k_iters;
  int next_tap = item.first_k_iter % tile.num_taps;
  int next_c = item.first_k_iter / tile.num_taps * kBlockK<T> + chunk * kChunk<T>;
  Tap tap = taps[next_tap];
  KIterSource from;
  int64_t weights_before = 0;
  const auto find_k_iter = [&] {
    const ConvSource& source = operands.sources[tap.branch];
    from.has_channels = (k_iters_left > 0) & (next_c < source.C);
    const int c = from.has_channels ? next_c : 0;
    from.channel = source.first_channel + c;
    from.pixels = tap.dy * shape.W + tap.dx;
    const int64_t weights = static_cast<int64_t>(tap.index) * source.C + source.first_weight + c;
    from.weights = weights - weights_before;
    weights_before = weights;
  };
  const auto copy_row = [&](T* stage, int i) {
    static_assert(kCopyRows / 2 % kChunks == 0, "these rows have the same swizzle");
    const int row = first_row + i * kCopyRows;
    const bool has_input = from.has_channels & is_inside(tap, y[i], x[i], shape.H, shape.W);
    const bool has_weight = from.has_channels & (first_k + row < output.K);
    const auto p = static_cast<uint32_t>(pixel[i] + (has_input ? from.pixels : 0));
    weight_row[i] += from.weights;
    T* to = stage + swizzled<T>(first_row, chunk) + i * kCopyRows * kBlockK<T>;
    ptx::cp_async(to,
                  input + (uint64_t{p} * static_cast<uint32_t>(shape.in_channels) + from.channel),
                  has_input ? 16 : 0);
    ptx::cp_async(to + kBlockM * kBlockK<T>, weight_row[i], has_weight ? 16 : 0);
  };
  const auto end_k_iter = [&] {
    ptx::cp_async_commit_group();
    --k_iters_left;
    if (++next_tap == tile.num_taps) {
      next_tap = 0;
      next_c += kBlockK<T>;
    }
    tap = taps[next_tap];  // loaded during the products
  };
  const auto copy_k_iter = [&](T* stage) {
    find_k_iter();
#pragma unroll
    for (int i = 0; i < kCopies; ++i) copy_row(stage, i);
    end_k_iter();
  };

  // Warp tile. A warp whose pixels or channels are all past the end has no work. One mma sums over
  // a pair of chunks, half a k-iteration.
  static_assert(kChunks == 4, "bit 1 of a chunk is the half");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / (kBlockN / kWarpN) * kWarpM;
  const int warp_col = warp % (kBlockN / kWarpN) * kWarpN;
  const int input_at = swizzled<T>(warp_row + lane % 16, lane / 16);
  const int weight_at =
      kBlockM * kBlockK<T> + swizzled<T>(warp_col + lane / 16 * 8 + lane % 8, lane / 8 % 2);
  const bool has_work = warp_row < tile.num_pixels && first_k + warp_col < output.K;
  float sum[kTilesM][kTilesN][4] = {};

  Fragments fragments[2];  // one per half
  const auto load_fragments = [&](int stage, int half) {
    static_assert(16 / 2 % kChunks == 0, "16 rows further the swizzle is the same");
    auto& [a, b] = fragments[half];
    const T* input_tile = stages + ((stage * kStage + input_at) ^ (half * 2 * kChunk<T>));
    const T* weight_tile = stages + ((stage * kStage + weight_at) ^ (half * 2 * kChunk<T>));
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) ptx::ldmatrix_x4(a[i], input_tile + i * 16 * kBlockK<T>);
#pragma unroll
    for (int j = 0; j < kTilesN / 2; ++j) ptx::ldmatrix_x4(b[j], weight_tile + j * 16 * kBlockK<T>);
  };

  // Copies run kStages - 1 k-iterations ahead of the products. Warps with work and warps that only
  // copy run separate loops, which meet at this named barrier.
  const auto wait_for_next_stage = [] {
    ptx::cp_async_wait_group<kStages - 2>();
    ptx::bar_sync(1, kConvThreads);
  };
#pragma unroll
  for (int k_iter = 0; k_iter < kStages - 1; ++k_iter) copy_k_iter(stages + k_iter * kStage);
  wait_for_next_stage();
  if (has_work) {
    static_assert(kCopies == kTilesM, "one row of copies per row of products");
    load_fragments(0, 0);
    for (int k_iter = 0; k_iter < item.num_k_iters; ++k_iter) {
      T* free_stage = stages + (k_iter + kStages - 1) % kStages * kStage;
      load_fragments(k_iter % kStages, 1);
      find_k_iter();
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        multiply_row<T>(sum[i], fragments[0], i);
        copy_row(free_stage, i);
      }
      end_k_iter();
      wait_for_next_stage();  // all warps have loaded this stage's fragments: it is free
      load_fragments((k_iter + 1) % kStages, 0);
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) multiply_row<T>(sum[i], fragments[1], i);
    }
  } else {
    for (int k_iter = 0; k_iter < item.num_k_iters; ++k_iter) {
      copy_k_iter(stages + (k_iter + kStages - 1) % kStages * kStage);
      wait_for_next_stage();
    }
  }
  ptx::cp_async_wait_all();  // zeros past the last k-iteration

  static_assert(kBlockM * kBlockN * sizeof(float) <= kConvSmem, "the sums replace the stages");
  float* sums = shared_memory<float>();
  __syncthreads();  // all warps are done with the stages
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
