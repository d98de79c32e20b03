// Bilinear interpolation: the arithmetic that every backend but `reference` reproduces bit for bit,
// and the rule by which a class can be dropped without changing any argmax.
//
//   src = align_corners ? scale * dst : max(fma(scale, dst + 0.5, -0.5), 0)
//   lo = floor(src), hi = min(lo + 1, size - 1), w1 = src - lo, w0 = 1 - w1
//   value = fma(fma(a, w0, b * w1), h0, fma(c, w0, d * w1) * h1)      corners a b / c d
//
// PyTorch's CUDA kernel for contiguous NCHW compiles to the same order of operations
// (upsample_bilinear2d_out_frame). Fused multiply-adds are explicit; build with -ffp-contract=off.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace deeplab_fast {

HOST_DEVICE float fma_rn(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

HOST_DEVICE float mul_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// The two source pixels of one output coordinate and their weights.
struct SourcePair {
  int64_t lo, hi;
  float w0, w1;
};

HOST_DEVICE SourcePair source_pair(int64_t dst, int64_t size, float scale, bool align_corners) {
  float src;
  if (align_corners) {
    src = mul_rn(scale, static_cast<float>(dst));
  } else {
    src = fma_rn(scale, static_cast<float>(dst) + 0.5f, -0.5f);
    src = src < 0.0f ? 0.0f : src;
  }
  SourcePair pair;
  pair.lo = static_cast<int64_t>(src);
  if (pair.lo > size - 1) pair.lo = size - 1;  // scale * dst may round up to size
  pair.hi = pair.lo + 1 < size ? pair.lo + 1 : pair.lo;
  pair.w1 = src - static_cast<float>(pair.lo);
  pair.w0 = 1.0f - pair.w1;
  return pair;
}

HOST_DEVICE float interpolate(float a, float b, float w0, float w1) {
  return fma_rn(a, w0, mul_rn(b, w1));
}

HOST_DEVICE float interpolate(float a, float b, float c, float d, float w0, float w1, float h0,
                              float h1) {
  return interpolate(interpolate(a, b, w0, w1), interpolate(c, d, w0, w1), h0, h1);
}

// Bound at or below which a logit loses to x. If the logit of a class is at or below
// losing_bound(x), where x is the logit of another class, at all four corners of a cell, the class
// wins no pixel of the cell, whatever the rounding: an interpolated value is off by less than 2^-21
// of the weighted |corners|, and x - losing_bound(x) exceeds 2^-20 of both logits. 2^-118 covers
// denormal products.
HOST_DEVICE float losing_bound(float x) {
  return x - fma_rn(0x1p-18f, x < 0.0f ? -x : x, 0x1p-118f);
}

// Order of torch.argmax: the first NaN wins, otherwise the greatest value, and of equal values that
// of the lowest class. `value` belongs to a higher class than `best`.
HOST_DEVICE bool replaces_best(float value, float best) {
  return value > best || (value != value && best == best);
}

}  // namespace deeplab_fast
