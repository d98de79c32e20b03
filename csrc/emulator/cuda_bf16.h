// Takes the place of CUDA's header of this name: what the kernels use of it, for the CPU.
#pragma once

#include <cstdint>

#include "common/half.h"
#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  return deeplab_fast::to_float(deeplab_fast::BFloat16{value.bits});
}

// Rounds to nearest, ties to even. NaN becomes CUDA's, 0x7fff.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (value != value) return {0x7fff};
  const uint32_t bits = deeplab_fast::float_to_bits(value);
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}

inline float2 __bfloat1622float2(__nv_bfloat162 value) {
  return {__bfloat162float(value.x), __bfloat162float(value.y)};
}

inline __nv_bfloat162 __hmax2_nan(__nv_bfloat162 a, __nv_bfloat162 b) {
  using deeplab_fast::emulator::max_nan;
  return {__float2bfloat16_rn(max_nan(__bfloat162float(a.x), __bfloat162float(b.x))),
          __float2bfloat16_rn(max_nan(__bfloat162float(a.y), __bfloat162float(b.y)))};
}

inline __nv_bfloat162 __hmin2_nan(__nv_bfloat162 a, __nv_bfloat162 b) {
  using deeplab_fast::emulator::min_nan;
  return {__float2bfloat16_rn(min_nan(__bfloat162float(a.x), __bfloat162float(b.x))),
          __float2bfloat16_rn(min_nan(__bfloat162float(a.y), __bfloat162float(b.y)))};
}
