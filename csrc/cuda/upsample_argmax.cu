// labels[n, y, x] = argmax_c bilinear(logits[n, c])(y, x), interpolated in fp32.
// logits [N, C, H, W] in any strides, labels [N, out_H, out_W] contiguous.
// One thread per output pixel walks all classes; ties go to the lowest class, the first NaN wins.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../api.h"
#include "../common/bilinear.h"
#include "launch.cuh"

namespace deeplab_fast::cuda {
namespace {

constexpr int kThreads = 256;

__device__ float load(const float* p) { return *p; }
__device__ float load(const __half* p) { return __half2float(*p); }
__device__ float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }

template <typename Label, typename Logit>
__global__ void __launch_bounds__(kThreads)
    upsample_argmax_fwd_kernel(Label* __restrict__ labels,        // [N, out_H, out_W]
                               const Logit* __restrict__ logits,  // [N, C, H, W]
                               const UpsampleShape shape) {
  const int64_t pixels = shape.N * shape.out_H * shape.out_W;
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (pixel >= pixels) return;

  const int64_t x = pixel % shape.out_W;
  const int64_t y = pixel / shape.out_W % shape.out_H;
  const int64_t n = pixel / shape.out_W / shape.out_H;
  const SourcePair row = source_pair(y, shape.H, shape.scale_H, shape.align_corners);
  const SourcePair col = source_pair(x, shape.W, shape.scale_W, shape.align_corners);
  const Logit* a = logits + n * shape.stride_N + row.lo * shape.stride_H + col.lo * shape.stride_W;
  const int64_t right = (col.hi - col.lo) * shape.stride_W;
  const int64_t down = (row.hi - row.lo) * shape.stride_H;

  float best = 0.0f;
  int64_t best_class = -1;
  for (int64_t c = 0; c < shape.C; ++c, a += shape.stride_C) {
    const float value = interpolate(load(a), load(a + right), load(a + down),
                                    load(a + down + right), col.w0, col.w1, row.w0, row.w1);
    if (best_class < 0 || replaces_best(value, best)) {
      best = value;
      best_class = c;
    }
  }
  labels[pixel] = static_cast<Label>(best_class);
}

template <typename Label, typename Logit>
Status launch_typed(void* labels, const void* logits, const UpsampleShape& shape, void* stream) {
  const int64_t pixels = shape.N * shape.out_H * shape.out_W;
  const auto blocks = static_cast<unsigned>((pixels + kThreads - 1) / kThreads);
  return launch("upsample_argmax_fwd_kernel", upsample_argmax_fwd_kernel<Label, Logit>, blocks,
                kThreads, 0, stream, static_cast<Label*>(labels), static_cast<const Logit*>(logits),
                shape);
}

template <typename Label>
Status launch_label(void* labels, const void* logits, const UpsampleShape& shape, DType logit_dtype,
                    void* stream) {
  switch (logit_dtype) {
    case DType::kFloat32:
      return launch_typed<Label, float>(labels, logits, shape, stream);
    case DType::kFloat16:
      return launch_typed<Label, __half>(labels, logits, shape, stream);
    case DType::kBFloat16:
      return launch_typed<Label, __nv_bfloat16>(labels, logits, shape, stream);
    default:
      return {"upsample_argmax_fwd", "logits must be float32, float16 or bfloat16"};
  }
}

}  // namespace

Status upsample_argmax_fwd(void* labels, const void* logits, const UpsampleShape& shape,
                           DType label_dtype, DType logit_dtype, void* stream) {
  if (shape.N * shape.out_H * shape.out_W == 0) return {};
  switch (label_dtype) {
    case DType::kInt64:
      return launch_label<int64_t>(labels, logits, shape, logit_dtype, stream);
    case DType::kInt32:
      return launch_label<int32_t>(labels, logits, shape, logit_dtype, stream);
    case DType::kUInt8:
      return launch_label<uint8_t>(labels, logits, shape, logit_dtype, stream);
    default:
      return {"upsample_argmax_fwd", "labels must be int64, int32 or uint8"};
  }
}

}  // namespace deeplab_fast::cuda
