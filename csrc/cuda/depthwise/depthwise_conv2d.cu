// Depthwise dilated convolution, stride 1, zero padding that keeps the size:
// output[n, y, x, c] = bias[c] + sum over taps of input[n, y + dy, x + dx, c] weight[c, tap], then
// the residual and the clamp of the epilogue. depthwise.cuh divides the work. A thread adds each
// input row to the R output rows that need it, whose sums it keeps in registers. It loads an input
// row kRowsAhead rows before it adds it.

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "api.h"
#include "cuda/common/dtypes.cuh"
#include "cuda/common/elements.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pairs.cuh"
#include "cuda/depthwise/depthwise.cuh"

namespace deeplab_fast::cuda {
namespace {

// Clamps a value; NaN stays NaN.
__device__ inline float clamp(float value, float low, float high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

// Clamps the elements of a word. All dtypes represent the bounds exactly, so clamping after
// rounding gives the same result.
template <typename T>
__device__ uint32_t clamp(uint32_t word, float low, float high) {
  if constexpr (std::is_same_v<T, float>) {
    return __float_as_uint(clamp(__uint_as_float(word), low, high));
  } else {
    Pair<T> lows, highs;
    round_to(lows, low, low);
    round_to(highs, high, high);
    return bits_of(clamp_pair(pair_of<T>(word), lows, highs));
  }
}

template <typename T, int kVector>
__device__ void clamp(Vector<T, kVector>& vector, float low, float high) {
  if constexpr (kVector == 1) {
    round_to(vector.value, clamp(to_float(vector.value), low, high));
  } else {
#pragma unroll
    for (uint32_t& word : vector.words) {
      word = clamp<T>(word, low, high);
    }
  }
}

// Adds the residual to `sum`, rounds, clamps and stores it. Overwrites `sum`.
template <typename T, int kVector>
__device__ void store_output(T* output, const ConvEpilogue& epilogue, int64_t offset,
                             float (&sum)[kVector]) {
  if (epilogue.residual) {
    float residual[kVector];
    load(residual, static_cast<const T*>(epilogue.residual) + offset);
#pragma unroll
    for (int e = 0; e < kVector; ++e) sum[e] += residual[e];
  }
  Vector<T, kVector> vector = pack<T>(sum);
  clamp(vector, epilogue.low, epilogue.high);
  store_vector(output + offset, vector);
}

// Loads the bias of channels from c on; zeros if there is none.
template <typename T, int kVector>
__device__ void load_bias(float (&to)[kVector], const T* bias, int c) {
#pragma unroll
  for (int e = 0; e < kVector; ++e) to[e] = bias ? to_float(bias[c + e]) : 0.0f;
}

// Input rows in flight while another row is added: as many as the registers can hold. The three
// warps of a scheduler each add a row in about 420 cycles, and a load from memory takes longer.
template <int kTaps>
constexpr int kRowsAhead = kTaps > 9 ? 1 : 2;

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

  constexpr int kTaps = kR * kS, kAhead = kRowsAhead<kTaps>;
  constexpr int64_t kBytes = sizeof(T);
  float taps[kTaps][kVector], start[kVector];
#pragma unroll
  for (int i = 0; i < kTaps; ++i) {
    float part[kVector];
    load(part, weight + static_cast<int64_t>(c) * kTaps + i * kVector);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const int at = i * kVector + j;
      taps[at % kTaps][at / kTaps] = part[j];
    }
  }
  load_bias(start, bias, c);

  const int64_t row_stride = static_cast<int64_t>(shape.W) * shape.C;
  const int64_t first = (static_cast<int64_t>(strip.n) * shape.H * shape.W + strip.x) * shape.C + c;
  const int step_W = shape.flipped ? -shape.dilation_W : shape.dilation_W;
  const int64_t column_bytes = static_cast<int64_t>(step_W) * shape.C * kBytes;
  bool has_column[kS];
#pragma unroll
  for (int s = 0; s < kS; ++s) {
    const int x = strip.x + (s - kS / 2) * step_W;
    has_column[s] = x >= 0 && x < shape.W;
  }

  // Input rows of a run: from kR / 2 steps before its first output row to kR / 2 after its last.
  const auto convolve = [&](const Run& run) {
    int above = 0, inside = run.count;  // input rows before the first of the map, and on the map
#pragma unroll
    for (int i = 1; i <= kR / 2; ++i) {
      const int before = run.first - i * run.step;
      const int after = run.first + (run.count - 1 + i) * run.step;
      (before >= 0 && before < shape.H ? inside : above) += 1;
      inside += after >= 0 && after < shape.H;
    }

    // Input row i is in rows[i % kAhead] until it is added; then row i + kAhead is loaded there.
    const int64_t stride = run.step * row_stride;
    const char* next = reinterpret_cast<const char*>(  // next row to load, at the thread's column
        input + first + run.first * row_stride - kR / 2 * stride);
    Vector<T, kVector> rows[kAhead][kS];
    const auto load_next = [&](Vector<T, kVector>& to, int s, int inner) {  // inner: i - above
      to = {};
      if (has_column[s] && static_cast<unsigned>(inner) < static_cast<unsigned>(inside)) {
        to = load_vector<kVector>(reinterpret_cast<const T*>(next + (s - kS / 2) * column_bytes));
      }
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
      for (int s = 0; s < kS; ++s) load_next(rows[i][s], s, i - above);
      next += stride * kBytes;
    }

    // Input row i meets tap row k in output row i - k, whose sum is in sums[(i - k) % kR].
    float sums[kR][kVector];
    const auto add_row = [&](int i, int inner, int num_taps) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) sums[i % kR][e] = start[e];
#pragma unroll
      for (int s = 0; s < kS; ++s) {
        float x[kVector];
        unpack(x, rows[i % kAhead][s]);
        load_next(rows[i % kAhead][s], s, inner + kAhead);
#pragma unroll
        for (int k = 0; k < num_taps; ++k) {
          float (&sum)[kVector] = sums[(i + kR - k) % kR];
#pragma unroll
          for (int e = 0; e < kVector; ++e) sum[e] = fmaf(x[e], taps[k * kS + s][e], sum[e]);
        }
      }
      next += stride * kBytes;
    };

    // The first kR - 1 rows complete no output row; each later row completes one.
#pragma unroll
    for (int i = 0; i < kR - 1; ++i) add_row(i, i - above, i + 1);
    int64_t to = first + run.first * row_stride;
    const int end = run.count + kR - 1 - above;
    for (int inner = kR - 1 - above; inner < end; inner += kR * kAhead) {
#pragma unroll
      for (int i = 0; i < kR * kAhead; ++i) {
        if (inner + i >= end) return;
        add_row(kR - 1 + i, inner + i, kR);
        store_output(output, epilogue, to, sums[i % kR]);
        to += stride;
      }
    }
  };
  for (int position = strip.begin; position < strip.end;) {
    const Run run = run_of(position, strip.end, shape);
    convolve(run);
    position += run.count;
  }
}

// Kernels of any size. The weights are in shared memory, and every tap loads its pixel, which is
// usually in a cache.
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
  const int64_t step_H = shape.flipped ? -shape.dilation_H : shape.dilation_H;
  const int64_t step_W = shape.flipped ? -shape.dilation_W : shape.dilation_W;
  for (int position = strip.begin; position < strip.end; ++position) {
    const int64_t y = coordinate(position, shape.H, shape.dilation_H);
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
        load(x, pixel);
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
