// Gradients of a depthwise dilated convolution's weight and bias:
// grad_weight[c, tap] = sum over pixels of input[n, y + dy, x + dx, c] grad_output[n, y, x, c].
// depthwise.cuh divides the work. A thread multiplies each input row by the R rows of grad_output
// that it meets, which it keeps in registers with the sums of all taps. A block computes a fixed
// part of all columns and adds the sums of its threads in shared memory; a second kernel adds the
// parts. The shape alone determines the order of all sums.

#include <cmath>
#include <cstdint>

#include "api.h"
#include "cuda/common/dtypes.cuh"
#include "cuda/common/elements.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/depthwise/depthwise.cuh"

namespace deeplab_fast::cuda {
namespace {

// Floats from one sum of all threads to the next: eight more put vectors in different banks.
constexpr int kPitch = kThreads + 8;

template <int kVector, int kTaps>
constexpr size_t kSmem = sizeof(float) * (kTaps + 1) * kVector * kPitch;

// Offset of tap `index` of `count`, clipped to `size`.
__device__ int offset_of(int index, int count, int dilation, int size) {
  const int64_t offset = static_cast<int64_t>(index - count / 2) * dilation;
  return static_cast<int>(
      max(min(offset, static_cast<int64_t>(size)), -static_cast<int64_t>(size)));
}

// All taps of a kR x kS kernel; for other kernels kR = kS = 1, and the tap is blockIdx.y.
template <typename T, int kVector, int kR, int kS>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM<kR * kS>)
    depthwise_conv2d_wgrad_kernel(float* __restrict__ partial_sums,   // [num_parts, R * S + 1, C]
                                  const T* __restrict__ grad_output,  // [N, H, W, C]
                                  const T* __restrict__ input,        // [N, H, W, C]
                                  const __grid_constant__ DepthwiseShape shape,
                                  const __grid_constant__ Split split, int num_parts) {
  constexpr int kTaps = kR * kS;
  const int vector = vector_of(split), c = vector * kVector;
  const int part = blockIdx.x / split.chunks;
  int offset_H = 0, offset_W = 0;
  if constexpr (kTaps == 1) {
    offset_H = offset_of(blockIdx.y / shape.S, shape.R, shape.dilation_H, shape.H);
    offset_W = offset_of(blockIdx.y % shape.S, shape.S, shape.dilation_W, shape.W);
  }
  const int64_t row_stride = static_cast<int64_t>(shape.W) * shape.C;
  float sum[kTaps][kVector] = {}, grad_sum[kVector] = {};

  int64_t offset[kS];
#pragma unroll
  for (int s = 0; s < kS; ++s) {
    offset[s] = static_cast<int64_t>(offset_W + (s - kS / 2) * shape.dilation_W) * shape.C;
  }

  for (int group = part; group < split.groups && vector < split.vectors; group += num_parts) {
    const Strip strip = strip_of(group, shape, split);
    const int64_t first =
        (static_cast<int64_t>(strip.n) * shape.H * shape.W + strip.x) * shape.C + c;
    bool has_column[kS];
#pragma unroll
    for (int s = 0; s < kS; ++s) {
      const int x = strip.x + offset_W + (s - kS / 2) * shape.dilation_W;
      has_column[s] = x >= 0 && x < shape.W;
    }
    const auto load_input = [&](const T* pixel, int s, bool has_row) {
      return has_row && has_column[s] ? load_vector<kVector>(pixel + offset[s])
                                      : Vector<T, kVector>{};
    };

    for (int position = strip.begin; position < strip.end;) {
      const Run run = run_of(position, strip.end, shape);
      position += run.count;

      // Input row j meets tap row i in row j - i of grad_output, which is in grads[i].
      const int rows = run.count + kR - 1;
      const int64_t stride = run.step * row_stride;
      int y = run.first + offset_H - kR / 2 * run.step;
      const int64_t to_grad = kR / 2 * stride - offset_H * row_stride;
      int64_t at = first + y * row_stride;
      float grads[kR][kVector] = {};
      Vector<T, kVector> row[kS], grad = load_vector<kVector>(grad_output + at + to_grad);
#pragma unroll
      for (int s = 0; s < kS; ++s) row[s] = load_input(input + at, s, y >= 0 && y < shape.H);
#pragma unroll 1  // else three blocks would not have the registers
      for (int j = 0; j < rows; ++j) {
#pragma unroll
        for (int i = kR - 1; i > 0; --i) {
#pragma unroll
          for (int e = 0; e < kVector; ++e) grads[i][e] = grads[i - 1][e];
        }
        unpack(grads[0], grad);
        y += run.step;
        at += stride;
        const bool has_next = j + 1 < rows && y >= 0 && y < shape.H;
        grad = {};
        if (j + 1 < run.count) grad = load_vector<kVector>(grad_output + at + to_grad);
#pragma unroll
        for (int e = 0; e < kVector; ++e) grad_sum[e] += grads[0][e];
        const auto add_products = [&](auto is_used) {
#pragma unroll
          for (int s = 0; s < kS; ++s) {
            float x[kVector];
            unpack(x, row[s]);
            row[s] = load_input(input + at, s, has_next);  // arrives during the products
#pragma unroll
            for (int i = 0; i < kR; ++i) {
              if (!is_used(i)) continue;
#pragma unroll
              for (int e = 0; e < kVector; ++e) {
                sum[i * kS + s][e] = fmaf(x[e], grads[i][e], sum[i * kS + s][e]);
              }
            }
          }
        };
        // Rows outside the run are skipped: their zeros times an infinite input would give NaN.
        if (j >= kR - 1 && j < run.count) {
          add_products([](int) { return true; });
        } else {
          add_products([&](int i) { return i <= j && j - i < run.count; });
        }
      }
    }
  }

  // Sums over the columns of the block
  float* sums = shared_memory<float>();  // [kTaps + 1, kVector, kPitch]
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      sums[(tap * kVector + e) * kPitch + threadIdx.x] = sum[tap][e];
    }
    sums[(kTaps * kVector + e) * kPitch + threadIdx.x] = grad_sum[e];
  }
  __syncthreads();
  const int num_taps = shape.R * shape.S, channels = split.lanes * kVector;
  const int first_c = blockIdx.x % split.chunks * channels;
  for (int i = threadIdx.x; i < (kTaps + 1) * channels; i += kThreads) {
    const int tap = i / channels, channel = i % channels;
    const float* row = sums + (tap * kVector + channel % kVector) * kPitch + channel / kVector;
    float total = 0.0f;
    for (int column = 0; column < split.columns; ++column) total += row[column * split.lanes];
    if (first_c + channel >= shape.C || (tap == kTaps && blockIdx.y > 0)) continue;
    const int64_t to =
        static_cast<int64_t>(part) * (num_taps + 1) + (tap < kTaps ? blockIdx.y + tap : num_taps);
    partial_sums[to * shape.C + first_c + channel] = total;
  }
}

