// output[n, y, x, k] = clamp(bias[k] + image_bias[n, k] + residual[n, y, x, k] + sum over taps and c
// of input[n, y + dy, x + dx, c] weight[k, tap, c]) for convolutions that read one input
// [N, H, W, in_channels] and write the channels of one output next to each other. Implicit GEMM
// (implicit_gemm.cuh) over the work list of common/zones.h. One thread block per work item. Blocks
// start in order, so the longest start first. The pieces of a split sum go to partial_sums, which a
// second kernel adds in a fixed order.

#include <algorithm>

#include "../api.h"
#include "elements.cuh"
#include "implicit_gemm.cuh"
#include "launch.cuh"

namespace deeplab_fast::cuda {
namespace {

constexpr int kReduceThreads = 256;
constexpr int kReduceRows = kReduceThreads / (kBlockN / 2);
constexpr int kReduceBlocks = kBlockM / kReduceRows;  // for one block of sums

// p[0] and p[1], as far as the channels from k on reach; the rest are zeros.
template <typename T>
__device__ float2 load_channels(const T* p, int k, int channels, bool aligned) {
  if (aligned && k + 1 < channels) return load_pair(p);
  return make_float2(k < channels ? load(p) : 0.0f, k + 1 < channels ? load(p + 1) : 0.0f);
}

__device__ float2 operator+(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }

// NaN is not below or above anything.
__device__ float clamp(float value, const ConvEpilogue& epilogue) {
  const float raised = value < epilogue.low ? epilogue.low : value;
  return raised > epilogue.high ? epilogue.high : raised;
}

template <typename T>
__device__ float2 load_bias(const ConvOutput& output, int k) {
  const T* bias = static_cast<const T*>(output.bias);
  if (bias == nullptr) return make_float2(0.0f, 0.0f);
  return load_channels(bias + k, k, output.K, false);
}

// Finishes the sums, bias included, of output channels k and k + 1, k even, at one pixel. Whatever
// of the residual this thread writes over it has read before.
template <typename T>
__device__ void store_output(T* tensor, const ConvOutput& output, const ConvEpilogue& epilogue,
                             const ConvShape& shape, int pixel, int k, float2 value) {
  if (k >= output.K) return;
  const bool aligned = (shape.out_channels | output.first_channel) % 2 == 0;
  const int64_t at =
      static_cast<int64_t>(pixel) * shape.out_channels + output.first_channel + k;
  if (output.image_bias != nullptr) {
    const int64_t image = pixel / (shape.H * shape.W);
    value = value + load_channels(output.image_bias + image * output.K + k, k, output.K, false);
  }
  if (epilogue.residual != nullptr) {
    const T* residual = static_cast<const T*>(epilogue.residual) + at;
    value = value + load_channels(residual, k, output.K, aligned);
  }
  value = make_float2(clamp(value.x, epilogue), clamp(value.y, epilogue));
  if (aligned && k + 1 < output.K) {
    store_pair(tensor + at, value);
    return;
  }
  store(tensor + at, value.x);
  if (k + 1 < output.K) store(tensor + at + 1, value.y);
}

template <typename T>
__global__ void __launch_bounds__(kConvThreads, kBlocksPerSM)
    dilated_conv2d_fwd_kernel(T* tensor,                         // [N, H, W, out_channels]
                              float* __restrict__ partial_sums,  // [slots, kBlockM, kBlockN]
                              const T* __restrict__ input,       // [N, H, W, in_channels]
                              const __grid_constant__ ConvOperands operands,
                              const __grid_constant__ ConvWork work,
                              const __grid_constant__ ConvEpilogue epilogue,
                              const __grid_constant__ ConvShape shape) {
  const WorkItem item = work.items[blockIdx.x];
  const Tile tile = work.tiles[item.job];
  const ConvOutput& output = operands.outputs[tile.output];
  const int first_k = item.block * kBlockN;
  float sum[kTilesM][kTilesN][4] = {};
  sum_products(sum, input, item, tile, operands, work, shape, shared_memory<T>());

  const WarpTile mine = warp_tile(tile, output.K - first_k);
  if (!mine.has_work) return;
  const int k = first_k + mine.col;
  if (item.slot < 0) {
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
      const float2 bias = load_bias<T>(output, k + j * 8);
#pragma unroll
      for (int i = 0; i < kTilesM * 2; ++i) {
        sum[i / 2][j][i % 2 * 2] += bias.x;
        sum[i / 2][j][i % 2 * 2 + 1] += bias.y;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kTilesM * 2; ++i) {
    const int row = mine.row + i * 8;
    if (row >= tile.num_pixels) continue;
    const int pixel = work.pixels[tile.first_pixel + row];
    float* partial =
        partial_sums + (static_cast<int64_t>(item.slot) * kBlockM + row) * kBlockN - first_k;
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
      const float2 value = make_float2(sum[i / 2][j][i % 2 * 2], sum[i / 2][j][i % 2 * 2 + 1]);
      if (item.slot < 0) {
        store_output(tensor, output, epilogue, shape, pixel, k + j * 8, value);
      } else {
        store_pair(partial + k + j * 8, value);
      }
    }
  }
}

// A thread per pixel and two channels.
template <typename T>
__global__ void __launch_bounds__(kReduceThreads)
    dilated_conv2d_fwd_reduce_kernel(T* tensor,  // [N, H, W, out_channels]
                                     const float* __restrict__ partial_sums,
                                     const __grid_constant__ ConvOperands operands,
                                     const __grid_constant__ ConvWork work,
                                     const __grid_constant__ ConvEpilogue epilogue,
                                     const __grid_constant__ ConvShape shape) {
  const Reduction reduction = work.reductions[blockIdx.x / kReduceBlocks];
  const Tile tile = work.tiles[reduction.job];
  const ConvOutput& output = operands.outputs[tile.output];
  const int row = blockIdx.x % kReduceBlocks * kReduceRows + threadIdx.x / (kBlockN / 2);
  const int col = threadIdx.x % (kBlockN / 2) * 2, k = reduction.block * kBlockN + col;
  if (row >= tile.num_pixels || k >= output.K) return;

  float2 sum = make_float2(0.0f, 0.0f);
  for (int i = 0; i < reduction.num_slots; ++i) {
    const int64_t slot = reduction.first_slot + i;
    sum = sum + load_pair(partial_sums + (slot * kBlockM + row) * kBlockN + col);
  }
  store_output(tensor, output, epilogue, shape, work.pixels[tile.first_pixel + row], k,
               sum + load_bias<T>(output, k));
}

template <typename T>
Status launch_typed(void* output, float* partial_sums, const void* input,
                    const ConvOperands& operands, const ConvWork& work,
                    const ConvEpilogue& epilogue, const ConvShape& shape, void* stream) {
  static_assert(kBlockM == kConvTile && kBlockN == kConvTile, "the work list is made for these");
  static_assert(kBlockK<T> * sizeof(T) == kConvStepBytes, "and for these steps");
  static_assert(kConvSmem <= 99 * 1024, "what a block can have on sm_86 and sm_89");
  static_assert(kBlocksPerSM * (kConvSmem + 1024) <= 164 * 1024, "what an SM has on sm_80");
  if (shape.in_channels % kChunk<T> != 0)
    return {"dilated_conv2d_fwd", "channels must be a multiple of 16 bytes"};
  auto* tensor = static_cast<T*>(output);
  const Status status =
      launch("dilated_conv2d_fwd_kernel", dilated_conv2d_fwd_kernel<T>, work.num_items,
             kConvThreads, kConvSmem, stream, tensor, partial_sums, static_cast<const T*>(input),
             operands, work, epilogue, shape);
  if (!status.ok() || work.num_reductions == 0) return status;
  return launch("dilated_conv2d_fwd_reduce_kernel", dilated_conv2d_fwd_reduce_kernel<T>,
                work.num_reductions * kReduceBlocks, kReduceThreads, 0, stream, tensor,
                partial_sums, operands, work, epilogue, shape);
}

}  // namespace

Status dilated_conv2d_fwd(void* output, float* partial_sums, const void* input,
                          const std::vector<ConvOutput>& outputs,
                          const std::vector<ConvSource>& sources, const ConvWork& work,
                          const ConvEpilogue& epilogue, const ConvShape& shape, DType dtype,
                          void* stream) {
  if (std::max(outputs.size(), sources.size()) > kMaxConvBranches)
    return {"dilated_conv2d_fwd", "too many branches"};
  if (work.num_items == 0) return {};
  ConvOperands operands{};
  std::copy(outputs.begin(), outputs.end(), operands.outputs);
  std::copy(sources.begin(), sources.end(), operands.sources);
  const auto run = [&](auto launch_dtype) {
    return launch_dtype(output, partial_sums, input, operands, work, epilogue, shape, stream);
  };
  switch (dtype) {
    case DType::kFloat32:
      return run(launch_typed<float>);
    case DType::kFloat16:
      return run(launch_typed<__half>);
    case DType::kBFloat16:
      return run(launch_typed<__nv_bfloat16>);
    default:
      return {"dilated_conv2d_fwd", "input must be float32, float16 or bfloat16"};
  }
}

}  // namespace deeplab_fast::cuda
