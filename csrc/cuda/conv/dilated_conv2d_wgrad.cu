// grad_weight[k, tap, c] = sum over images and the output pixels p at which the tap is inside of
// grad_output[p, k] input[p + tap, c], for branches that read one input [N, H, W, C] and wrote the
// channels of one output next to each other. Those pixels are a rectangle for each tap
// (schedule/work_list.h), so nothing is multiplied by padding. Implicit GEMM over one work list:
// 128 output channels times 128 input channels of a tap, summed in steps of 32 pixels (16 of
// float). One thread block per work item. Blocks start in order, so the longest start first. The
// pieces of a split sum go to partial_sums, which a second kernel adds in a fixed order. Both
// operands lie pixel by pixel, which is the transpose of what mma takes: ldmatrix turns 16-bit
// elements around.

#include <algorithm>
#include <type_traits>

#include "api.h"
#include "cuda/common/dtypes.cuh"
#include "cuda/common/elements.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/conv/rectangle_walk.cuh"
#include "cuda/conv/wgrad_reduce.cuh"
#include "schedule/work_list.h"

namespace deeplab_fast::cuda {
namespace {

constexpr int kBlockM = 128, kBlockN = 128;  // output and input channels
constexpr int kWarpM = 64, kWarpN = 64;
constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;
constexpr int kStages = 4;
constexpr int kThreads = 32 * (kBlockM / kWarpM) * (kBlockN / kWarpN);
constexpr int kBlocksPerSM = 2;

// Elements from one pixel of a stage to the next: 4 banks (8 of float) further, so that the rows of
// 8 pixels that ldmatrix reads, and the 4 pixels times 8 channels of a tf32 fragment, are in
// different banks.
constexpr int kPitch = kBlockM + 8;

constexpr int kReduceThreads = 256;

constexpr int kBiasThreads = 256, kBiasCols = 8;  // chunks of 16 bytes that a block sums
constexpr int kBiasRows = kBiasThreads / kBiasCols;

template <typename T>
constexpr int kBlockK = kConvKIterBytes / sizeof(T);  // pixels
template <typename T>
constexpr int kChunk = 16 / sizeof(T);  // elements of a copy

// Operands of a warp for half a step: sum[m, n] += rows[pixel, m] cols[pixel, n].
struct Fragments {
  uint32_t a[kTilesM][4], b[kTilesN / 2][4];
};

// From the first of the half's pixels. ldmatrix turns no floats around: they come one by one.
template <typename T>
__device__ void load_fragments(Fragments& to, const T* rows, const T* cols) {
  const int lane = threadIdx.x % 32;
  if constexpr (std::is_same_v<T, float>) {
    const int at = lane % 4 * kPitch + lane / 4;
#pragma unroll
    for (int i = 0; i < kTilesM * 4; ++i)
      to.a[i / 4][i % 4] =
          __float_as_uint(rows[at + i % 4 / 2 * 4 * kPitch + i / 4 * 16 + i % 2 * 8]);
#pragma unroll
    for (int j = 0; j < kTilesN * 2; ++j)
      to.b[j / 4][j % 4] = __float_as_uint(cols[at + j % 2 * 4 * kPitch + j / 2 * 8]);
  } else {
    const int row_at = (lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8;
    const int col_at = lane % 16 * kPitch + lane / 16 * 8;
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) ptx::ldmatrix_trans(to.a[i], rows + row_at + i * 16);
#pragma unroll
    for (int j = 0; j < kTilesN / 2; ++j) ptx::ldmatrix_trans(to.b[j], cols + col_at + j * 16);
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

// Row i of the tiles of mma; all of them in order, because the first rounds what they share.
template <typename T>
__device__ void multiply_row(float (&sum)[kTilesN][4], Fragments& of, int i) {
  round_operand<T>(of.a[i]);
#pragma unroll
  for (int j = 0; j < kTilesN; ++j) {
    if (i == 0 && j % 2 == 0) round_operand<T>(of.b[j / 2]);
    const uint32_t pair[2] = {of.b[j / 2][j % 2 * 2], of.b[j / 2][j % 2 * 2 + 1]};
    if constexpr (std::is_same_v<T, float>) {
      ptx::mma_m16n8k8_tf32(sum[j], of.a[i], pair);
    } else {
      ptx::mma_m16n8k16<T>(sum[j], of.a[i], pair);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    dilated_conv2d_wgrad_kernel(float* __restrict__ partial_sums,   // [slots, kBlockM, kBlockN]
                                const T* __restrict__ grad_output,  // [N, H, W, out_channels]
                                const T* __restrict__ input,        // [N, H, W, C]
                                const __grid_constant__ WgradBranches branches,
                                const __grid_constant__ ConvWgradWork work,
                                const __grid_constant__ ConvWgradShape shape) {
  const WorkItem item = work.items[blockIdx.x];
  const TapRectangle rectangle = work.rectangles[item.tile];
  const Tap tap = rectangle.tap;
  const ConvWgradBranch& branch = branches.of[tap.branch];
  const int blocks_n = (shape.C + kBlockN - 1) / kBlockN;
  const int first_k = item.block / blocks_n * kBlockM, first_c = item.block % blocks_n * kBlockN;

  // Of each stage, this thread copies one chunk of channels of kCopies pixels.
  constexpr int kChunks = kBlockM / kChunk<T>, kCopyRows = kThreads / kChunks;
  constexpr int kCopies = kBlockK<T> / kCopyRows, kOperand = kBlockK<T> * kPitch;
  static_assert(kBlockM == kBlockN, "one chunk index for both operands");
  static_assert(kPitch % kChunk<T> == 0, "chunks are aligned");
  T* stages = shared_memory<T>();
  const int chunk = threadIdx.x % kChunks * kChunk<T>, first_row = threadIdx.x / kChunks;
  const bool has_k = first_k + chunk < branch.K, has_c = first_c + chunk < shape.C;
  const T* grad_chunk = grad_output + branch.first_channel + (has_k ? first_k + chunk : 0);
  const T* input_chunk = input + (has_c ? first_c + chunk : 0);
  const int tap_offset = tap.dy * shape.W + tap.dx;
  RectanglePixel pixels[kCopies] = {};
  RectangleStep pixel_step = {};
  int pixels_left = 0;  // from this thread's first on
  if (item.num_k_iters > 0) {
    const int first = item.first_k_iter * kBlockK<T>;
    const int num_pixels = shape.N * rectangle.h * rectangle.w;
    pixel_step = rectangle_step(rectangle, shape.H, shape.W, kBlockK<T>);
    pixels_left = min(num_pixels - first, item.num_k_iters * kBlockK<T>) - first_row;
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
      pixels[i] = rectangle_pixel(rectangle, shape.H, shape.W, first + first_row + i * kCopyRows);
  }

  // Copies of the next step: copy_row of each pixel, end_step. Past the last step they write zeros,
  // so that the loop needs no branch around them.
  const auto copy_row = [&](int stage, int i) {
    T* to = stages + stage * 2 * kOperand + (first_row + i * kCopyRows) * kPitch + chunk;
    const bool has_pixel = i * kCopyRows < pixels_left;
    const auto grad_pixel = static_cast<uint32_t>(has_pixel ? pixels[i].index : 0);
    const auto input_pixel = static_cast<uint32_t>(has_pixel ? pixels[i].index + tap_offset : 0);
    ptx::cp_async<16>(to,
                      grad_chunk + uint64_t{grad_pixel} * static_cast<uint32_t>(shape.out_channels),
                      has_pixel & has_k ? 16 : 0);
    ptx::cp_async<16>(to + kOperand,
                      input_chunk + uint64_t{input_pixel} * static_cast<uint32_t>(shape.C),
                      has_pixel & has_c ? 16 : 0);
    advance(pixels[i], pixel_step);
  };
  const auto end_step = [&] {
    ptx::cp_async_commit_group();
    pixels_left -= kBlockK<T>;
  };
  const auto copy_step = [&](int stage) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) copy_row(stage, i);
    end_step();
  };

  // What this warp multiplies; nothing where its channels are all past the end.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / (kBlockN / kWarpN) * kWarpM;
  const int warp_col = warp % (kBlockN / kWarpN) * kWarpN;
  const bool has_work = first_k + warp_row < branch.K && first_c + warp_col < shape.C;
  float sum[kTilesM][kTilesN][4] = {};

  Fragments fragments[2];  // of the halves
  const auto load_half = [&](int stage, int half) {
    const T* pixel = stages + stage * 2 * kOperand + half * kBlockK<T> / 2 * kPitch;
    load_fragments(fragments[half], pixel + warp_row, pixel + kOperand + warp_col);
  };

  // Copies run kStages - 1 steps ahead of the products. A warp issues in order, so what it does
  // beside mma.sync is written between the products. Warps that have work and warps that only copy
  // run a loop each, both with this barrier.
  const auto wait_for_next_step = [] {
    ptx::cp_async_wait_group<kStages - 2>();
    ptx::bar_sync(1, kThreads);
  };
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) copy_step(step);
  wait_for_next_step();
  if (has_work) {
    static_assert(kCopies == kTilesM, "a row of copies for a row of products");
    load_half(0, 0);
    for (int step = 0; step < item.num_k_iters; ++step) {
      load_half(step % kStages, 1);
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        multiply_row<T>(sum[i], fragments[0], i);
        copy_row((step + kStages - 1) % kStages, i);
      }
      end_step();
      wait_for_next_step();  // all have the fragments of this one: its stage is free
      load_half((step + 1) % kStages, 0);
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) multiply_row<T>(sum[i], fragments[1], i);
    }
  } else {
    for (int step = 0; step < item.num_k_iters; ++step) {
      copy_step((step + kStages - 1) % kStages);
      wait_for_next_step();
    }
  }
  ptx::cp_async_wait_all();  // the zeros past the last step
  if (!has_work) return;

  const int col = warp_col + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kTilesM * 2; ++i) {
    const int row = warp_row + i * 8 + lane / 4, k = first_k + row;
    if (k >= branch.K) continue;
    T* grad_weight = static_cast<T*>(branch.grad_weight) +
                     (static_cast<int64_t>(k) * branch.num_taps + tap.index) * shape.C + first_c;
    const int64_t partial = (static_cast<int64_t>(item.slot) * kBlockM + row) * kBlockN;
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
      const float value[2] = {sum[i / 2][j][i % 2 * 2], sum[i / 2][j][i % 2 * 2 + 1]};
      if (first_c + col + j * 8 >= shape.C) continue;
      if (item.slot < 0) {
        store(grad_weight + col + j * 8, value);
      } else {
        store(partial_sums + partial + col + j * 8, value);
      }
    }
  }
}

