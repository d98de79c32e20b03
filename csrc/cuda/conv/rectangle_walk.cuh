// Walk over the pixels of a tap's rectangle: row by row, then the rectangle of the next image.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "schedule/work_list.h"

namespace deeplab_fast::cuda {

// Position of a walk.
struct RectanglePixel {
  int32_t y, x;   // within the rectangle
  int32_t index;  // of the pixel in [N, H, W]
};

// Distance from one pixel of a walk to its next: whole images, dy rows and dx pixels, less than a
// rectangle and less than a row, so that advancing takes no division.
struct RectangleStep {
  int32_t h, w, dy, dx, index;
  int32_t row_gap, image_gap;  // pixels of the map between two rows, two images of the rectangle
};

__device__ __forceinline__ RectanglePixel rectangle_pixel(const TapRectangle& rectangle, int32_t H,
                                                          int32_t W, int32_t i) {
  const auto [tap, first_y, first_x, h, w] = rectangle;
  const int32_t x = i % w, y = i / w % h, n = i / w / h;
  return {y, x, (n * H + first_y + y) * W + first_x + x};
}

__device__ __forceinline__ RectangleStep rectangle_step(const TapRectangle& rectangle, int32_t H,
                                                        int32_t W, int32_t pixels) {
  const int32_t h = rectangle.h, w = rectangle.w;
  const int32_t dx = pixels % w, dy = pixels / w % h, n = pixels / w / h;
  return {h, w, dy, dx, (n * H + dy) * W + dx, W - w, (H - h) * W};
}

__device__ __forceinline__ void advance(RectanglePixel& pixel, const RectangleStep& step) {
  pixel.x += step.dx;
  pixel.y += step.dy;
  pixel.index += step.index;
  if (pixel.x >= step.w) {
    pixel.x -= step.w;
    pixel.y += 1;
    pixel.index += step.row_gap;
  }
  if (pixel.y >= step.h) {
    pixel.y -= step.h;
    pixel.index += step.image_gap;
  }
}

}  // namespace deeplab_fast::cuda
