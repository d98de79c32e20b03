// Pixel lists and tiles of a dilated convolution that leave out the products with padding.
//
// The map is cut at -dy (dy < 0) or H - dy (dy > 0) of every tap, and likewise in x. This gives
// rectangles ("zones") whose pixels have the same taps inside the map: at most k * k zones for one
// k x k kernel. Pixels are listed zone by zone, each zone with its pixels in all images. Every
// block_m entries of the list are a tile, which computes the union of its pixels' taps. The kernel
// loads zeros for the few (pixel, tap) pairs of a union that lie outside the map. ConvV2 (Zhang
// et al., "Reduce Computational Complexity for Convolutional Layers by Skipping Zeros", 2023) skips
// products with padding in the same way.
//
// The zones start in snake order over their grid, where neighbours share most taps; local search
// improves the order. Executed / dense products of three 3x3 branches, one image:
//                                    row by row   snake   searched   without any padding
//   33x33, dilations 6, 12, 18             .823    .701       .662                  .584
//   65x65, dilations 12, 24, 36            .771    .612       .605                  .578
#pragma once

#include <cstdint>
#include <vector>

#include "schedule/work_list.h"

namespace deeplab_fast::schedule {

// A stride 1, 'same' convolution; kernel sizes are odd.
struct Branch {
  int32_t kernel_H, kernel_W, dilation_H, dilation_W;
};

// N maps of H x W pixels. Pixel (n, y, x) has index (n * H + y) * W + x, below 2^31; offsets of its
// channels may pass 2^31, so kernels multiply the index in int64.
struct Plane {
  int32_t N, H, W;
};

struct TileList {
  std::vector<int32_t> pixels;  // pixel indices; each output lists every pixel once
  std::vector<Tap> taps;        // tap sets; tiles of an output with equal sets share one
  std::vector<Tile> tiles;      // in the order of `pixels`
};

// The functions below throw std::invalid_argument for sizes that a work list cannot hold.

// Tiles of the forward pass: one output per branch, the sum over the taps of that branch.
TileList forward_tiles(const Plane& plane, const std::vector<Branch>& branches, int32_t block_m);

// Tiles of the input gradient: one output, the sum over the flipped taps of all branches. The map
// is cut at the taps of all branches.
TileList input_grad_tiles(const Plane& plane, const std::vector<Branch>& branches, int32_t block_m);

// Rectangles of the weight gradient: one per forward tap, including empty ones.
std::vector<TapRectangle> tap_rectangles(const std::vector<Branch>& branches, int32_t H, int32_t W);

}  // namespace deeplab_fast::schedule
