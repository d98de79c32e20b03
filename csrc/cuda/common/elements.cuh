// fp32, fp16 and bf16 in memory as fp32 in registers, one element or a vector in one access.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace deeplab_fast::cuda {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ inline void round_to(float& result, float value) { result = value; }
__device__ inline void round_to(__half& result, float value) { result = __float2half_rn(value); }
__device__ inline void round_to(__nv_bfloat16& result, float value) {
  result = __float2bfloat16_rn(value);
}

// kCount elements, loaded and stored at once. They are kept as words: the compiler copies a struct
// of 16-bit types element by element, each in a register of its own.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  static_assert(sizeof(T) * kCount % 4 == 0, "whole words");
  uint32_t words[sizeof(T) * kCount / 4];
};
template <typename T>
struct Vector<T, 1> {
  T value;
};

// Elements of a word. A bf16 is the upper half of a float, so one instruction converts it.
__device__ inline void unpack(float* values, uint32_t word, const float*) {
  values[0] = __uint_as_float(word);
}
__device__ inline void unpack(float* values, uint32_t word, const __half*) {
  __half elements[2];
  memcpy(elements, &word, sizeof(elements));
  values[0] = to_float(elements[0]);
  values[1] = to_float(elements[1]);
}
__device__ inline void unpack(float* values, uint32_t word, const __nv_bfloat16*) {
  values[0] = __uint_as_float(word << 16);
  values[1] = __uint_as_float(word & 0xffff0000u);
}

template <typename T, int kCount>
__device__ void unpack(float (&values)[kCount], const Vector<T, kCount>& vector) {
  if constexpr (kCount == 1) {
    values[0] = to_float(vector.value);
  } else {
    constexpr int kPerWord = 4 / sizeof(T);
#pragma unroll
    for (int i = 0; i < kCount / kPerWord; ++i) {
      unpack(values + i * kPerWord, vector.words[i], static_cast<const T*>(nullptr));
    }
  }
}

template <typename T, int kCount>
__device__ Vector<T, kCount> pack(const float (&values)[kCount]) {
  Vector<T, kCount> vector;
  if constexpr (kCount == 1) {
    round_to(vector.value, values[0]);
  } else {
    constexpr int kPerWord = 4 / sizeof(T);
#pragma unroll
    for (int i = 0; i < kCount / kPerWord; ++i) {
      T elements[kPerWord];
#pragma unroll
      for (int e = 0; e < kPerWord; ++e) round_to(elements[e], values[i * kPerWord + e]);
      memcpy(&vector.words[i], elements, 4);
    }
  }
  return vector;
}

// p is aligned to kCount elements, here and below.
template <int kCount, typename T>
__device__ Vector<T, kCount> load_vector(const T* p) {
  return *reinterpret_cast<const Vector<T, kCount>*>(p);
}

template <int kCount, typename T>
__device__ void store_vector(T* p, const Vector<T, kCount>& vector) {
  *reinterpret_cast<Vector<T, kCount>*>(p) = vector;
}

template <int kCount, typename T>
__device__ void load(float (&values)[kCount], const T* p) {
  unpack(values, load_vector<kCount>(p));
}

template <int kCount, typename T>
__device__ void store(T* p, const float (&values)[kCount]) {
  store_vector(p, pack<T>(values));
}

}  // namespace deeplab_fast::cuda
