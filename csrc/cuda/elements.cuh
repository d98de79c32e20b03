// fp32, fp16 and bf16 in memory as floats in registers, one or two neighbours at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace deeplab_fast::cuda {

__device__ inline float load(const float* p) { return *p; }
__device__ inline float load(const __half* p) { return __half2float(*p); }
__device__ inline float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }

__device__ inline void store(float* p, float value) { *p = value; }
__device__ inline void store(__half* p, float value) { *p = __float2half_rn(value); }
__device__ inline void store(__nv_bfloat16* p, float value) { *p = __float2bfloat16_rn(value); }

__device__ inline float2 load_pair(const float* p) { return *reinterpret_cast<const float2*>(p); }
__device__ inline float2 load_pair(const __half* p) {
  return __half22float2(*reinterpret_cast<const __half2*>(p));
}
__device__ inline float2 load_pair(const __nv_bfloat16* p) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(p));
}

__device__ inline void store_pair(float* p, float2 value) {
  *reinterpret_cast<float2*>(p) = value;
}
__device__ inline void store_pair(__half* p, float2 value) {
  *reinterpret_cast<__half2*>(p) = __floats2half2_rn(value.x, value.y);
}
__device__ inline void store_pair(__nv_bfloat16* p, float2 value) {
  *reinterpret_cast<__nv_bfloat162*>(p) = __floats2bfloat162_rn(value.x, value.y);
}

}  // namespace deeplab_fast::cuda
