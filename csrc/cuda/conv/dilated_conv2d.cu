// output[n, y, x, k] = clamp(bias[k] + image_bias[n, k] + residual[n, y, x, k] + sum over taps and
// c of input[n, y + dy, x + dx, c] weight[k, tap, c])
//
// The branches read one input [N, H, W, in_channels] and write adjacent channels of one output.
// Implicit GEMM (implicit_gemm.cuh), one CTA per work item of the work list (schedule/work_list.h).
// CTAs start in the order of the list, longest work items first. The work items of a split output
// tile write fp32 sums to workspace slots, which a second kernel adds in a fixed order.

#include <algorithm>

#include "api.h"
#include "cuda/common/dtypes.cuh"
#include "cuda/common/elements.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/conv/conv_epilogue.cuh"
#include "cuda/conv/implicit_gemm.cuh"

namespace deeplab_fast::cuda {
namespace {

constexpr int kWarps = kConvThreads / 32;

template <typename T>
__global__ void __launch_bounds__(kConvThreads, kCtasPerSM)
    dilated_conv2d_fwd_kernel(T* tensor,                         // [N, H, W, out_channels]
                              float* __restrict__ partial_sums,  // [slots, kBlockM, kBlockN]
                              const T* __restrict__ input,       // [N, H, W, in_channels]
                              const __grid_constant__ ConvOperands operands,
                              const __grid_constant__ ConvWork work,
                              const __grid_constant__ ConvEpilogue params,
                              const __grid_constant__ ConvShape shape) {
  const WorkItem item = work.items[blockIdx.x];
  const Tile tile = work.tiles[item.tile];
  const float* sums = sum_products(input, item, tile, operands, work, shape);

  // One warp per pixel, one lane per four channels.
  static_assert(kBlockN == 4 * 32, "a warp covers the channels of a row");
  const int col = threadIdx.x % 32 * 4, k = item.block * kBlockN + col;
  const Epilogue<T> epilogue(tensor, params, shape, operands.outputs[tile.output], k);
  if (epilogue.count <= 0) return;
  if (item.slot >= 0) {
    float* partial = partial_sums + static_cast<int64_t>(item.slot) * kBlockM * kBlockN + col;
    for (int row = threadIdx.x / 32; row < tile.num_pixels; row += kWarps)
      *reinterpret_cast<float4*>(partial + row * kBlockN) =
          *reinterpret_cast<const float4*>(sums + sum_at(row, col));
    return;
  }
  // Loads several rows before storing them: the compiler cannot move loads of the residual across
  // stores to the output, which may be the same tensor.
  constexpr int kRows = 4;
  for (int first = threadIdx.x / 32; first < tile.num_pixels; first += kRows * kWarps) {
    int pixel[kRows];
    float value[kRows][4];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = first + i * kWarps;
      pixel[i] = row < tile.num_pixels ? work.pixels[tile.first_pixel + row] : -1;
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (pixel[i] < 0) continue;
      load(value[i], sums + sum_at(first + i * kWarps, col));
      epilogue.finish(pixel[i], value[i]);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (pixel[i] >= 0) epilogue.write(pixel[i], value[i]);
  }
}

template <typename T>
Status launch_typed(void* output, float* partial_sums, const void* input,
                    const ConvOperands& operands, const ConvWork& work,
                    const ConvEpilogue& epilogue, const ConvShape& shape, void* stream) {
  static_assert(kBlockM == kConvTile && kBlockN == kConvTile,
                "the work list assumes this output tile");
  static_assert(kBlockK<T> * sizeof(T) == kConvKIterBytes,
                "the work list assumes this k-iteration");
  static_assert(kConvSmem <= 99 * 1024, "shared memory per CTA on sm_86 and sm_89");
  static_assert(kCtasPerSM * (kConvSmem + 1024) <= 164 * 1024, "shared memory per SM on sm_80");
  int64_t unaligned = shape.in_channels;
  for (const ConvSource& s : operands.sources) unaligned |= s.C | s.first_channel | s.first_weight;
  for (const ConvOutput& o : operands.outputs)
    if (o.K > 1) unaligned |= o.weight_stride;
  if (unaligned % kChunk<T> != 0)
    return {"dilated_conv2d_fwd", "expected input channels in multiples of 16 bytes"};
  auto* tensor = static_cast<T*>(output);
  const Status status =
      launch("dilated_conv2d_fwd_kernel", dilated_conv2d_fwd_kernel<T>, work.num_items,
             kConvThreads, kConvSmem, stream, tensor, partial_sums, static_cast<const T*>(input),
             operands, work, epilogue, shape);
  if (!status.ok()) return status;
  return launch_reduce<kBlockM, kBlockN>({}, tensor, partial_sums, operands, work, epilogue, shape,
                                         stream);
}

}  // namespace

Status dilated_conv2d_fwd(void* output, float* partial_sums, const void* input,
                          const std::vector<ConvOutput>& outputs,
                          const std::vector<ConvSource>& sources, const ConvWork& work,
                          const ConvEpilogue& epilogue, const ConvShape& shape, DType dtype,
                          void* stream) {
  if (std::max(outputs.size(), sources.size()) > kMaxConvBranches)
    return {"dilated_conv2d_fwd", "too many branches"};
  for (const ConvOutput& o : outputs)
    if (o.pixel_sums != nullptr) return {"dilated_conv2d_fwd", "expected no pixel_sums"};
  if (work.num_items == 0) return {};
  ConvOperands operands{};
  std::copy(outputs.begin(), outputs.end(), operands.outputs);
  std::copy(sources.begin(), sources.end(), operands.sources);
  return with_elements(dtype, "dilated_conv2d_fwd", [&](auto element) {
    return launch_typed<decltype(element)>(output, partial_sums, input, operands, work, epilogue,
                                           shape, stream);
  });
}

}  // namespace deeplab_fast::cuda