// A block sums kBiasCols chunks of channels over one part of the pixels.
template <typename T>
__global__ void __launch_bounds__(kBiasThreads)
    dilated_conv2d_bias_grad_kernel(float* __restrict__ partial_sums,   // [num_parts, K]
                                    const T* __restrict__ grad_output,  // [num_pixels, K]
                                    int64_t num_pixels, int K) {
  const int col = threadIdx.x % kBiasCols, row = threadIdx.x / kBiasCols;
  const int first_k = blockIdx.x * kBiasCols * kChunk<T>, k = first_k + col * kChunk<T>;
  const int64_t part = blockIdx.y, num_parts = gridDim.y;
  const int64_t begin = num_pixels * part / num_parts, end = num_pixels * (part + 1) / num_parts;
  float sum[kChunk<T>] = {};
  if (k < K) {
    for (int64_t pixel = begin + row; pixel < end; pixel += kBiasRows) {
      float values[kChunk<T>];
      load(values, grad_output + pixel * K + k);
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) sum[i] += values[i];
    }
  }

  float* sums = shared_memory<float>();  // [kBiasRows, kBiasCols * kChunk]
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) sums[threadIdx.x * kChunk<T> + i] = sum[i];
  __syncthreads();
  constexpr int kWidth = kBiasCols * kChunk<T>;
  const int i = threadIdx.x;
  if (i >= kWidth || first_k + i >= K) return;
  float total = 0.0f;
  for (int r = 0; r < kBiasRows; ++r) total += sums[r * kWidth + i];
  partial_sums[part * K + first_k + i] = total;
}

