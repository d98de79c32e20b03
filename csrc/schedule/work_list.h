// Rows of the work lists of dilated convolution, as kernels read them. Each struct is a row of
// int32, so that a vector of them is a [rows, fields] tensor.
//
// An output tile is a pixel tile x a block of output channels. A k-iteration of an output tile
// multiplies one tap by a block of input channels. A work item is a range of k-iterations of one
// output tile, computed by one CTA. If an output tile is split between work items (split-K), each
// writes its fp32 sums to a workspace slot, and a reduction adds the slots. For a weight gradient
// the rectangle of a tap takes the place of the pixel tile, and a k-iteration multiplies a run of
// the rectangle's pixels.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace deeplab_fast {

// A tap (dy, dx) of output pixel (y, x) reads input pixel (y + dy, x + dx).
struct alignas(16) Tap {  // aligned for one vector load
  int32_t dy, dx;         // clipped to H and W: taps beyond the map stay outside it
  int32_t branch;         // the branch whose weight the tap belongs to
  int32_t index;          // r * kernel_W + s of the weight [K, C, kernel_H, kernel_W]
};

// True if `tap` of output pixel (y, x) reads inside the map.
HOST_DEVICE bool is_inside(const Tap& tap, int32_t y, int32_t x, int32_t H, int32_t W) {
  return static_cast<uint32_t>(y) + static_cast<uint32_t>(tap.dy) < static_cast<uint32_t>(H) &&
         static_cast<uint32_t>(x) + static_cast<uint32_t>(tap.dx) < static_cast<uint32_t>(W);
}

// A pixel tile: consecutive entries of the pixel list, each multiplied by every tap of the tile.
struct Tile {
  int32_t output;  // forward: the branch; input gradient: 0
  int32_t first_pixel, num_pixels;
  int32_t first_tap, num_taps;  // entries of the tap list
};

// The output pixels at which one tap reads inside the map. The weight gradient of the tap is a sum
// over these pixels. If there are none, h = w = 0; the kernel still has to write the zero gradient.
struct TapRectangle {
  Tap tap;
  int32_t y, x, h, w;
};

// K-iterations first_k_iter .. first_k_iter + num_k_iters of one output tile.
struct WorkItem {
  int32_t tile, block;                // pixel tile or tap rectangle, and block of channels
  int32_t first_k_iter, num_k_iters;  // num_k_iters = 0: write zeros
  int32_t slot;                       // workspace slot, or -1 if the item computes the whole tile
};

// A split output tile: the sum of slots first_slot .. first_slot + num_slots, added in this order.
struct Reduction {
  int32_t tile, block;
  int32_t first_slot, num_slots;
};

// A pixel with its coordinates, so that the kernel does not have to divide. H and W are below 2^15.
struct alignas(8) ListedPixel {
  int32_t index, yx;  // y * 2^16 + x
};

// A WorkItem joined with its Tile, so that the kernel neither follows a pointer nor divides.
struct alignas(16) TileItem {
  int32_t block, output, slot, num_k_iters;
  int32_t first_pixel, num_pixels, first_tap, num_taps;
  int32_t tap, c;                    // of the first k-iteration: tap of the tile, input channel
  int32_t first_index, first_image;  // index and image of the tile's first pixel
};

// A WorkItem of a weight gradient joined with its TapRectangle. A k-iteration multiplies boxes of
// pixels; one instruction copies a box. rows x columns boxes cover the rectangle in an image.
struct alignas(16) BoxItem {
  int32_t slot, num_k_iters, branch, index;  // index: Tap::index
  int32_t k, c;                              // first output channel of the branch, input channel
  int32_t dy, dx;
  int32_t y, x, rows, columns;  // first pixel of the rectangle, and its boxes
  int32_t row, column, n;       // first box of the item, and the first image of that box
  int32_t unused;
};

}  // namespace deeplab_fast
