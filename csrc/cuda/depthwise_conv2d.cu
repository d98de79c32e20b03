// Depthwise dilated convolution, stride 1, zero padding that keeps the size:
// output[n, y, x, c] = bias[c] + sum over taps of input[n, y + dy, x + dx, c] weight[c, tap], then
// the residual and the clamp of the epilogue. depthwise.cuh says how work is split. A thread adds
// an input row that it loads to the R output rows that need it, whose sums wait in registers.

#include <cmath>
#include <cstdint>

#include "../api.h"
#include "depthwise.cuh"
#include "dtypes.cuh"
#include "launch.cuh"

namespace deeplab_fast::cuda {
namespace {

template <typename T, int kVector>
__device__ void store_output(T* output, const ConvEpilogue& epilogue, int64_t offset,
                             const float (&sum)[kVector]) {
  float value[kVector];
#pragma unroll
  for (int e = 0; e < kVector; ++e) value[e] = sum[e];
  if (epilogue.residual) {
    float residual[kVector];
    unpack(residual, load<T, kVector>(static_cast<const T*>(epilogue.residual) + offset));
#pragma unroll
    for (int e = 0; e < kVector; ++e) value[e] += residual[e];
  }
  if (epilogue.low > -INFINITY) {
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      value[e] = value[e] < epilogue.low ? epilogue.low : value[e];  // NaN stays
      value[e] = value[e] > epilogue.high ? epilogue.high : value[e];
    }
  }
  *reinterpret_cast<Vector<T, kVector>*>(output + offset) = pack<T>(value);
}

// bias of a thread's channels from c on, or zeros.
template <typename T, int kVector>
__device__ void load_bias(float (&to)[kVector], const T* bias, int c) {
#pragma unroll
  for (int e = 0; e < kVector; ++e) to[e] = bias ? to_float(bias[c + e]) : 0.0f;
}

template <typename T, int kVector, int kR, int kS>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM<kR * kS>)
    depthwise_conv2d_fwd_kernel(T* output,                     // [N, H, W, C]
                                const T* __restrict__ input,   // [N, H, W, C]
                                const T* __restrict__ weight,  // [C, kR, kS]
                                const T* __restrict__ bias,    // [C] or nullptr
                                const __grid_constant__ ConvEpilogue epilogue,
                                const __grid_constant__ DepthwiseShape shape,
                                const __grid_constant__ Split split) {
  const int vector = vector_of(split), c = vector * kVector;
  const Strip strip = strip_of(blockIdx.x / split.chunks, shape, split);
  if (vector >= split.vectors || strip.begin == strip.end) return;

  constexpr int kTaps = kR * kS;
  float taps[kTaps][kVector], start[kVector];
#pragma unroll
  for (int i = 0; i < kTaps; ++i) {
    float part[kVector];
    unpack(part, load<T, kVector>(weight + static_cast<int64_t>(c) * kTaps + i * kVector));
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const int at = i * kVector + j;
      taps[at % kTaps][at / kTaps] = part[j];
    }
  }
  load_bias(start, bias, c);

  const int64_t row_stride = static_cast<int64_t>(shape.W) * shape.C;
  const int64_t first = (static_cast<int64_t>(strip.n) * shape.H * shape.W + strip.x) * shape.C + c;
  const int step_W = shape.mirrored ? -shape.rate_W : shape.rate_W;
  bool has_column[kS];
  int64_t offset[kS];
#pragma unroll
  for (int s = 0; s < kS; ++s) {
    const int x = strip.x + (s - kS / 2) * step_W;
    has_column[s] = x >= 0 && x < shape.W;
    offset[s] = static_cast<int64_t>(s - kS / 2) * step_W * shape.C;
  }
  const auto load_input = [&](const T* pixel, int s, bool has_row) {
    return has_row && has_column[s] ? load<T, kVector>(pixel + offset[s]) : Vector<T, kVector>{};
  };

  for (int position = strip.begin; position < strip.end;) {
    const Run run = run_of(position, strip.end, shape);
    position += run.count;

    // Input row j is tap row i of output row j - i, which sum[i] is for.
    const int rows = run.count + kR - 1;
    const int64_t stride = run.step * row_stride;
    int y = run.first - kR / 2 * run.step;
    int64_t at = first + y * row_stride;
    float sum[kR][kVector] = {};
    Vector<T, kVector> row[kS];
#pragma unroll
    for (int s = 0; s < kS; ++s) row[s] = load_input(input + at, s, y >= 0 && y < shape.H);
#pragma unroll kR
    for (int j = 0; j < rows; ++j) {
#pragma unroll
      for (int i = kR - 1; i > 0; --i) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) sum[i][e] = sum[i - 1][e];
      }
#pragma unroll
      for (int e = 0; e < kVector; ++e) sum[0][e] = start[e];
      y += run.step;
      at += stride;
      const bool has_next = j + 1 < rows && y >= 0 && y < shape.H;
#pragma unroll
      for (int s = 0; s < kS; ++s) {
        float x[kVector];
        unpack(x, row[s]);
        row[s] = load_input(input + at, s, has_next);  // arrives during the products
#pragma unroll
        for (int i = 0; i < kR; ++i) {
#pragma unroll
          for (int e = 0; e < kVector; ++e) {
            sum[i][e] = fmaf(x[e], taps[i * kS + s][e], sum[i][e]);
          }
        }
      }
      if (j >= kR - 1) store_output(output, epilogue, at - (kR / 2 + 1) * stride, sum[kR - 1]);
    }
  }
}

