// What the depthwise kernels share: vectors of channels, and the way work is cut into threads.
//
// Rows and columns are numbered by their residue modulo the dilation: pixels a dilation apart
// become neighbours, and the convolution dense. A thread has a vector of channels at one column and
// walks a strip of rows. A block has a cache line of channels and neighbouring columns, so that
// where columns share what they load it is in L1.
#pragma once

#include <algorithm>
#include <cstdint>

#include "api.h"
#include "cuda/common/elements.cuh"

namespace deeplab_fast::cuda {

constexpr int kThreads = 128;
constexpr int kLine = 128;  // bytes of a pixel's channels that a block has at most

// So many registers are left to a thread: weights take as many as there are taps.
template <int kTaps>
constexpr int kBlocksPerSM = kTaps > 9 ? 2 : 3;

// How the work is cut into blocks and threads.
struct Split {
  int vectors, chunks, lanes;  // of channels: in all, per pixel blocks, neighbouring threads
  int columns;                 // of a block: kThreads / lanes
  int strips;                  // of rows, in an image
  int positions;               // columns of all strips of all images
  int groups;                  // of a block's columns
};

template <typename T, int kVector>
Split split_of(const DepthwiseShape& shape) {
  constexpr int kMaxLanes = kLine / (sizeof(T) * kVector);
  Split split;
  split.vectors = shape.C / kVector;
  split.chunks = (split.vectors + kMaxLanes - 1) / kMaxLanes;
  split.lanes = (split.vectors + split.chunks - 1) / split.chunks;
  split.columns = kThreads / split.lanes;
  split.strips = (shape.H + shape.strip_rows - 1) / shape.strip_rows;
  split.positions = shape.N * split.strips * shape.W;
  split.groups = (split.positions + split.columns - 1) / split.columns;
  return split;
}

// The row or column at a position in the order of residues modulo the dilation, which is at most
// size.
__device__ inline int coordinate(int position, int size, int dilation) {
  const int shorter = size / dilation,
            num_longer = size % dilation;  // the first residues have one more
  const int in_longer = num_longer * (shorter + 1);
  if (position < in_longer) return position / (shorter + 1) + position % (shorter + 1) * dilation;
  position -= in_longer;
  return num_longer + position / shorter + position % shorter * dilation;
}

// What a thread works on: rows [begin, end), as positions, of one column of an image.
struct Strip {
  int n, x, begin, end;
};

// The strip of a thread's column of a group of them; without rows past the end.
__device__ inline Strip strip_of(int group, const DepthwiseShape& shape, const Split& split) {
  const int column = threadIdx.x / split.lanes;
  const int64_t index = static_cast<int64_t>(group) * split.columns + column;
  if (column >= split.columns || index >= split.positions) return {0, 0, 0, 0};
  const int position = static_cast<int>(index);
  const int begin = position / shape.W % split.strips * shape.strip_rows;
  return {position / shape.W / split.strips,
          coordinate(position % shape.W, shape.W, shape.dilation_W), begin,
          min(begin + shape.strip_rows, shape.H)};
}

// Rows that are one dilation apart: the i-th is first + i * step.
struct Run {
  int first, step, count;
};

// Of a strip's rows from a position on. With flipped taps the last comes first.
__device__ inline Run run_of(int position, int end, const DepthwiseShape& shape) {
  const int y = coordinate(position, shape.H, shape.dilation_H);
  const int count = min(end - position, (shape.H - 1 - y) / shape.dilation_H + 1);
  if (!shape.flipped) return {y, shape.dilation_H, count};
  return {y + (count - 1) * shape.dilation_H, -shape.dilation_H, count};
}

// The vector of channels of a thread of the block; split.vectors or more for none.
__device__ inline int vector_of(const Split& split) {
  return blockIdx.x % split.chunks * split.lanes + threadIdx.x % split.lanes;
}

// Channels in the vectors of a thread: 16 bytes, but as few as leave the weights in registers.
template <typename T>
constexpr int kWide = 16 / sizeof(T);
template <typename T>
constexpr int kNarrow = 4;

}  // namespace deeplab_fast::cuda
