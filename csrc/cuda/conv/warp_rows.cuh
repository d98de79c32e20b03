// From the registers in which wgmma leaves a warp's sums to rows in memory. Rounded to 16 bits they
// go by way of shared memory, so that a row leaves in vectors of 16 bytes next to each other.
#pragma once

#include <cstdint>

#include "cuda/common/elements.cuh"
#include "cuda/common/ptx_sm90.cuh"

namespace deeplab_fast::cuda {

constexpr int kStagedCols = 128;                    // of 16 rows, at a time
constexpr int kStagedBytes = 16 * kStagedCols * 2;  // of a warp

// 16 bytes of a row. A struct of elements, unlike Vector: kept in words, whose elements are stored
// one by one in unaligned rows, it makes the forward epilogue 40 instructions longer.
template <typename T>
struct alignas(16) Chunk {
  T element[8];
};

// pair(j, half) gives, in a register, columns 8 j + 2 (lane % 4) and the next of row lane / 4 +
// 8 half: two elements of 16 bits. put(row, col, chunk) gets columns col .. col + 7 of a row.
// staged is aligned to 128 bytes. A chunk of 16 bytes lies in its row at a place that the row
// permutes, so that the same chunk of 8 rows, and 8 chunks of a row, are in different banks.
template <typename T, typename GetPair, typename PutChunk>
__device__ __forceinline__ void store_rows(unsigned char* staged, const GetPair& pair,
                                           const PutChunk& put) {
  static_assert(sizeof(T) == 2, "elements of 16 bits");
  constexpr int kChunks = kStagedCols / 8, kRowBytes = kStagedCols * 2;
  const auto offset = [](int row, int chunk) { return row * kRowBytes + (chunk ^ row % 8) * 16; };
  const int lane = threadIdx.x % 32;
  __syncwarp();  // what was staged before has been read
  // Numbers whose bits do not overlap are added by exclusive or, so that an address takes one
  // instruction: here of the chunk, below of the row modulo 8.
  const int written = offset(lane % 16, lane / 16);
#pragma unroll
  for (int j = 0; j < kChunks; j += 2) {
    const uint32_t pairs[4] = {pair(j, 0), pair(j, 1), pair(j + 1, 0), pair(j + 1, 1)};
    ptx::stmatrix_x4(staged + (written ^ j * 16), pairs);
  }
  __syncwarp();
  constexpr int kRows = 32 / kChunks;  // at once
  const int row = lane / kChunks, chunk = lane % kChunks, read = offset(row, chunk);
#pragma unroll
  for (int i = 0; i < 16; i += kRows) {
    const unsigned char* p = staged + (read ^ i % 8 * 16) + i * kRowBytes;
    const auto elements = *reinterpret_cast<const Chunk<T>*>(p);
    put(row + i, chunk * 8, elements);
  }
}

// The pieces of split sums, fp32, that a second kernel adds: 16 rows of a slot of [kTile, kTile],
// from first_row on. Four lanes fill a sector of 32 bytes.
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
