// Bilinear upsampling by cells. A cell is the output pixels between the same four source pixels.
#pragma once

#include <cstdint>

#include "api.h"
#include "common/bilinear.h"
#include "cuda/common/elements.cuh"

namespace deeplab_fast::cuda {

// The four source pixels of a cell: a b / c d.
template <typename Logit>
struct Corners {
  const Logit* a;  // class 0
  int64_t right, down, stride_C;

  __device__ float4 at(int64_t c) const {
    const Logit* p = a + c * stride_C;
    return make_float4(to_float(*p), to_float(*(p + right)), to_float(*(p + down)),
                       to_float(*(p + down + right)));
  }
};

template <typename Logit>
__device__ Corners<Logit> corners_of(const Logit* logits, const UpsampleShape& shape, int64_t n,
                                     int64_t y, int64_t x) {
  return {logits + n * shape.stride_N + y * shape.stride_H + x * shape.stride_W,
          x + 1 < shape.W ? shape.stride_W : 0, y + 1 < shape.H ? shape.stride_H : 0,
          shape.stride_C};
}

// Limits of Side: source pixels per output pixel, and output pixels. Below them each cell has a
// pixel and source coordinates are rounded by less than 1/8, so that max_cells holds.
constexpr float kMaxCellScale = 0.3f;
constexpr int64_t kMaxCellSize = 1 << 20;
constexpr int max_cells(int pixels) { return pixels * 3 / 10 + 2; }

// Output pixels of a tile along one side, and their cells.
template <int kPixels>
struct Side {
  static constexpr int kMaxCells = max_cells(kPixels);
  int32_t first_cell, count, num_cells, begin[kMaxCells + 1];  // begin: first pixel of each cell
  int32_t cell[kPixels];
  float2 weights[kPixels];

  // Sets pixel i of those from `first` on. One thread per pixel calls it.
  __device__ void set(int i, int64_t first, int64_t out_size, int64_t size, float scale,
                      bool align_corners) {
    const int n = static_cast<int>(min(out_size - first, static_cast<int64_t>(kPixels)));
    if (i >= n) return;
    const auto pair_of = [&](int i) { return source_pair(first + i, size, scale, align_corners); };
    const SourcePair pair = pair_of(i);
    const int64_t origin = pair_of(0).lo;
    const auto mine = static_cast<int32_t>(pair.lo - origin);
    weights[i] = make_float2(pair.w0, pair.w1);
    cell[i] = mine;
    if (i == 0) first_cell = static_cast<int32_t>(origin);
    if (i == 0 || pair_of(i - 1).lo != pair.lo) begin[mine] = i;
    if (i == n - 1) {
      begin[mine + 1] = count = n;
      num_cells = mine + 1;
    }
  }
};

}  // namespace deeplab_fast::cuda
