// output[n, y, x, k] = bias[k] + sum over taps and c of input[n, y + dy, x + dx, c] weight[k, tap,
// c] for branches that read one input [N, H, W, C] with weights [K, R, S, C] and write the channels
// of one output next to each other. Implicit GEMM over the work list of common/zones.h: 128 listed
// pixels times 128 channels of a branch, summed in steps of one tap and 32 input channels. cp.async
// zero-fills what lies outside. One thread block per work item. Blocks start in order, so the
// longest start first. The pieces of a split sum go to partial_sums, which a second kernel adds in
// a fixed order.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <climits>

#include "../api.h"
#include "../common/zones.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace deeplab_fast::cuda {
namespace {

constexpr int kBlockM = 128, kBlockN = 128, kBlockK = 32;
constexpr int kWarpM = 64, kWarpN = 64;
constexpr int kStages = 4;
constexpr int kThreads = 32 * (kBlockM / kWarpM) * (kBlockN / kWarpN);
constexpr int kBlocksPerSM = 2;

constexpr int kChunk = 8;                      // elements in the 16 bytes of a copy
constexpr int kChunks = kBlockK / kChunk;      // in a row of a stage
constexpr int kCopyRows = kThreads / kChunks;  // that the block copies at once
constexpr int kCopies = kBlockM / kCopyRows;   // of a thread, for each operand
constexpr int kStage = (kBlockM + kBlockN) * kBlockK;

constexpr int kReduceThreads = 256;
constexpr int kReduceRows = kReduceThreads / (kBlockN / 2);
constexpr int kReduceBlocks = kBlockM / kReduceRows;  // for one block of sums

struct Branches {
  ConvBranch of[kMaxConvBranches];
};

__device__ float load(const __half* p) { return __half2float(*p); }
__device__ float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }

__device__ void store(__half* p, float value) { *p = __float2half_rn(value); }
__device__ void store(__nv_bfloat16* p, float value) { *p = __float2bfloat16_rn(value); }

__device__ void store_pair(__half* p, float2 value) {
  *reinterpret_cast<__half2*>(p) = __floats2half2_rn(value.x, value.y);
}
__device__ void store_pair(__nv_bfloat16* p, float2 value) {
  *reinterpret_cast<__nv_bfloat162*>(p) = __floats2bfloat162_rn(value.x, value.y);
}

// The bias of output channels k and k + 1 of a branch.
template <typename T>
__device__ float2 load_bias(const ConvBranch& branch, int k) {
  const T* bias = static_cast<const T*>(branch.bias);
  if (bias == nullptr) return make_float2(0.0f, 0.0f);
  return make_float2(k < branch.K ? load(bias + k) : 0.0f,
                     k + 1 < branch.K ? load(bias + k + 1) : 0.0f);
}

// Output channels k and k + 1, k even, of a branch at one pixel.
template <typename T>
__device__ void store_output(T* output, const ConvShape& shape, const ConvBranch& branch, int pixel,
                             int k, float2 value) {
  T* p = output + static_cast<int64_t>(pixel) * shape.out_channels + branch.first_channel + k;
  const bool aligned = (shape.out_channels | branch.first_channel) % 2 == 0;
  if (aligned && k + 1 < branch.K) {
    store_pair(p, value);
    return;
  }
  if (k < branch.K) store(p, value.x);
  if (k + 1 < branch.K) store(p + 1, value.y);
}