// Any kernel, its weights in shared memory: every tap is a load that finds its pixel in a cache.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    depthwise_conv2d_fwd_any_kernel(T* output,                     // [N, H, W, C]
                                    const T* __restrict__ input,   // [N, H, W, C]
                                    const T* __restrict__ weight,  // [C, R, S]
                                    const T* __restrict__ bias,    // [C] or nullptr
                                    const __grid_constant__ ConvEpilogue epilogue,
                                    const __grid_constant__ DepthwiseShape shape,
                                    const __grid_constant__ Split split) {
  float* taps = shared_memory<float>();  // [R, S, channels of the block]
  const int num_taps = shape.R * shape.S, channels = split.lanes * kVector;
  const int first_c = blockIdx.x % split.chunks * channels;
  for (int i = threadIdx.x; i < channels * num_taps; i += kThreads) {
    const int c = i / num_taps, tap = i % num_taps;
    if (first_c + c < shape.C) {
      taps[tap * channels + c] =
          to_float(weight[static_cast<int64_t>(first_c + c) * num_taps + tap]);
    }
  }
  __syncthreads();

  const int vector = vector_of(split), c = vector * kVector;
  const Strip strip = strip_of(blockIdx.x / split.chunks, shape, split);
  if (vector >= split.vectors) return;
  const int64_t step_H = shape.mirrored ? -shape.rate_H : shape.rate_H;
  const int64_t step_W = shape.mirrored ? -shape.rate_W : shape.rate_W;
  for (int position = strip.begin; position < strip.end; ++position) {
    const int64_t y = coordinate(position, shape.H, shape.rate_H);
    const int64_t image = static_cast<int64_t>(strip.n) * shape.H;
    float sum[kVector];
    load_bias(sum, bias, c);
    for (int i = 0; i < shape.R; ++i) {
      const int64_t tap_y = y + (i - shape.R / 2) * step_H;
      if (tap_y < 0 || tap_y >= shape.H) continue;
      for (int s = 0; s < shape.S; ++s) {
        const int64_t tap_x = strip.x + (s - shape.S / 2) * step_W;
        if (tap_x < 0 || tap_x >= shape.W) continue;
        const T* pixel = input + ((image + tap_y) * shape.W + tap_x) * shape.C + c;
        float x[kVector];
        unpack(x, load<T, kVector>(pixel));
        const float* w = taps + (i * shape.S + s) * channels + c - first_c;
#pragma unroll
        for (int e = 0; e < kVector; ++e) sum[e] = fmaf(x[e], w[e], sum[e]);
      }
    }
    store_output(output, epilogue, ((image + y) * shape.W + strip.x) * shape.C + c, sum);
  }
}

template <typename T>
Status launch_fwd(void* output_, const void* input_, const void* weight_, const void* bias_,
                  const ConvEpilogue& epilogue, const DepthwiseShape& shape, void* stream) {
  auto* output = static_cast<T*>(output_);
  const auto* input = static_cast<const T*>(input_);
  const auto* weight = static_cast<const T*>(weight_);
  const auto* bias = static_cast<const T*>(bias_);
  const bool has_vectors = shape.C % kWide<T> == 0;
  if (has_vectors && shape.R == 3 && shape.S == 3) {
    const Split split = split_of<T, kWide<T>>(shape);
    return launch("depthwise_conv2d_fwd_kernel", depthwise_conv2d_fwd_kernel<T, kWide<T>, 3, 3>,
                  split.groups * split.chunks, kThreads, 0, stream, output, input, weight, bias,
                  epilogue, shape, split);
  }
  if (has_vectors && shape.R == 5 && shape.S == 5) {
    const Split split = split_of<T, kNarrow<T>>(shape);
    return launch("depthwise_conv2d_fwd_kernel", depthwise_conv2d_fwd_kernel<T, kNarrow<T>, 5, 5>,
                  split.groups * split.chunks, kThreads, 0, stream, output, input, weight, bias,
                  epilogue, shape, split);
  }
  const Split split = has_vectors ? split_of<T, kWide<T>>(shape) : split_of<T, 1>(shape);
  const int channels = split.lanes * (has_vectors ? kWide<T> : 1);
  const size_t smem = sizeof(float) * shape.R * shape.S * channels;
  return launch("depthwise_conv2d_fwd_any_kernel",
                has_vectors ? depthwise_conv2d_fwd_any_kernel<T, kWide<T>>
                            : depthwise_conv2d_fwd_any_kernel<T, 1>,
                split.groups * split.chunks, kThreads, smem, stream, output, input, weight, bias,
                epilogue, shape, split);
}

}  // namespace

Status depthwise_conv2d_fwd(void* output, const void* input, const void* weight, const void* bias,
                            const ConvEpilogue& epilogue, const DepthwiseShape& shape, DType dtype,
                            void* stream) {
  return with_elements(dtype, "depthwise_conv2d_fwd", [&](auto element) {
    return launch_fwd<decltype(element)>(output, input, weight, bias, epilogue, shape, stream);
  });
}

}  // namespace deeplab_fast::cuda
