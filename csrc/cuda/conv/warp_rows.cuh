// Stores of wgmma accumulators as rows in global memory: 16-bit rows, or fp32 partial sums.
#pragma once

#include <cstdint>

#include "cuda/common/elements.cuh"
#include "cuda/common/ptx_sm90.cuh"

namespace deeplab_fast::cuda {

// 16 bytes of a row. A struct of elements, unlike Vector: kept in words, whose elements are stored
// one by one in unaligned rows, it makes the forward epilogue 40 instructions longer.
template <typename T>
struct alignas(16) Chunk {
  T element[8];
};

constexpr int kStagedCols = 128;                    // columns of 16 rows that are staged at once
constexpr int kStagedBytes = 16 * kStagedCols * 2;  // shared memory per warp

// Stores 16 rows of kStagedCols 16-bit elements of a warp by way of shared memory, so that rows are
// written in adjacent vectors of 16 bytes. pair(j, half) returns the elements of row lane / 4 +
// 8 half in columns 8 j + 2 (lane % 4) and the next, as one register. put(row, col, chunk) stores
// columns col to col + 7 of a row. `staged` is aligned to 128 bytes. Chunks of 16 bytes are
// swizzled by row, so that the same chunk of 8 rows, and 8 chunks of a row, are in different banks.
template <typename T, typename GetPair, typename PutChunk>
__device__ __forceinline__ void store_rows(unsigned char* staged, const GetPair& pair,
                                           const PutChunk& put) {
  static_assert(sizeof(T) == 2, "elements of 16 bits");
  constexpr int kChunks = kStagedCols / 8, kRowBytes = kStagedCols * 2;
  const auto offset = [](int row, int chunk) { return row * kRowBytes + (chunk ^ row % 8) * 16; };
  const int lane = threadIdx.x % 32;
  __syncwarp();  // all lanes have read what was staged before
  // The swizzle is an exclusive or, so an address takes one instruction: with the chunk here, with
  // the row modulo 8 below.
  const int written = offset(lane % 16, lane / 16);
#pragma unroll
  for (int j = 0; j < kChunks; j += 2) {
    const uint32_t pairs[4] = {pair(j, 0), pair(j, 1), pair(j + 1, 0), pair(j + 1, 1)};
    ptx::stmatrix_x4(staged + (written ^ j * 16), pairs);
  }
  __syncwarp();
  constexpr int kRows = 32 / kChunks;  // rows that a warp reads at once
  const int row = lane / kChunks, chunk = lane % kChunks, read = offset(row, chunk);
#pragma unroll
  for (int i = 0; i < 16; i += kRows) {
    const unsigned char* p = staged + (read ^ i % 8 * 16) + i * kRowBytes;
    const auto elements = *reinterpret_cast<const Chunk<T>*>(p);
    put(row + i, chunk * 8, elements);
  }
}

// Stores 16 rows of fp32 accumulators, from first_row on, to a workspace slot [kTile, kTile] that
// the split-K reduction adds. Four lanes fill a sector of 32 bytes.
template <int kTile>
__device__ __forceinline__ void store_partial_sums(const float (&sum)[kTile / 2],
                                                   float* partial_sums, int slot, int first_row) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = static_cast<int64_t>(slot) * kTile + first_row + half * 8 + lane / 4;
    float* p = partial_sums + row * kTile + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kTile / 8; ++j) {
      const float pair[2] = {sum[j * 4 + half * 2], sum[j * 4 + half * 2 + 1]};
      store(p + j * 8, pair);
    }
  }
}

}  // namespace deeplab_fast::cuda