// A thread per channel.
template <typename T>
__global__ void __launch_bounds__(kReduceThreads)
    dilated_conv2d_bias_grad_reduce_kernel(T* __restrict__ grad_bias,               // [K]
                                           const float* __restrict__ partial_sums,  // [parts, K]
                                           int num_parts, int K) {
  const int k = blockIdx.x * kReduceThreads + threadIdx.x;
  if (k >= K) return;
  float sum = 0.0f;
  for (int64_t part = 0; part < num_parts; ++part) sum += partial_sums[part * K + k];
  round_to(grad_bias[k], sum);
}

template <typename T>
Status launch_wgrad(float* partial_sums, const void* grad_output, const void* input,
                    const WgradBranches& branches, const ConvWgradWork& work,
                    const ConvWgradShape& shape, void* stream) {
  constexpr size_t kSmem = kStages * 2 * kBlockK<T> * kPitch * sizeof(T);
  static_assert(kSmem <= 99 * 1024, "what a block can have on sm_86 and sm_89");
  static_assert(kBlocksPerSM * (kSmem + 1024) <= 164 * 1024, "what an SM has on sm_80");
  const Status status =
      launch("dilated_conv2d_wgrad_kernel", dilated_conv2d_wgrad_kernel<T>, work.num_items,
             kThreads, kSmem, stream, partial_sums, static_cast<const T*>(grad_output),
             static_cast<const T*>(input), branches, work, shape);
  if (!status.ok()) return status;
  return launch_wgrad_reduce<T, kConvTile>(partial_sums, branches, work, shape, stream);
}

