// Epilogue of dilated convolution: biases, residual and clamp, and the split-K reduction.
#pragma once

#include <cstdint>

#include "api.h"
#include "cuda/common/elements.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "schedule/work_list.h"

namespace deeplab_fast::cuda {

struct ConvOperands {
  ConvOutput outputs[kMaxConvBranches];
  ConvSource sources[kMaxConvBranches];
  int num_sources;
};

// Epilogue of four output channels from k on, for one thread. The residual may be the output
// itself: the same thread reads and writes each element.
template <typename T>
struct Epilogue {
  T* tensor;
  const ConvEpilogue& params;
  const ConvShape& shape;
  const ConvOutput output;
  const int k, count;  // 1 to 4 channels; 0 or less: none
  float bias[4] = {};
  bool is_vector;

  __device__ Epilogue(T* tensor, const ConvEpilogue& params, const ConvShape& shape,
                      const ConvOutput& output, int k)
      : tensor(tensor),
        params(params),
        shape(shape),
        output(output),
        k(k),
        count(min(output.K - k, 4)),
        is_vector(count == 4 && (shape.out_channels | output.first_channel) % 4 == 0) {
    if (output.bias == nullptr) return;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) bias[i] = to_float(static_cast<const T*>(output.bias)[k + i]);
  }

  __device__ int64_t at(int pixel) const {
    return static_cast<int64_t>(pixel) * shape.out_channels + output.first_channel + k;
  }

  // Turns fp32 sums into output values.
  __device__ void finish(int pixel, float (&value)[4]) const {
    float residual[4] = {};
    if (params.residual != nullptr) {
      const T* p = static_cast<const T*>(params.residual) + at(pixel);
      if (is_vector) {
        load(residual, p);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (i < count) residual[i] = to_float(p[i]);
      }
    }
    const float* image_bias = nullptr;
    if (output.image_bias != nullptr)
      image_bias = output.image_bias + int64_t{pixel / (shape.H * shape.W)} * output.K + k;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      value[i] += bias[i] + residual[i];
      if (image_bias != nullptr && i < count) value[i] += image_bias[i];
      // Comparisons with NaN are false, so NaN stays NaN.
      if (value[i] < params.low) value[i] = params.low;
      if (value[i] > params.high) value[i] = params.high;
    }
  }

  __device__ void write(int pixel, const float (&value)[4]) const {
    T* p = tensor + at(pixel);
    if (is_vector) {
      store(p, value);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < count) round_to(p[i], value[i]);
    }
  }
};

constexpr int kReduceThreads = 256;

// Adds the workspace slots [kTileM, kTileN] of each split output tile, in order, and applies the
// epilogue. One thread per pixel and four channels.
template <typename T, int kTileM, int kTileN>
__global__ void __launch_bounds__(kReduceThreads)
    dilated_conv2d_fwd_reduce_kernel(T* tensor,  // [N, H, W, out_channels]
                                     const float* partial_sums,
                                     const __grid_constant__ ConvOperands operands,
                                     const __grid_constant__ ConvWork work,
                                     const __grid_constant__ ConvEpilogue params,
                                     const __grid_constant__ ConvShape shape) {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  constexpr int kRowThreads = kTileN / 4, kRows = kReduceThreads / kRowThreads;
  constexpr int kBlocks = kTileM / kRows;  // thread blocks per output tile
  const Reduction reduction = work.reductions[blockIdx.x / kBlocks];
  const Tile tile = work.tiles[reduction.tile];
  const int row = blockIdx.x % kBlocks * kRows + threadIdx.x / kRowThreads;
  const int col = threadIdx.x % kRowThreads * 4, k = reduction.block * kTileN + col;
  const Epilogue<T> epilogue(tensor, params, shape, operands.outputs[tile.output], k);
  if (row >= tile.num_pixels || epilogue.count <= 0) return;

  float sum[4] = {};
  for (int i = 0; i < reduction.num_slots; ++i) {
    const int64_t slot = reduction.first_slot + i;
    float partial[4];
    load(partial, partial_sums + (slot * kTileM + row) * kTileN + col);
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[c] += partial[c];
  }
  const int pixel = work.pixels[tile.first_pixel + row];
  epilogue.finish(pixel, sum);
  epilogue.write(pixel, sum);
}

// Launches the split-K reduction, if any output tile is split.
template <int kTileM, int kTileN, typename T>
Status launch_reduce(const LaunchOptions& options, T* tensor, const float* partial_sums,
                     const ConvOperands& operands, const ConvWork& work, const ConvEpilogue& params,
                     const ConvShape& shape, void* stream) {
  if (work.num_reductions == 0) return {};
  constexpr int kBlocks = kTileM * kTileN / 4 / kReduceThreads;
  return launch_with(options, "dilated_conv2d_fwd_reduce_kernel",
                     dilated_conv2d_fwd_reduce_kernel<T, kTileM, kTileN>,
                     work.num_reductions * kBlocks, kReduceThreads, 0, stream, tensor, partial_sums,
                     operands, work, params, shape);
}

}  // namespace deeplab_fast::cuda
