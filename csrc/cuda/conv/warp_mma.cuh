// Warp tile of the sm_80 convolution kernels: fragments, rounding to TF32 and mma.sync.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common/ptx.cuh"

namespace deeplab_fast::cuda {

constexpr int kWarpM = 64, kWarpN = 64;
constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;  // mma tiles per warp

// Operands of a warp for half a k-iteration, 32 bytes along k. A register holds two elements of 16
// bits, or one of TF32.
struct Fragments {
  uint32_t a[kTilesM][4], b[kTilesN / 2][4];
};

// Rounds fp32 operands to TF32; the tensor core would truncate them.
template <typename T>
__device__ void round_operand(uint32_t (&r)[4]) {
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (uint32_t& bits : r) bits = ptx::cvt_rna_tf32(__uint_as_float(bits));
  }
}

// Multiplies row i of the warp's mma tiles. Rows must come in order: row 0 rounds the shared b.
template <typename T>
__device__ void multiply_row(float (&sum)[kTilesN][4], Fragments& fragments, int i) {
  auto& [a, b] = fragments;
  round_operand<T>(a[i]);
#pragma unroll
  for (int j = 0; j < kTilesN; ++j) {
    if (i == 0 && j % 2 == 0) round_operand<T>(b[j / 2]);
    const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
    if constexpr (std::is_same_v<T, float>) {
      ptx::mma_m16n8k8_tf32(sum[j], a[i], pair);
    } else {
      ptx::mma_m16n8k16<T>(sum[j], a[i], pair);
    }
  }
}

}  // namespace deeplab_fast::cuda
