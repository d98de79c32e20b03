// grad_weight[k, tap, c] = sum over images and the output pixels p at which the tap is inside of
// grad_output[p, k] input[p + tap, c]
//
// The branches read one input [N, H, W, C] and wrote adjacent channels of one output. The pixels of
// a tap form a rectangle (schedule/work_list.h), so nothing is multiplied by padding. Implicit GEMM
// over one work list: an output tile is 128 output channels x 128 input channels of a tap, a
// k-iteration 32 pixels (16 of float). One CTA per work item, longest first; those of a split
// output tile write fp32 sums to workspace slots, which a second kernel adds in a fixed order.
// Operands are stored pixel by pixel, the transpose of what mma takes: ldmatrix transposes 16-bit
// elements.

#include <algorithm>
#include <type_traits>

#include "api.h"
#include "cuda/common/dtypes.cuh"
#include "cuda/common/elements.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/conv/rectangle_walk.cuh"
#include "cuda/conv/warp_mma.cuh"
#include "cuda/conv/wgrad_reduce.cuh"
#include "schedule/work_list.h"

namespace deeplab_fast::cuda {
namespace {

constexpr int kBlockM = 128, kBlockN = 128;  // output and input channels
constexpr int kStages = 4;
constexpr int kThreads = 32 * (kBlockM / kWarpM) * (kBlockN / kWarpN);
constexpr int kCtasPerSM = 2;

// Elements from one pixel of a stage to the next. Padded by 4 banks (8 for float), so that the rows
// of 8 pixels that ldmatrix reads, and the 4 pixels x 8 channels of a TF32 fragment, are in
// different banks.
constexpr int kPitch = kBlockM + 8;

constexpr int kReduceThreads = 256;

constexpr int kBiasThreads = 256, kBiasCols = 8;  // columns of 16-byte chunks per thread block
constexpr int kBiasRows = kBiasThreads / kBiasCols;

template <typename T>
constexpr int kBlockK = kConvKIterBytes / sizeof(T);  // pixels per k-iteration
template <typename T>
constexpr int kChunk = 16 / sizeof(T);  // elements per copy

// Loads sum[m, n] += rows[pixel, m] cols[pixel, n] operands of a half from its first pixel on.
// ldmatrix cannot transpose floats, so they are loaded one by one.
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
    for (int i = 0; i < kTilesM; ++i) ptx::ldmatrix_x4_trans(to.a[i], rows + row_at + i * 16);
#pragma unroll
    for (int j = 0; j < kTilesN / 2; ++j) ptx::ldmatrix_x4_trans(to.b[j], cols + col_at + j * 16);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kCtasPerSM)
    dilated_conv2d_wgrad_kernel(float* __restrict__ partial_sums,   // [slots, kBlockM, kBlockN]
                                const T* __restrict__ grad_output,  // [N, H, W, out_channels]
                                const T* __restrict__ input,        // [N, H, W, C]
                                const __grid_constant__ WgradBranches branches,
                                const __grid_constant__ ConvWgradWork work,
                                const __grid_constant__ ConvWgradShape shape) {
  const WorkItem item = work.items[blockIdx.x];
  const TapRectangle rectangle = work.rectangles[item.tile];
  const Tap tap = rectangle.tap;
  const ConvWgradBranch& branch = branches.branch[tap.branch];
  const int blocks_n = (shape.C + kBlockN - 1) / kBlockN;
  const int first_k = item.block / blocks_n * kBlockM, first_c = item.block % blocks_n * kBlockN;

  // This thread copies, in each stage, one chunk of channels of kCopies pixels per operand.
  constexpr int kChunks = kBlockM / kChunk<T>, kCopyRows = kThreads / kChunks;
  constexpr int kCopies = kBlockK<T> / kCopyRows, kOperand = kBlockK<T> * kPitch;
  static_assert(kBlockM == kBlockN, "both operands share a chunk index");
  static_assert(kPitch % kChunk<T> == 0, "chunks are aligned");
  T* stages = shared_memory<T>();
  const int chunk = threadIdx.x % kChunks * kChunk<T>, first_row = threadIdx.x / kChunks;
  const bool has_k = first_k + chunk < branch.K, has_c = first_c + chunk < shape.C;
  const T* grad_chunk = grad_output + branch.first_channel + (has_k ? first_k + chunk : 0);
  const T* input_chunk = input + (has_c ? first_c + chunk : 0);
  const int tap_offset = tap.dy * shape.W + tap.dx;
  RectanglePixel pixels[kCopies] = {};
  RectangleStep advance_by = {};
  int pixels_left = 0;  // from this thread's first pixel on
  if (item.num_k_iters > 0) {
    const int first = item.first_k_iter * kBlockK<T>;
    const int num_pixels = shape.N * rectangle.h * rectangle.w;
    advance_by = rectangle_step(rectangle, shape.H, shape.W, kBlockK<T>);
    pixels_left = min(num_pixels - first, item.num_k_iters * kBlockK<T>) - first_row;
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
      pixels[i] = rectangle_pixel(rectangle, shape.H, shape.W, first + first_row + i * kCopyRows);
  }

  // Copies of the next k-iteration: copy_row for each pixel, end_k_iter. Past the last k-iteration
  // they write zeros, so that the loop needs no branch around them.
  const auto copy_row = [&](int stage, int i) {
    T* to = stages + stage * 2 * kOperand + (first_row + i * kCopyRows) * kPitch + chunk;
    const bool has_pixel = i * kCopyRows < pixels_left;
    const auto grad_pixel = static_cast<uint32_t>(has_pixel ? pixels[i].index : 0);
    const auto input_pixel = static_cast<uint32_t>(has_pixel ? pixels[i].index + tap_offset : 0);
    ptx::cp_async(to, grad_chunk + uint64_t{grad_pixel} * static_cast<uint32_t>(shape.out_channels),
                  has_pixel & has_k ? 16 : 0);
    ptx::cp_async(to + kOperand,
                  input_chunk + uint64_t{input_pixel} * static_cast<uint32_t>(shape.C),
                  has_pixel & has_c ? 16 : 0);
    advance(pixels[i], advance_by);
  };
  const auto end_k_iter = [&] {
    ptx::cp_async_commit_group();
    pixels_left -= kBlockK<T>;
  };
  const auto copy_k_iter = [&](int stage) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) copy_row(stage, i);
    end_k_iter();
  };

  // Warp tile. A warp whose channels are all past the end has no work.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / (kBlockN / kWarpN) * kWarpM;
  const int warp_col = warp % (kBlockN / kWarpN) * kWarpN;
  const bool has_work = first_k + warp_row < branch.K && first_c + warp_col < shape.C;
  float sum[kTilesM][kTilesN][4] = {};

  Fragments fragments[2];  // one per half
  const auto load_half = [&](int stage, int half) {
    const T* pixel = stages + stage * 2 * kOperand + half * kBlockK<T> / 2 * kPitch;
    load_fragments(fragments[half], pixel + warp_row, pixel + kOperand + warp_col);
  };

  // Copies run kStages - 1 k-iterations ahead of the products. A warp issues in order, so its other
  // instructions are placed between the products. Warps with work and warps that only copy run
  // separate loops, which meet at this named barrier.
  const auto wait_for_next_stage = [] {
    ptx::cp_async_wait_group<kStages - 2>();
    ptx::bar_sync(1, kThreads);
  };
