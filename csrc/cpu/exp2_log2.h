// 2^x and log2(x) in straight-line fp32 code that the compiler vectorises. The polynomials are
// minimax in relative error (Remez exchange). The bounds below were measured on the floats of the
// range.
#pragma once

#include "common/bilinear.h"
#include "common/half.h"
#include "target_clones.h"

namespace deeplab_fast::cpu {

// 2^x for x in [-126, 127], within 1.1 ulp; -127 gives 0 and NaN stays NaN.
ALWAYS_INLINE float fast_exp2(float x) {
  const float magic = 0x1.8p23f + 127.0f;  // leaves round(x) + 127 in the low mantissa bits
  const float shifted = x + magic;
  const float f = x - (shifted - magic);
  float p = 0x1.470b48p-13f;
  p = fma_rn(p, f, 0x1.5f7276p-10f);
  p = fma_rn(p, f, 0x1.3b270ep-7f);
  p = fma_rn(p, f, 0x1.c6ae72p-5f);
  p = fma_rn(p, f, 0x1.ebfbe2p-3f);
  p = fma_rn(p, f, 0x1.62e432p-1f);
  p = fma_rn(p, f, 1.0f);
  return p * bits_to_float(float_to_bits(shifted) << 23);
}

// log2(x) for positive, normal, finite x, within 3 ulp, also near 1; NaN stays NaN.
ALWAYS_INLINE float fast_log2(float x) {
  const uint32_t sqrt_half = 0x3f3504f3u;
  const uint32_t exponent = (float_to_bits(x) - sqrt_half) & 0xff800000u;
  const float m = bits_to_float(float_to_bits(x) - exponent);  // [sqrt(1/2), sqrt(2))
  const float s = (m - 1.0f) / (m + 1.0f);
  const float u = s * s;
  float p = 0x1.ba18f8p-2f;
  p = fma_rn(p, u, 0x1.27471cp-1f);
  p = fma_rn(p, u, 0x1.ec70e6p-1f);
  p = fma_rn(p, u, 0x1.715476p+1f);
  const float integer = static_cast<float>(static_cast<int32_t>(exponent)) * 0x1p-23f;
  return fma_rn(p, s, integer) + (x - x);  // x - x is NaN for NaN
}

}  // namespace deeplab_fast::cpu
