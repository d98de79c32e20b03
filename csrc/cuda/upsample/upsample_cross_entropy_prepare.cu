// Workspace of upsample_cross_entropy's kernels: ranges of logits of source pixels, first outputs
// of cells, and the sum of the class weights.

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/upsample/upsample_cross_entropy.cuh"

namespace deeplab_fast::cuda {
namespace cross_entropy {
namespace {

constexpr int kLanesPerPixel = 4;  // lanes that find the range of a source pixel's logits

__device__ int64_t cell_of(int64_t dst, int64_t size, float scale, bool align_corners) {
  const SourcePair pair = source_pair(dst, size, scale, align_corners);
  return pair.lo == 0 && pair.w1 == 0.0f ? 0 : pair.lo + 1;
}

__device__ int32_t first_output(int64_t cell, int64_t out_size, int64_t size, float scale,
                                bool align_corners) {
  int64_t low = 0, high = out_size;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (cell_of(middle, size, scale, align_corners) >= cell) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return static_cast<int32_t>(low);
}

// Range of a source pixel's logits that are not NaN. kLanesPerPixel adjacent lanes, numbered by
// `part`, share the pixel.
template <typename Logit>
__device__ float2 range_of(const Logit* pixel, int64_t stride_C, int32_t C, int part) {
  float greatest = -INFINITY, lowest = INFINITY;
  for (int32_t c = part; c < C; c += kLanesPerPixel) {
    const float value = to_float(pixel[c * stride_C]);
    greatest = fmaxf(greatest, value);
    lowest = fminf(lowest, value);
  }
  for (int lanes = 1; lanes < kLanesPerPixel; lanes *= 2) {
    greatest = fmaxf(greatest, __shfl_xor_sync(kAllLanes, greatest, lanes));
    lowest = fminf(lowest, __shfl_xor_sync(kAllLanes, lowest, lanes));
  }
  return make_float2(greatest, centre(lowest, greatest));
}

// The first blocks find the ranges of source pixels, the next ones the first outputs of cells, and
// the last block sums the class weights.
template <typename Logit>
__global__ void __launch_bounds__(kThreads)
    upsample_cross_entropy_prepare_kernel(const Workspace workspace,
                                          const Logit* __restrict__ logits,  // [N, C, H, W]
                                          const UpsampleShape shape,
                                          const CrossEntropyParams params,
                                          const int64_t pixel_blocks) {
  const int64_t block = blockIdx.x;
  if (block < pixel_blocks) {
    const int64_t pixels = shape.N * shape.H * shape.W;
    const int64_t i = (block * kThreads + threadIdx.x) / kLanesPerPixel;
    const int64_t pixel = min(i, pixels - 1);
    const int part = threadIdx.x % kLanesPerPixel;
    const int64_t x = pixel % shape.W, y = pixel / shape.W % shape.H, n = pixel / shape.W / shape.H;
    const Logit* source = logits + n * shape.stride_N + y * shape.stride_H + x * shape.stride_W;
    const float2 range = range_of(source, shape.stride_C, static_cast<int32_t>(shape.C), part);
    if (part == 0 && i < pixels) workspace.ranges[pixel] = range;
    return;
  }
  const int64_t i = (block - pixel_blocks) * kThreads + threadIdx.x;
  if (i < shape.H + 2) {
    workspace.row_begin[i] =
        first_output(i, shape.out_H, shape.H, shape.scale_H, shape.align_corners);
  } else if (i - (shape.H + 2) < shape.W + 2) {
    const int64_t cell = i - (shape.H + 2);
    workspace.col_begin[cell] =
        first_output(cell, shape.out_W, shape.W, shape.scale_W, shape.align_corners);
  }
  if (block + 1 < gridDim.x || threadIdx.x >= 32) return;
  double total = 0.0;
  for (int64_t c = threadIdx.x; c < shape.C; c += 32) total += class_weight(params, c);
  for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_xor_sync(kAllLanes, total, lanes);
  if (threadIdx.x == 0) *workspace.total_class_weight = static_cast<float>(total);
}

bool fits(const UpsampleShape& shape, const Layout& layout) {
  const int64_t source = shape.N * shape.H * shape.W;
  return std::max({shape.C, shape.H, shape.W, shape.out_H, shape.out_W}) < INT32_MAX / kRows &&
         source * shape.C / kThreads < INT32_MAX &&
         source * kLanesPerPixel / kThreads < INT32_MAX && num_blocks(shape, layout) < INT32_MAX &&
         layout.num_chunks < 1 << 16;
}

}  // namespace

int64_t num_blocks(const UpsampleShape& shape, const Layout& layout) {
  return shape.N * (shape.H + 1) * layout.strips;
}

int64_t lay_out(Workspace& workspace, void* memory, const UpsampleShape& shape, bool backward) {
  int64_t bytes = 0;
  const auto take = [&](auto*& pointer, int64_t count) {
    using T = std::remove_reference_t<decltype(*pointer)>;
    pointer = reinterpret_cast<T*>(static_cast<char*>(memory) + bytes);
    bytes += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
  };
  take(workspace.block_sums, backward ? 0 : num_blocks(shape, Layout(shape, backward)));
  take(workspace.ranges, shape.N * shape.H * shape.W);
  take(workspace.row_begin, shape.H + 2);
  take(workspace.col_begin, shape.W + 2);
  take(workspace.total_class_weight, 1);
  take(workspace.edge_grads, backward ? shape.N * (shape.H + 1) * 2 * shape.C * shape.W : 0);
  return bytes;
}

template <typename Logit>
Status prepare(const char* kernel, const Workspace& workspace, const Logit* logits,
               const UpsampleShape& shape, const Layout& layout, const CrossEntropyParams& params,
               void* stream) {
  if (!fits(shape, layout)) return {kernel, "a size is too large"};
  const auto blocks_for = [](int64_t threads) { return (threads + kThreads - 1) / kThreads; };
  const int64_t pixel_blocks = blocks_for(shape.N * shape.H * shape.W * kLanesPerPixel);
  const int64_t blocks = pixel_blocks + blocks_for(shape.H + 2 + shape.W + 2);
  return launch("upsample_cross_entropy_prepare_kernel",
                upsample_cross_entropy_prepare_kernel<Logit>, static_cast<unsigned>(blocks),
                kThreads, 0, stream, workspace, logits, shape, params, pixel_blocks);
}

template Status prepare(const char*, const Workspace&, const float*, const UpsampleShape&,
                        const Layout&, const CrossEntropyParams&, void*);
template Status prepare(const char*, const Workspace&, const __half*, const UpsampleShape&,
                        const Layout&, const CrossEntropyParams&, void*);
template Status prepare(const char*, const Workspace&, const __nv_bfloat16*, const UpsampleShape&,
                        const Layout&, const CrossEntropyParams&, void*);

}  // namespace cross_entropy

int64_t upsample_cross_entropy_workspace(const UpsampleShape& shape, bool backward) {
  cross_entropy::Workspace workspace;
  return cross_entropy::lay_out(workspace, nullptr, shape, backward);
}

}  // namespace deeplab_fast::cuda
