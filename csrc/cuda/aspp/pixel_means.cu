// Means over the pixels of each image [num_pixels, C], in fp32 and a fixed order. The first kernel
// sums runs of pixels into rows (PixelRuns), each thread reading 16 bytes at a time; the second
// adds the rows of an image. dilated_conv2d_sm90.cu can write such rows, too.

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

// One block per run of pixels and 32 chunks of channels; a warp takes every kWarps-th pixel.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    pixel_sums_fwd_kernel(float* __restrict__ sums,     // [rows, C]
                          const T* __restrict__ input,  // [N, num_pixels, C]
                          const __grid_constant__ PixelRuns runs) {
  constexpr int kSize = kChunk<T>, kColumns = 32 * kSize;
  const int blocks = (runs.C + kColumns - 1) / kColumns;
  const int64_t i_run = blockIdx.x / blocks;
  const int first_c = blockIdx.x % blocks * kColumns;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = threadIdx.x;
  const int64_t begin = i_run * runs.run;
  const int64_t end = min(begin + runs.run, runs.N * runs.num_pixels);
  float* of_warps = shared_memory<float>();  // [kWarps, kColumns]
  for (int64_t image = begin / runs.num_pixels; image * runs.num_pixels < end; ++image) {
    const int64_t image_end = min(end, (image + 1) * runs.num_pixels);
    float sum[kSize] = {};
    if (first_c + lane * kSize < runs.C) {
      const T* p = input + first_c + lane * kSize;
#pragma unroll 4
      for (int64_t pixel = max(begin, image * runs.num_pixels) + warp; pixel < image_end;
           pixel += kWarps) {
        float chunk[kSize];
        load(chunk, p + pixel * runs.C);
#pragma unroll
        for (int i = 0; i < kSize; ++i) sum[i] += chunk[i];
      }
    }
    __syncthreads();  // before the sums are overwritten
#pragma unroll
    for (int i = 0; i < kSize; ++i) of_warps[warp * kColumns + lane * kSize + i] = sum[i];
    __syncthreads();
    if (c >= kColumns || first_c + c >= runs.C) continue;
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += of_warps[w * kColumns + c];
    sums[(i_run + image) * runs.C + first_c + c] = total;
  }
}

// One block per image and 32 channels; a warp takes every kWarps-th row.
__global__ void __launch_bounds__(kThreads)
    pixel_means_fwd_kernel(float* means,       // [N, C]
                           const float* sums,  // [rows, C]
                           const __grid_constant__ PixelRuns runs) {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int blocks = (runs.C + 31) / 32;
  const int64_t image = blockIdx.x / blocks;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int c = blockIdx.x % blocks * 32 + lane;
  const int64_t first_run = image * runs.num_pixels / runs.run;
  const int64_t last_run = ((image + 1) * runs.num_pixels - 1) / runs.run;
  float sum = 0.0f;
  if (c < runs.C) {
#pragma unroll 8
    for (int64_t row = (first_run + image) * runs.parts + warp;
         row < (last_run + image + 1) * runs.parts; row += kWarps)
      sum += sums[row * runs.C + c];
  }
  float* of_warps = shared_memory<float>();  // [kWarps, 32]
  of_warps[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || c >= runs.C) return;
  float total = 0.0f;
  for (int w = 0; w < kWarps; ++w) total += of_warps[w * 32 + lane];
  means[image * runs.C + c] = total / static_cast<float>(runs.num_pixels);
}

template <typename T>
Status launch_typed(float* sums, const void* input, const PixelRuns& runs, void* stream) {
  constexpr int kColumns = 32 * kChunk<T>;
  const int64_t num_runs = (runs.N * runs.num_pixels + runs.run - 1) / runs.run;
  const auto num_blocks = static_cast<unsigned>(num_runs * ((runs.C + kColumns - 1) / kColumns));
  return launch("pixel_sums_fwd_kernel", pixel_sums_fwd_kernel<T>, num_blocks, kThreads,
                kWarps * kColumns * sizeof(float), stream, sums, static_cast<const T*>(input),
                runs);
}

}  // namespace

Status pixel_sums_fwd(float* sums, const void* input, const PixelRuns& runs, DType dtype,
                      void* stream) {
  return with_elements(dtype, "pixel_sums_fwd", [&](auto element) {
    return launch_typed<decltype(element)>(sums, input, runs, stream);
  });
}

Status pixel_means_fwd(float* means, const float* sums, const PixelRuns& runs, bool overlaps,
                       void* stream) {
  const auto num_blocks = static_cast<unsigned>(runs.N * ((runs.C + 31) / 32));
  return launch_with({1, overlaps}, "pixel_means_fwd_kernel", pixel_means_fwd_kernel, num_blocks,
                     kThreads, kThreads * sizeof(float), stream, means, sums, runs);
}

}  // namespace deeplab_fast::cuda
