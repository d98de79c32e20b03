// Pixel lists and tiles of a dilated convolution that leave out the products with padding.
//
// Cutting the map at -dy (dy < 0) or H - dy (dy > 0) of every tap, and likewise in x, leaves
// rectangles ("zones") in which the same taps are inside: at most k * k for one k x k kernel.
// Pixels are listed zone by zone, images included. Every block_m of them are a tile, which runs the
// union of its pixels' taps; the kernel zero-fills the few (pixel, tap) pairs of a union that lie
// outside. C-K-S, "ConvV2", trims products with padding in the same way.
//
// The zones start in snake order over their grid, where neighbours share most taps; local search
// improves the order. Executed / dense products of three 3x3 branches, one image:
//                                    plain runs of 128   snake   searched   exact
//   33x33, rates 6, 12, 18                      .823     .701       .662    .584
//   65x65, rates 12, 24, 36                     .771     .612       .605    .578
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
  std::vector<int32_t> pixels;  // pixel indices; every output lists each pixel once
  std::vector<Tap> taps;        // tap sets, shared by the tiles of an output that run the same
  std::vector<Tile> tiles;      // in the order of pixels
};

// Tiles of the forward pass: one output per branch, the sum over that branch's taps. These
// functions throw std::invalid_argument for sizes that a work list cannot hold.
TileList forward_tiles(const Plane& plane, const std::vector<Branch>& branches, int32_t block_m);

// Tiles of the input gradient: one output, the sum over the flipped taps of all branches, whose
// dilations cut the map together.
TileList input_grad_tiles(const Plane& plane, const std::vector<Branch>& branches, int32_t block_m);

// Rectangles of the weight gradient: one per forward tap, the empty ones included.
std::vector<TapRectangle> tap_rectangles(const std::vector<Branch>& branches, int32_t H, int32_t W);

}  // namespace deeplab_fast::schedule