#pragma unroll
  for (int k_iter = 0; k_iter < kStages - 1; ++k_iter) copy_k_iter(k_iter);
  wait_for_next_stage();
  if (has_work) {
    static_assert(kCopies == kTilesM, "one row of copies per row of products");
    load_half(0, 0);
    for (int k_iter = 0; k_iter < item.num_k_iters; ++k_iter) {
      load_half(k_iter % kStages, 1);
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        multiply_row<T>(sum[i], fragments[0], i);
        copy_row((k_iter + kStages - 1) % kStages, i);
      }
      end_k_iter();
      wait_for_next_stage();  // all warps have loaded this stage's fragments: it is free
      load_half((k_iter + 1) % kStages, 0);
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) multiply_row<T>(sum[i], fragments[1], i);
    }
  } else {
    for (int k_iter = 0; k_iter < item.num_k_iters; ++k_iter) {
      copy_k_iter((k_iter + kStages - 1) % kStages);
      wait_for_next_stage();
    }
  }
  ptx::cp_async_wait_all();  // zeros past the last k-iteration
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

// Sums one part of the pixels; each thread block sums kBiasCols chunks of channels.
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

// Adds the parts in order. One thread per channel.
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
  static_assert(kSmem <= 99 * 1024, "shared memory per CTA on sm_86 and sm_89");
  static_assert(kCtasPerSM * (kSmem + 1024) <= 164 * 1024, "shared memory per SM on sm_80");
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
  static_assert(kWidth <= kBiasThreads, "one thread per channel");
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
  static_assert(kBlockM == kConvTile && kBlockN == kConvTile,
                "the work list assumes this output tile");
  const char* name = "dilated_conv2d_wgrad";
  if (branches.size() > kMaxConvBranches) return {name, "too many branches"};
  const int chunk = dtype == DType::kFloat32 ? kChunk<float> : kChunk<__half>;
  bool aligned = (shape.C | shape.out_channels) % chunk == 0;
  for (const auto& branch : branches) aligned &= (branch.K | branch.first_channel) % chunk == 0;
  if (!aligned) return {name, "expected channels in multiples of 16 bytes"};
  if (work.num_items == 0) return {};
  WgradBranches params;
  std::copy(branches.begin(), branches.end(), params.branch);
  return with_elements(dtype, name, [&](auto element) {
    return launch_wgrad<decltype(element)>(partial_sums, grad_output, input, params, work, shape,
                                           stream);
  });
}

Status dilated_conv2d_bias_grad(void* grad_bias, float* partial_sums, const void* grad_output,
                                int64_t num_pixels, int32_t K, int32_t num_parts, DType dtype,
                                void* stream) {
  const char* name = "dilated_conv2d_bias_grad";
  const int chunk = dtype == DType::kFloat32 ? kChunk<float> : kChunk<__half>;
  if (K % chunk != 0) return {name, "expected channels in multiples of 16 bytes"};
  return with_elements(dtype, name, [&](auto element) {
    return launch_bias_grad<decltype(element)>(grad_bias, partial_sums, grad_output, num_pixels, K,
                                               num_parts, stream);
  });
}

}  // namespace deeplab_fast::cuda
