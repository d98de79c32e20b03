// Depthwise dilated convolution, stride 1, zero padding that keeps the size:
// output[n, y, x, c] = bias[c] + sum over taps of input[n, y + dy, x + dx, c] weight[c, tap], then
// the residual and the clamp of the epilogue. Bound by memory, so it is about reading once.
//
// Rows and columns are numbered by their residue modulo the rate: pixels a rate apart become
// neighbours, and the convolution dense. A thread has a vector of channels at one column and walks
// a strip of rows. An input row that it loads is added to the R output rows that need it, whose
// sums wait in registers. A block has a cache line of channels and neighbouring columns, so that
// the other columns' loads find theirs in L1.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../api.h"
#include "launch.cuh"

namespace deeplab_fast::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kLine = 128;  // bytes of a pixel's channels that a block has at most

// So many registers are left to a thread: weights take as many as there are taps.
template <int kTaps>
constexpr int kBlocksPerSM = kTaps > 9 ? 2 : 3;

__device__ float to_float(float value) { return value; }
__device__ float to_float(__half value) { return __half2float(value); }
__device__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ void round_to(float* p, float value) { *p = value; }
__device__ void round_to(__half* p, float value) { *p = __float2half_rn(value); }
__device__ void round_to(__nv_bfloat16* p, float value) { *p = __float2bfloat16_rn(value); }

// In words, because structs of 16-bit types are copied in pieces and take a register each.
template <typename T, int kVector>
struct alignas(sizeof(T) * kVector) Vector {
  static_assert(sizeof(T) * kVector % 4 == 0, "whole words");
  uint32_t words[sizeof(T) * kVector / 4];
};
template <typename T>
struct Vector<T, 1> {
  T value;
};

template <typename T, int kVector>
__device__ void unpack(float (&to)[kVector], const Vector<T, kVector>& vector) {
  if constexpr (kVector == 1) {
    to[0] = to_float(vector.value);
  } else {
    constexpr int kPerWord = 4 / sizeof(T);
#pragma unroll
    for (int i = 0; i < kVector / kPerWord; ++i) {
      T elements[kPerWord];
      memcpy(elements, &vector.words[i], 4);
#pragma unroll
      for (int e = 0; e < kPerWord; ++e) to[i * kPerWord + e] = to_float(elements[e]);
    }
  }
}

template <typename T, int kVector>
__device__ Vector<T, kVector> pack(const float (&from)[kVector]) {
  Vector<T, kVector> vector;
  if constexpr (kVector == 1) {
    round_to(&vector.value, from[0]);
  } else {
    constexpr int kPerWord = 4 / sizeof(T);
#pragma unroll
    for (int i = 0; i < kVector / kPerWord; ++i) {
      T elements[kPerWord];
#pragma unroll
      for (int e = 0; e < kPerWord; ++e) round_to(&elements[e], from[i * kPerWord + e]);
      memcpy(&vector.words[i], elements, 4);
    }
  }
  return vector;
}

template <typename T, int kVector>
__device__ Vector<T, kVector> load(const T* p) {
  return *reinterpret_cast<const Vector<T, kVector>*>(p);
}

// How the work is cut into blocks and threads.
struct Split {
  int vectors, chunks, lanes;  // of channels: in all, per pixel blocks, neighbouring threads
  int columns;                 // of a block: kThreads / lanes
  int strips;                  // of rows, in an image
  int positions;               // columns of all strips of all images
};

template <typename T, int kVector>
Split split_of(const DepthwiseShape& shape) {
  constexpr int kMaxLanes = kLine / (sizeof(T) * kVector);
  Split split;
  split.vectors = shape.C / kVector;
  split.chunks = (split.vectors + kMaxLanes - 1) / kMaxLanes;
  split.lanes = (split.vectors + split.chunks - 1) / split.chunks;
  split.columns = kThreads / split.lanes;
  split.strips = (shape.H + shape.strip_rows - 1) / shape.strip_rows;
  split.positions = shape.N * split.strips * shape.W;
  return split;
}

// The row or column at a position in the order of residues modulo the rate, which is at most size.
__device__ int coordinate(int position, int size, int rate) {
  const int shorter = size / rate, num_longer = size % rate;  // the first residues have one more
  const int in_longer = num_longer * (shorter + 1);
  if (position < in_longer) return position / (shorter + 1) + position % (shorter + 1) * rate;
  position -= in_longer;
  return num_longer + position / shorter + position % shorter * rate;
}

// What a thread works on: rows [begin, end), as positions, of one column of an image.
struct Strip {
  int n, x, begin, end;
};

// The strip of a thread's column of a group of them; without rows past the end.
__device__ Strip strip_of(int group, const DepthwiseShape& shape, const Split& split) {
  const int column = threadIdx.x / split.lanes;
  const int64_t index = static_cast<int64_t>(group) * split.columns + column;
  if (column >= split.columns || index >= split.positions) return {0, 0, 0, 0};
  const int position = static_cast<int>(index);
  const int begin = position / shape.W % split.strips * shape.strip_rows;
  return {position / shape.W / split.strips, coordinate(position % shape.W, shape.W, shape.rate_W),
          begin, min(begin + shape.strip_rows, shape.H)};
}

// Rows that are one rate apart: the i-th is first + i * step.
struct Run {
  int first, step, count;
};

