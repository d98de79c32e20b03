// The image-pooling branch of ASPP is constant over space, so its share of the projection is a bias
// per image:
//   pooled[n, p] = relu(pool_bias[p] + sum over c of pool_weight[p, c] mean over pixels of
//                  input[n, pixel, c])
//   image_bias[n, k] = project_bias[k] + sum over p of project_weight[k, p] pooled[n, p]
// Three small kernels: sums of runs of pixels, read once in 16 bytes a thread; then twice a matrix
// times one vector per image, a warp per output. All sums are fp32 in a fixed order.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../api.h"
#include "elements.cuh"
#include "launch.cuh"

namespace deeplab_fast::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

template <typename T>
constexpr int kChunk = 16 / sizeof(T);  // elements of a load

// A block per run of pixels and 32 chunks of channels; its warps take every kWarps-th pixel.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    aspp_fwd_pool_kernel(float* __restrict__ sums,     // [N, num_runs, C]
                         const T* __restrict__ input,  // [N, num_pixels, C]
                         const __grid_constant__ AsppShape shape) {
  constexpr int kSize = kChunk<T>, kColumns = 32 * kSize;
  const int blocks = (shape.C + kColumns - 1) / kColumns;
  const int64_t run = blockIdx.x / blocks;  // of all images
  const int first_c = blockIdx.x % blocks * kColumns;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t image = run / shape.num_runs, i_run = run % shape.num_runs;
  const int64_t begin = i_run * shape.num_pixels / shape.num_runs;
  const int64_t end = (i_run + 1) * shape.num_pixels / shape.num_runs;

  float sum[kSize] = {};
  if (first_c + lane * kSize < shape.C) {
    const T* p = input + image * shape.num_pixels * shape.C + first_c + lane * kSize;
#pragma unroll 4
    for (int64_t pixel = begin + warp; pixel < end; pixel += kWarps) {
      float chunk[kSize];
      load(chunk, p + pixel * shape.C);
#pragma unroll
      for (int i = 0; i < kSize; ++i) sum[i] += chunk[i];
    }
  }

  float* of_warps = shared_memory<float>();  // [kWarps, kColumns]
#pragma unroll
  for (int i = 0; i < kSize; ++i) of_warps[warp * kColumns + lane * kSize + i] = sum[i];
  __syncthreads();
  const int c = threadIdx.x;
  if (c >= kColumns || first_c + c >= shape.C) return;
  float total = 0.0f;
  for (int w = 0; w < kWarps; ++w) total += of_warps[w * kColumns + c];
  sums[run * shape.C + first_c + c] = total;
}

// output[n, k] = bias[k] + sum over c of weight[k, c] scale sum over runs of input[n, run, c]
template <typename T>
__global__ void __launch_bounds__(kThreads)
    aspp_fwd_linear_kernel(float* __restrict__ output,       // [N, K]
                           const float* __restrict__ input,  // [N, num_runs, C]
                           const T* __restrict__ weight,     // [K, weight_stride]
                           const T* __restrict__ bias,       // [K]
                           int K, int C, int64_t weight_stride, int num_runs, float scale,
                           bool relu) {
  const int blocks = (K + kWarps - 1) / kWarps;
  const int64_t image = blockIdx.x / blocks;
  float* vector = shared_memory<float>();  // [C]
  for (int c = threadIdx.x; c < C; c += kThreads) {
    float sum = 0.0f;
    for (int run = 0; run < num_runs; ++run) sum += input[(image * num_runs + run) * C + c];
    vector[c] = sum * scale;
  }
  __syncthreads();

  constexpr int kSize = kChunk<T>;
  const int lane = threadIdx.x % 32, k = blockIdx.x % blocks * kWarps + threadIdx.x / 32;
  if (k >= K) return;
  float sum = 0.0f;
#pragma unroll 4
  for (int c = lane * kSize; c < C; c += 32 * kSize) {
    float chunk[kSize];
    load(chunk, weight + k * weight_stride + c);
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum += chunk[i] * vector[c + i];
  }
  for (int distance = 16; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (lane > 0) return;
  sum += to_float(bias[k]);
  output[image * K + k] = relu && sum < 0.0f ? 0.0f : sum;
}

template <typename T>
Status launch_typed(float* image_bias, float* pooled, float* sums, const void* input,
                    const AsppWeights& weights, const AsppShape& shape, void* stream) {
  constexpr int kColumns = 32 * kChunk<T>;
  const auto num_blocks = [&](int64_t per_image) {
    return static_cast<unsigned>(shape.N * per_image);
  };
  Status status =
      launch("aspp_fwd_pool_kernel", aspp_fwd_pool_kernel<T>,
             num_blocks(int64_t{shape.num_runs} * ((shape.C + kColumns - 1) / kColumns)), kThreads,
             kWarps * kColumns * sizeof(float), stream, sums, static_cast<const T*>(input), shape);
  if (!status.ok()) return status;
  const auto linear = [&](float* output, const float* vectors, const void* weight, const void* bias,
                          int K, int C, int64_t weight_stride, int num_runs, float scale,
                          bool relu) {
    return launch("aspp_fwd_linear_kernel", aspp_fwd_linear_kernel<T>,
                  num_blocks((K + kWarps - 1) / kWarps), kThreads, C * sizeof(float), stream,
                  output, vectors, static_cast<const T*>(weight), static_cast<const T*>(bias), K, C,
                  weight_stride, num_runs, scale, relu);
  };
  status = linear(pooled, sums, weights.pool, weights.pool_bias, shape.P, shape.C, shape.C,
                  shape.num_runs, 1.0f / static_cast<float>(shape.num_pixels), true);
  if (!status.ok()) return status;
  return linear(image_bias, pooled, weights.project, weights.project_bias, shape.K, shape.P,
                shape.project_stride, 1, 1.0f, false);
}

}  // namespace

Status aspp_image_bias_fwd(float* image_bias, float* pooled, float* sums, const void* input,
                           const AsppWeights& weights, const AsppShape& shape, DType dtype,
                           void* stream) {
  const auto run = [&](auto launch_dtype) {
    return launch_dtype(image_bias, pooled, sums, input, weights, shape, stream);
  };
  switch (dtype) {
    case DType::kFloat32:
      return run(launch_typed<float>);
    case DType::kFloat16:
      return run(launch_typed<__half>);
    case DType::kBFloat16:
      return run(launch_typed<__nv_bfloat16>);
    default:
      return {"aspp_image_bias_fwd", "input must be float32, float16 or bfloat16"};
  }
}

}  // namespace deeplab_fast::cuda