// One thread per channel and tap; the bias counts as a tap.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    depthwise_conv2d_wgrad_reduce_kernel(T* __restrict__ grad_weight,  // [C, num_taps] or nullptr
                                         T* __restrict__ grad_bias,    // [C] or nullptr
                                         const float* __restrict__ partial_sums, int num_parts,
                                         int num_taps, int C) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t size = static_cast<int64_t>(num_taps + 1) * C;
  if (i >= size) return;
  const int64_t tap = i / C, c = i % C;
  float sum = 0.0f;
#pragma unroll 8
  for (int part = 0; part < num_parts; ++part) sum += partial_sums[part * size + i];
  if (tap < num_taps) {
    if (grad_weight) round_to(grad_weight[c * num_taps + tap], sum);
  } else {
    if (grad_bias) round_to(grad_bias[c], sum);
  }
}

template <typename T, int kVector, int kR, int kS>
Status launch_wgrad(float* partial_sums, const T* grad_output, const T* input,
                    const DepthwiseShape& shape, int num_parts, void* stream) {
  const Split split = split_of<T, kVector>(shape);
  const int blocks_of_taps = shape.R * shape.S / (kR * kS);
  const dim3 grid(split.chunks * num_parts, blocks_of_taps);
  return launch("depthwise_conv2d_wgrad_kernel", depthwise_conv2d_wgrad_kernel<T, kVector, kR, kS>,
                grid, kThreads, kSmem<kVector, kR * kS>, stream, partial_sums, grad_output, input,
                shape, split, num_parts);
}

template <typename T>
Status launch_typed(void* grad_weight, void* grad_bias, float* partial_sums,
                    const void* grad_output_, const void* input_, const DepthwiseShape& shape,
                    int num_parts, void* stream) {
  const auto* grad_output = static_cast<const T*>(grad_output_);
  const auto* input = static_cast<const T*>(input_);
  const auto launch_parts = [&](auto launcher) {
    return launcher(partial_sums, grad_output, input, shape, num_parts, stream);
  };
  const bool has_vectors = shape.C % kWide<T> == 0;
  Status status;
  if (has_vectors && shape.R == 3 && shape.S == 3) {
    status = launch_parts(launch_wgrad<T, kWide<T>, 3, 3>);
  } else if (has_vectors && shape.R == 5 && shape.S == 5) {
    status = launch_parts(launch_wgrad<T, kNarrow<T>, 5, 5>);
  } else if (has_vectors) {
    status = launch_parts(launch_wgrad<T, kWide<T>, 1, 1>);
  } else {
    status = launch_parts(launch_wgrad<T, 1, 1, 1>);
  }
  if (!status.ok()) return status;
  const int num_taps = shape.R * shape.S;
  const int64_t sums = static_cast<int64_t>(num_taps + 1) * shape.C;
  return launch("depthwise_conv2d_wgrad_reduce_kernel", depthwise_conv2d_wgrad_reduce_kernel<T>,
                static_cast<unsigned>((sums + kThreads - 1) / kThreads), kThreads, 0, stream,
                static_cast<T*>(grad_weight), static_cast<T*>(grad_bias), partial_sums, num_parts,
                num_taps, shape.C);
}

}  // namespace

Status depthwise_conv2d_wgrad(void* grad_weight, void* grad_bias, float* partial_sums,
                              const void* grad_output, const void* input,
                              const DepthwiseShape& shape, int num_parts, DType dtype,
                              void* stream) {
  return with_elements(dtype, "depthwise_conv2d_wgrad", [&](auto element) {
    return launch_typed<decltype(element)>(grad_weight, grad_bias, partial_sums, grad_output, input,
                                           shape, num_parts, stream);
  });
}

}  // namespace deeplab_fast::cuda
