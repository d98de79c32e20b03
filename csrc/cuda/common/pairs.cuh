// Pairs of 16-bit elements in one 32-bit register: conversion, rounding and clamping.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace deeplab_fast::cuda {

template <typename T>
using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

__device__ inline float2 to_floats(__half2 pair) { return __half22float2(pair); }
__device__ inline float2 to_floats(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }

__device__ inline void round_to(__half2& result, float x, float y) {
  result = __floats2half2_rn(x, y);
}
__device__ inline void round_to(__nv_bfloat162& result, float x, float y) {
  result = __floats2bfloat162_rn(x, y);
}

template <typename P>
__device__ uint32_t bits_of(P pair) {
  uint32_t bits;
  static_assert(sizeof(P) == sizeof(bits), "a pair fills a register");
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

template <typename T>
__device__ Pair<T> pair_of(uint32_t bits) {
  Pair<T> pair;
  memcpy(&pair, &bits, sizeof(pair));
  return pair;
}

// Clamps both elements; NaN stays NaN.
template <typename P>
__device__ P clamp_pair(P pair, P low, P high) {
  return __hmin2_nan(__hmax2_nan(pair, low), high);
}

}  // namespace deeplab_fast::cuda
