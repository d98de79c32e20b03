// fp32, fp16 and bf16 in memory as floats in registers, one element or several in one access.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace deeplab_fast::cuda {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ inline void round_to(float& result, float value) { result = value; }
__device__ inline void round_to(__half& result, float value) { result = __float2half_rn(value); }
__device__ inline void round_to(__nv_bfloat16& result, float value) {
  result = __float2bfloat16_rn(value);
}

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T element[kCount];
};

// p is aligned to kCount elements.
template <int kCount, typename T>
__device__ void load(float (&values)[kCount], const T* p) {
  const auto vector = *reinterpret_cast<const Vector<T, kCount>*>(p);
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = to_float(vector.element[i]);
}

template <int kCount, typename T>
__device__ void store(T* p, const float (&values)[kCount]) {
  Vector<T, kCount> vector;
#pragma unroll
  for (int i = 0; i < kCount; ++i) round_to(vector.element[i], values[i]);
  *reinterpret_cast<Vector<T, kCount>*>(p) = vector;
}

}  // namespace deeplab_fast::cuda
