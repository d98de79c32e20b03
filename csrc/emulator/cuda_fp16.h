// Takes the place of CUDA's header of this name: what the kernels use of it, for the CPU.
#pragma once

#include <cstdint>

#include "common/half.h"
#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half value) {
  return deeplab_fast::to_float(deeplab_fast::Half{value.bits});
}

// Rounds to nearest, ties to even. NaN becomes CUDA's, 0x7fff.
inline __half __float2half_rn(float value) {
  const uint32_t bits = deeplab_fast::float_to_bits(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x47800000u) {  // from 2^16 on: infinity
    magnitude = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: denormal; 0.5f has the same ulp, 2^-24
    const float rounded = deeplab_fast::bits_to_float(magnitude) + 0.5f;
    magnitude = deeplab_fast::float_to_bits(rounded) - deeplab_fast::float_to_bits(0.5f);
  } else {
    const uint32_t rebased = magnitude - (uint32_t{127 - 15} << 23);
    magnitude = (rebased + 0xfffu + (rebased >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | magnitude)};
}

inline __half __float2half(float value) { return __float2half_rn(value); }

inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}

inline float2 __half22float2(__half2 value) {
  return {__half2float(value.x), __half2float(value.y)};
}

inline __half2 __hmax2_nan(__half2 a, __half2 b) {
  using deeplab_fast::emulator::max_nan;
  return {__float2half_rn(max_nan(__half2float(a.x), __half2float(b.x))),
          __float2half_rn(max_nan(__half2float(a.y), __half2float(b.y)))};
}

inline __half2 __hmin2_nan(__half2 a, __half2 b) {
  using deeplab_fast::emulator::min_nan;
  return {__float2half_rn(min_nan(__half2float(a.x), __half2float(b.x))),
          __float2half_rn(min_nan(__half2float(a.y), __half2float(b.y)))};
}