// Of a strip's rows from a position on. With mirrored taps the last comes first.
__device__ Run run_of(int position, int end, const DepthwiseShape& shape) {
  const int y = coordinate(position, shape.H, shape.rate_H);
  const int count = min(end - position, (shape.H - 1 - y) / shape.rate_H + 1);
  if (!shape.mirrored) return {y, shape.rate_H, count};
  return {y + (count - 1) * shape.rate_H, -shape.rate_H, count};
}

// The vector of channels of a thread of the block; split.vectors or more for none.
__device__ int vector_of(const Split& split) {
  return blockIdx.x % split.chunks * split.lanes + threadIdx.x % split.lanes;
}

template <typename T, int kVector>
__device__ void store_output(T* output, const ConvEpilogue& epilogue, int64_t offset,
                             const float (&sum)[kVector]) {
  float value[kVector] = {};
  if (epilogue.residual) {
    unpack(value, load<T, kVector>(static_cast<const T*>(epilogue.residual) + offset));
  }
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    value[e] += sum[e];
    value[e] = value[e] < epilogue.low ? epilogue.low : value[e];  // NaN stays
    value[e] = value[e] > epilogue.high ? epilogue.high : value[e];
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
#pragma unroll
  for (int s = 0; s < kS; ++s) {
    const int x = strip.x + (s - kS / 2) * step_W;
    has_column[s] = x >= 0 && x < shape.W;
  }
  const auto load_row = [&](Vector<T, kVector>(&row)[kS], int y, bool is_needed) {
    const T* pixel = input + first + y * row_stride;
#pragma unroll
    for (int s = 0; s < kS; ++s) {
      row[s] = {};
      if (is_needed && y >= 0 && y < shape.H && has_column[s]) {
        row[s] = load<T, kVector>(pixel + static_cast<int64_t>(s - kS / 2) * step_W * shape.C);
      }
    }
  };

  for (int position = strip.begin; position < strip.end;) {
    const Run run = run_of(position, strip.end, shape);
    position += run.count;

    // Input row j is tap row i of output row j - i, which sum[i] is for.
    const int rows = run.count + kR - 1;
    int y = run.first - kR / 2 * run.step;
    float sum[kR][kVector] = {};
    Vector<T, kVector> next[kS];
    load_row(next, y, true);
#pragma unroll kR
    for (int j = 0; j < rows; ++j, y += run.step) {
      Vector<T, kVector> row[kS];
#pragma unroll
      for (int s = 0; s < kS; ++s) row[s] = next[s];
      load_row(next, y + run.step, j + 1 < rows);  // arrives during the products
#pragma unroll
      for (int i = kR - 1; i > 0; --i) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) sum[i][e] = sum[i - 1][e];
      }
#pragma unroll
      for (int e = 0; e < kVector; ++e) sum[0][e] = start[e];

      if (y >= 0 && y < shape.H) {
#pragma unroll
        for (int s = 0; s < kS; ++s) {
          float x[kVector];
          unpack(x, row[s]);
#pragma unroll
          for (int i = 0; i < kR; ++i) {
#pragma unroll
            for (int e = 0; e < kVector; ++e) {
              sum[i][e] = fmaf(x[e], taps[i * kS + s][e], sum[i][e]);
            }
          }
        }
      }
      if (j >= kR - 1) {
        const int output_y = y - kR / 2 * run.step;
        store_output(output, epilogue, first + output_y * row_stride, sum[kR - 1]);
      }
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

unsigned num_blocks(const Split& split) {
  return static_cast<unsigned>((split.positions + split.columns - 1) / split.columns) *
         split.chunks;
}

// Channels in the vectors of a thread: 16 bytes, but as few as leave the weights in registers.
template <typename T>
constexpr int kWide = 16 / sizeof(T);
template <typename T>
constexpr int kNarrow = 4;

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
                  num_blocks(split), kThreads, 0, stream, output, input, weight, bias, epilogue,
                  shape, split);
  }
  if (has_vectors && shape.R == 5 && shape.S == 5) {
    const Split split = split_of<T, kNarrow<T>>(shape);
    return launch("depthwise_conv2d_fwd_kernel", depthwise_conv2d_fwd_kernel<T, kNarrow<T>, 5, 5>,
                  num_blocks(split), kThreads, 0, stream, output, input, weight, bias, epilogue,
                  shape, split);
  }
  const Split split = has_vectors ? split_of<T, kWide<T>>(shape) : split_of<T, 1>(shape);
  const int channels = split.lanes * (has_vectors ? kWide<T> : 1);
  const size_t smem = sizeof(float) * shape.R * shape.S * channels;
  return launch("depthwise_conv2d_fwd_any_kernel",
                has_vectors ? depthwise_conv2d_fwd_any_kernel<T, kWide<T>>
                            : depthwise_conv2d_fwd_any_kernel<T, 1>,
                num_blocks(split), kThreads, smem, stream, output, input, weight, bias, epilogue,
                shape, split);
}

}  // namespace

Status depthwise_conv2d_fwd(void* output, const void* input, const void* weight, const void* bias,
                            const ConvEpilogue& epilogue, const DepthwiseShape& shape, DType dtype,
                            void* stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_fwd<float>(output, input, weight, bias, epilogue, shape, stream);
    case DType::kFloat16:
      return launch_fwd<__half>(output, input, weight, bias, epilogue, shape, stream);
    case DType::kBFloat16:
      return launch_fwd<__nv_bfloat16>(output, input, weight, bias, epilogue, shape, stream);
    default:
      return {"depthwise_conv2d_fwd", "input must be float32, float16 or bfloat16"};
  }
}

}  // namespace deeplab_fast::cuda