// Where a chunk of a row of 64 bytes lies in its operand's part of a stage: permuted so that the
// same chunk of 8 rows, as ldmatrix reads, and all chunks of 2 rows, as cp.async writes, are in
// different banks.
__device__ int swizzled(int row, int chunk) {
  static_assert(kChunks == 4, "two rows fill the 128 bytes of all banks");
  return row * kBlockK + (chunk ^ (row / 2 % kChunks)) * kChunk;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    dilated_conv2d_fwd_kernel(T* __restrict__ output,            // [N, H, W, out_channels]
                              float* __restrict__ partial_sums,  // [slots, kBlockM, kBlockN]
                              const T* __restrict__ input,       // [N, H, W, C]
                              const __grid_constant__ Branches branches,
                              const __grid_constant__ ConvWork work,
                              const __grid_constant__ ConvShape shape) {
  const WorkItem item = work.items[blockIdx.x];
  const Tile tile = work.tiles[item.job];
  const ConvBranch& branch = branches.of[tile.output];
  const Tap* taps = work.taps + tile.first_tap;
  const int32_t* pixels = work.pixels + tile.first_pixel;
  const int first_k = item.block * kBlockN;
  T* stages = shared_memory<T>();

  // The rows that this thread copies a chunk of.
  static_assert(kBlockM == kBlockN && kBlockM % kCopyRows == 0, "one row index for both operands");
  const int chunk = threadIdx.x % kChunks, first_row = threadIdx.x / kChunks;
  const auto* weight = static_cast<const T*>(branch.weight);
  const T *input_row[kCopies], *weight_row[kCopies];
  int y[kCopies], x[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int row = first_row + i * kCopyRows, k = first_k + row;
    const bool is_listed = row < tile.num_pixels;
    const int pixel = is_listed ? pixels[row] : 0;
    x[i] = pixel % shape.W;
    y[i] = is_listed ? pixel / shape.W % shape.H : INT_MIN;  // no tap gets inside from there
    input_row[i] = input + static_cast<int64_t>(pixel) * shape.C + chunk * kChunk;
    weight_row[i] =
        k < branch.K ? weight + static_cast<int64_t>(k) * branch.num_taps * shape.C + chunk * kChunk
                     : nullptr;
  }

  int next_tap = item.first_step % tile.num_taps;
  int next_c = item.first_step / tile.num_taps * kBlockK;
  Tap tap = taps[next_tap];
  const auto copy_next_step = [&](int stage) {
    const int64_t input_offset =
        (static_cast<int64_t>(tap.dy) * shape.W + tap.dx) * shape.C + next_c;
    const int64_t weight_offset = static_cast<int64_t>(tap.index) * shape.C + next_c;
    const bool has_channels = next_c + chunk * kChunk < shape.C;
    T* input_tile = stages + stage * kStage;
    T* weight_tile = input_tile + kBlockM * kBlockK;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int at = swizzled(first_row, chunk) + i * kCopyRows * kBlockK;
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
      next_c += kBlockK;
    }
    tap = taps[next_tap];  // arrives during the products
  };

  // What this warp multiplies; nothing where its pixels or channels are all past the end.
  constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / (kBlockN / kWarpN) * kWarpM;
  const int warp_col = warp % (kBlockN / kWarpN) * kWarpN;
  const bool has_work = warp_row < tile.num_pixels && first_k + warp_col < branch.K;
  int input_at[kBlockK / 16], weight_at[kBlockK / 16];
#pragma unroll
  for (int k = 0; k < kBlockK / 16; ++k) {
    input_at[k] = swizzled(warp_row + lane % 16, 2 * k + lane / 16);
    weight_at[k] = swizzled(warp_col + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2);
  }
  float sum[kTilesM][kTilesN][4] = {};

  const auto multiply = [&](int stage) {
    const T* input_tile = stages + stage * kStage;
    const T* weight_tile = input_tile + kBlockM * kBlockK;
#pragma unroll
    for (int k = 0; k < kBlockK / 16; ++k) {
      static_assert(16 / 2 % kChunks == 0, "16 rows on, chunks are permuted alike");
      uint32_t a[kTilesM][4], b[kTilesN / 2][4];
#pragma unroll
      for (int i = 0; i < kTilesM; ++i)
        ptx::ldmatrix(a[i], input_tile + input_at[k] + i * 16 * kBlockK);
#pragma unroll
      for (int j = 0; j < kTilesN / 2; ++j)
        ptx::ldmatrix(b[j], weight_tile + weight_at[k] + j * 16 * kBlockK);
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
          const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          ptx::mma_m16n8k16<T>(sum[i][j], a[i], pair);
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
  if (!has_work) return;

  const int k = first_k + warp_col + lane % 4 * 2;
  if (item.slot < 0) {
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
      const float2 bias = load_bias<T>(branch, k + j * 8);
#pragma unroll
      for (int i = 0; i < kTilesM * 2; ++i) {
        sum[i / 2][j][i % 2 * 2] += bias.x;
        sum[i / 2][j][i % 2 * 2 + 1] += bias.y;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kTilesM * 2; ++i) {
    const int row = warp_row + i * 8 + lane / 4;
    if (row >= tile.num_pixels) continue;
    float* partial =
        partial_sums + (static_cast<int64_t>(item.slot) * kBlockM + row) * kBlockN - first_k;
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
      const float2 value = make_float2(sum[i / 2][j][i % 2 * 2], sum[i / 2][j][i % 2 * 2 + 1]);
      if (item.slot < 0) {
        store_output(output, shape, branch, pixels[row], k + j * 8, value);
      } else {
        *reinterpret_cast<float2*>(partial + k + j * 8) = value;
      }
    }
  }
}

// A thread per pixel and two channels.
template <typename T>
__global__ void __launch_bounds__(kReduceThreads)
    dilated_conv2d_fwd_reduce_kernel(T* __restrict__ output,  // [N, H, W, out_channels]
                                     const float* __restrict__ partial_sums,
                                     const __grid_constant__ Branches branches,
                                     const __grid_constant__ ConvWork work,
                                     const __grid_constant__ ConvShape shape) {
  const Reduction reduction = work.reductions[blockIdx.x / kReduceBlocks];
  const Tile tile = work.tiles[reduction.job];
  const ConvBranch& branch = branches.of[tile.output];
  const int row = blockIdx.x % kReduceBlocks * kReduceRows + threadIdx.x / (kBlockN / 2);
  const int col = threadIdx.x % (kBlockN / 2) * 2, k = reduction.block * kBlockN + col;
  if (row >= tile.num_pixels || k >= branch.K) return;

  float2 sum = make_float2(0.0f, 0.0f);
  for (int i = 0; i < reduction.num_slots; ++i) {
    const int64_t slot = reduction.first_slot + i;
    const auto* p = partial_sums + (slot * kBlockM + row) * kBlockN + col;
    const float2 piece = *reinterpret_cast<const float2*>(p);
    sum = make_float2(sum.x + piece.x, sum.y + piece.y);
  }
  const float2 bias = load_bias<T>(branch, k);
  store_output(output, shape, branch, work.pixels[tile.first_pixel + row], k,
               make_float2(sum.x + bias.x, sum.y + bias.y));
}

template <typename T>
Status launch_typed(void* output, float* partial_sums, const void* input, const Branches& branches,
                    const ConvWork& work, const ConvShape& shape, void* stream) {
  constexpr size_t kSmem = kStages * kStage * sizeof(T);
  static_assert(kSmem <= 99 * 1024, "what a block can have on sm_86 and sm_89");
  static_assert(kBlocksPerSM * (kSmem + 1024) <= 164 * 1024, "what an SM has on sm_80");
  auto* typed_output = static_cast<T*>(output);
  const Status status = launch("dilated_conv2d_fwd_kernel", dilated_conv2d_fwd_kernel<T>,
                               work.num_items, kThreads, kSmem, stream, typed_output, partial_sums,
                               static_cast<const T*>(input), branches, work, shape);
  if (!status.ok() || work.num_reductions == 0) return status;
  return launch("dilated_conv2d_fwd_reduce_kernel", dilated_conv2d_fwd_reduce_kernel<T>,
                work.num_reductions * kReduceBlocks, kReduceThreads, 0, stream, typed_output,
                partial_sums, branches, work, shape);
}

}  // namespace

Status dilated_conv2d_fwd(void* output, float* partial_sums, const void* input,
                          const std::vector<ConvBranch>& branches, const ConvWork& work,
                          const ConvShape& shape, DType dtype, void* stream) {
  static_assert(kBlockM == kConvTile && kBlockN == kConvTile && kBlockK == kConvStep,
                "the work list is made for these");
  if (branches.size() > kMaxConvBranches) return {"dilated_conv2d_fwd", "too many branches"};
  if (shape.C % kChunk != 0) return {"dilated_conv2d_fwd", "channels must be a multiple of 8"};
  if (work.num_items == 0) return {};
  Branches of;
  std::copy(branches.begin(), branches.end(), of.of);
  switch (dtype) {
    case DType::kFloat16:
      return launch_typed<__half>(output, partial_sums, input, of, work, shape, stream);
    case DType::kBFloat16:
      return launch_typed<__nv_bfloat16>(output, partial_sums, input, of, work, shape, stream);
    default:
      return {"dilated_conv2d_fwd", "input must be float16 or bfloat16"};
  }
}

}  // namespace deeplab_fast::cuda
