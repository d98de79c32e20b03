// Division of depthwise convolutions into blocks and threads.
//
// Rows and columns are ordered by their residue modulo the dilation: pixels a dilation apart become
// neighbours, and the convolution becomes dense. A thread computes a vector of channels in one
// column and walks down a strip of rows. A block has a cache line of channels and neighbouring
// columns, so that loads which columns share hit L1.
#pragma once

#include <algorithm>
#include <cstdint>

#include "api.h"
#include "cuda/common/elements.cuh"

namespace deeplab_fast::cuda {

constexpr int kThreads = 128;
constexpr int kLine = 128;  // most bytes of a pixel's channels that a block has

// Blocks per SM, which bound the registers of a thread: its weights take as many as there are taps.
template <int kTaps>
constexpr int kBlocksPerSM = kTaps > 9 ? 2 : 3;

// Division of the work into blocks and threads.
struct Split {
  int vectors;    // vectors of channels
  int chunks;     // blocks that share the channels of a pixel
  int lanes;      // neighbouring threads that share the channels of a block
  int columns;    // columns of a block: kThreads / lanes
  int strips;     // strips of rows in an image
  int positions;  // columns of all strips of all images
  int groups;     // positions / columns, rounded up
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

// Row or column at a position in the order of residues modulo the dilation. dilation <= size.
__device__ inline int coordinate(int position, int size, int dilation) {
  // The first num_longer residues have one row or column more than the others.
  const int shorter = size / dilation, num_longer = size % dilation;
  const int in_longer = num_longer * (shorter + 1);
  if (position < in_longer) return position / (shorter + 1) + position % (shorter + 1) * dilation;
  position -= in_longer;
  return num_longer + position / shorter + position % shorter * dilation;
}

// Rows of one thread: positions [begin, end) in one column of an image.
struct Strip {
  int n, x, begin, end;
};

// Strip of the thread in a group of columns; it has no rows if the column is past the last one.
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

// Run at the beginning of the rows [position, end) of a strip. With flipped taps it starts at its
// last row.
__device__ inline Run run_of(int position, int end, const DepthwiseShape& shape) {
  const int y = coordinate(position, shape.H, shape.dilation_H);
  const int count = min(end - position, (shape.H - 1 - y) / shape.dilation_H + 1);
  if (!shape.flipped) return {y, shape.dilation_H, count};
  return {y + (count - 1) * shape.dilation_H, -shape.dilation_H, count};
}

// Index of the thread's vector of channels; split.vectors or more if it has none.
__device__ inline int vector_of(const Split& split) {
  return blockIdx.x % split.chunks * split.lanes + threadIdx.x % split.lanes;
}

// Channels in a thread's vector: 16 bytes, or fewer if the weights would not fit in registers.
template <typename T>
constexpr int kWide = 16 / sizeof(T);
template <typename T>
constexpr int kNarrow = 4;

}  // namespace deeplab_fast::cuda