template <typename T>
Status launch_bias_grad(void* grad_bias, float* partial_sums, const void* grad_output,
                        int64_t num_pixels, int32_t K, int32_t num_parts, void* stream) {
  constexpr int kWidth = kBiasCols * kChunk<T>;
  static_assert(kWidth <= kBiasThreads, "a thread per channel");
  const Status status = launch(
      "dilated_conv2d_bias_grad_kernel", dilated_conv2d_bias_grad_kernel<T>,
      dim3((K + kWidth - 1) / kWidth, num_parts), kBiasThreads, kBiasRows * kWidth * sizeof(float),
      stream, partial_sums, static_cast<const T*>(grad_output), num_pixels, K);
  if (!status.ok()) return status;
  return launch("dilated_conv2d_bias_grad_reduce_kernel", dilated_conv2d_bias_grad_reduce_kernel<T>,
                (K + kReduceThreads - 1) / kReduceThreads, kReduceThreads, 0, stream,
                static_cast<T*>(grad_bias), partial_sums, num_parts, K);
}

}  // namespace

Status dilated_conv2d_wgrad(float* partial_sums, const void* grad_output, const void* input,
                            const std::vector<ConvWgradBranch>& branches, const ConvWgradWork& work,
                            const ConvWgradShape& shape, DType dtype, void* stream) {
  static_assert(kBlockM == kConvTile && kBlockN == kConvTile, "the work list is made for these");
  const char* name = "dilated_conv2d_wgrad";
  if (branches.size() > kMaxConvBranches) return {name, "too many branches"};
  const int chunk = dtype == DType::kFloat32 ? kChunk<float> : kChunk<__half>;
  bool aligned = (shape.C | shape.out_channels) % chunk == 0;
  for (const auto& branch : branches) aligned &= (branch.K | branch.first_channel) % chunk == 0;
  if (!aligned) return {name, "channels must be multiples of 16 bytes"};
  if (work.num_items == 0) return {};
  WgradBranches of;
  std::copy(branches.begin(), branches.end(), of.of);
  return with_elements(dtype, name, [&](auto element) {
    return launch_wgrad<decltype(element)>(partial_sums, grad_output, input, of, work, shape,
                                           stream);
  });
}

Status dilated_conv2d_bias_grad(void* grad_bias, float* partial_sums, const void* grad_output,
                                int64_t num_pixels, int32_t K, int32_t num_parts, DType dtype,
                                void* stream) {
  const char* name = "dilated_conv2d_bias_grad";
  const int chunk = dtype == DType::kFloat32 ? kChunk<float> : kChunk<__half>;
  if (K % chunk != 0) return {name, "channels must be a multiple of 16 bytes"};
  return with_elements(dtype, name, [&](auto element) {
    return launch_bias_grad<decltype(element)>(grad_bias, partial_sums, grad_output, num_pixels, K,
                                               num_parts, stream);
  });
}

}  // namespace deeplab_fast::cuda
