// The image-pooling branch of ASPP is constant over space, so its share of the projection is a bias
// per image:
//   pooled[n, p] = relu(pool_bias[p] + sum over c of pool_weight[p, c] means[n, c])
//   image_bias[n, k] = project_bias[k] + sum over p of project_weight[k, p] pooled[n, p]
// Each is a matrix times one vector per image; a warp computes one output. Sums are fp32 in a fixed
// order.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "api.h"
#include "cuda/common/dtypes.cuh"
#include "cuda/common/elements.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"

namespace deeplab_fast::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

template <typename T>
constexpr int kChunk = 16 / sizeof(T);  // elements of a load

// output[n, k] = bias[k] + sum over c of weight[k, c] input[n, c]
template <typename T>
__global__ void __launch_bounds__(kThreads)
    aspp_fwd_linear_kernel(float* output,       // [N, K]
                           const float* input,  // [N, C]
                           const T* weight,     // [K, weight_stride]
                           const T* bias,       // [K]
                           int K, int C, int64_t weight_stride, bool relu) {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int blocks = (K + kWarps - 1) / kWarps;
  const int64_t image = blockIdx.x / blocks;
  float* vector = shared_memory<float>();  // [C]
  for (int c = threadIdx.x; c < C; c += kThreads) vector[c] = input[image * C + c];
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
Status launch_typed(float* image_bias, float* pooled, const float* means,
                    const AsppWeights& weights, const AsppShape& shape, bool overlaps,
                    void* stream) {
  const auto linear = [&](float* output, const float* vectors, const void* weight, const void* bias,
                          int K, int C, int64_t weight_stride, bool relu) {
    const auto num_blocks = static_cast<unsigned>(shape.N * ((K + kWarps - 1) / kWarps));
    return launch_with({1, overlaps}, "aspp_fwd_linear_kernel", aspp_fwd_linear_kernel<T>,
                       num_blocks, kThreads, C * sizeof(float), stream, output, vectors,
                       static_cast<const T*>(weight), static_cast<const T*>(bias), K, C,
                       weight_stride, relu);
  };
  const Status status =
      linear(pooled, means, weights.pool, weights.pool_bias, shape.P, shape.C, shape.C, true);
  if (!status.ok()) return status;
  return linear(image_bias, pooled, weights.project, weights.project_bias, shape.K, shape.P,
                shape.project_stride, false);
}

}  // namespace

Status aspp_image_bias_fwd(float* image_bias, float* pooled, const float* means,
                           const AsppWeights& weights, const AsppShape& shape, DType dtype,
                           bool overlaps, void* stream) {
  return with_elements(dtype, "aspp_image_bias_fwd", [&](auto element) {
    return launch_typed<decltype(element)>(image_bias, pooled, means, weights, shape, overlaps,
                                           stream);
  });
}

}  // namespace deeplab_fast::cuda
