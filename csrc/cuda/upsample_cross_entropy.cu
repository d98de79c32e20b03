// Cross entropy of bilinear(logits[n])(y, x) against target[n, y, x], and its gradient.
// logits [N, C, H, W] in any strides, target and log_sum_exp [N, out_H, out_W] contiguous.
//
// Output pixels between the same four source pixels form a cell; a block has up to kCells of a row.
// Logits are centred: less their source pixel's maximum over classes, which no softmax notices, and
// in units of log 2. Down a column of a cell they grow linearly, their exponentials geometrically:
// three exponentials serve kRows pixels. Where a centred logit is below kTame they could underflow
// on the way; such blocks subtract each pixel's maximum and take one exponential per pixel.
// Forward: a thread has columns. Backward: a thread has classes of cells and sums their pixels, a
// block adds the cells on both sides of its source columns, a last kernel those above and below.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <type_traits>

#include "../api.h"
#include "../common/bilinear.h"
#include "cells.cuh"
#include "launch.cuh"
#include "ptx.cuh"

namespace deeplab_fast::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocksPerSM = 6;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kRows = 8;     // output rows of a cell at a time
constexpr int kRestart = 4;  // of them follow from one exponential, lest errors add up
constexpr int kCells = 16;   // of a block: 128 columns where logits are upsampled 8 times
constexpr int kEdges = kCells + 1;
constexpr int kLanesPerPixel = 4;  // find the range of a source pixel's logits
constexpr int kReduceThreads = 512;
constexpr int kMaxForwardClasses = 160, kMaxBackwardClasses = 64;  // in shared memory at a time

// A progression that runs past the last row of a cell by two rows' steps of at most a cell must
// stay finite: 2^120.
constexpr float kTame = -60.0f;
constexpr float kLog2E = 0x1.715476p+0f;
constexpr float kLn2 = 0x1.62e43p-1f;

constexpr int32_t kIgnored = -1, kBad = -2;  // in place of a target's class

struct Sums {
  double loss, weight;
};

// Scratch memory of a launcher.
struct Workspace {
  Sums* block_sums;                // forward
  float2* ranges;                  // [N, H, W] a source pixel's maximum, and its lowest centred
  int32_t *row_begin, *col_begin;  // [H + 2], [W + 2] the first output of a cell or a later one
  float* total_class_weight;
  float* edge_grads;  // [N, H + 1, 2, C, W], or [..., W, C]: gradients of cells' tops and bottoms
};

struct Layout {
  int32_t strips;       // blocks of a row of cells
  int32_t strip_cells;  // from one to the next
  int32_t chunk;        // classes in shared memory at a time
  int32_t num_chunks;

  // Backward, neighbours share a cell: each writes the source columns between its cells.
  Layout(const UpsampleShape& shape, bool backward) {
    const int64_t cells = backward ? shape.W : shape.W + 1;
    strip_cells = backward ? kCells - 1 : kCells;
    strips = static_cast<int32_t>((cells + strip_cells - 1) / strip_cells);
    const auto C = static_cast<int32_t>(shape.C);
    const int32_t max_classes = backward ? kMaxBackwardClasses : kMaxForwardClasses;
    num_chunks = (C + max_classes - 1) / max_classes;
    chunk = (C + num_chunks - 1) / num_chunks;
  }
};

int64_t num_blocks(const UpsampleShape& shape, const Layout& layout) {
  return shape.N * (shape.H + 1) * layout.strips;
}

// Lays the workspace out from `memory` on; returns its bytes.
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

__device__ float class_weight(const CrossEntropyTerms& terms, int64_t c) {
  return terms.weight ? terms.weight[c] : 1.0f;
}

// A finite logit stays finite: an infinite one would be NaN where its weight is 0.
__device__ float centre(float logit, float maximum) {
  const float value = mul_rn(logit - maximum, kLog2E);
  return value < -0x1p126f && logit >= -FLT_MAX ? -0x1p126f : value;
}

// Cell v lies between source coordinates v - 1 and v. Cell 0 holds the outputs whose coordinate was
// clamped to 0, so that inside every cell the weights change evenly; its source pixels are 0 and 1.
__device__ int64_t cell_of(int64_t dst, int64_t size, float scale, bool align_corners) {
  const SourcePair pair = source_pair(dst, size, scale, align_corners);
  return pair.lo == 0 && pair.w1 == 0.0f ? 0 : pair.lo + 1;
}
__device__ int low_source(int cell) { return max(cell - 1, 0); }
__device__ int high_source(int cell, int size) { return min(max(cell, 1), size - 1); }

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

// The range of one source pixel's logits that are not NaN, by kLanesPerPixel adjacent lanes.
template <typename Logit>
__device__ float2 range_of(const Logit* pixel, int64_t stride_C, int32_t C, int part) {
  float greatest = -INFINITY, lowest = INFINITY;
  for (int32_t c = part; c < C; c += kLanesPerPixel) {
    const float value = load(pixel + c * stride_C);
    greatest = fmaxf(greatest, value);
    lowest = fminf(lowest, value);
  }
  for (int lanes = 1; lanes < kLanesPerPixel; lanes *= 2) {
    greatest = fmaxf(greatest, __shfl_xor_sync(kAllLanes, greatest, lanes));
    lowest = fminf(lowest, __shfl_xor_sync(kAllLanes, lowest, lanes));
  }
  return make_float2(greatest, centre(lowest, greatest));
}

// Ranges of source pixels in the first blocks, then cells, then in the last block the weights.
template <typename Logit>
__global__ void __launch_bounds__(kThreads)
    upsample_cross_entropy_prepare_kernel(const Workspace workspace,
                                          const Logit* __restrict__ logits,  // [N, C, H, W]
                                          const UpsampleShape shape, const CrossEntropyTerms terms,
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
  for (int64_t c = threadIdx.x; c < shape.C; c += 32) total += class_weight(terms, c);
  for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_xor_sync(kAllLanes, total, lanes);
  if (threadIdx.x == 0) *workspace.total_class_weight = static_cast<float>(total);
}

// A block's cells [first, first + count) of cell row `row`, and the source columns
// [origin, origin + num_edges) at their corners.
struct Strip {
  int64_t n;
  int32_t row, first, count, origin, num_edges, top, bottom, W;

  __device__ Strip(const UpsampleShape& shape, const Layout& layout) {
    const auto H = static_cast<int32_t>(shape.H);
    W = static_cast<int32_t>(shape.W);
    first = static_cast<int32_t>(blockIdx.x % layout.strips) * layout.strip_cells;
    row = static_cast<int32_t>(blockIdx.x / layout.strips % (H + 1));
    n = blockIdx.x / layout.strips / (H + 1);
    count = min(kCells, W + 1 - first);
    origin = low_source(first);
    num_edges = high_source(first + count - 1, W) - origin + 1;
    top = low_source(row);
    bottom = high_source(row, H);
  }

  // In edges, of a cell's left and right side.
  __device__ int left(int cell) const { return low_source(first + cell) - origin; }
  __device__ int right(int cell) const { return high_source(first + cell, W) - origin; }
};

// How logits grow down a column: from each kRestart-th row's weights on by even steps.
struct Progression {
  float2 starts[kRows / kRestart];
  float step;
  int num_rows;
};

// In shared memory: what both directions need of a strip and of the output rows at hand.
struct Frame {
  int32_t wild;
  float2 maxima[kEdges];  // of the source pixels at the top and bottom
  float2 rows[kRows];     // weights h0, h1; those after the last row repeat it

  // Returns whether the block is wild: not tame.
  __device__ bool set_maxima(const Strip& strip, const float2* ranges, const UpsampleShape& shape) {
    if (threadIdx.x == 0) wild = 0;
    __syncthreads();
    const int i = threadIdx.x;
    if (i < strip.num_edges) {
      const float2* image = ranges + strip.n * shape.H * shape.W + strip.origin + i;
      const float2 top = image[strip.top * shape.W], bottom = image[strip.bottom * shape.W];
      maxima[i] = make_float2(top.x, bottom.x);
      if (!(fminf(top.y, bottom.y) >= kTame)) atomicMax(&wild, 1);
    }
    __syncthreads();
    return wild != 0;
  }

  __device__ void set_rows(int32_t y, int32_t count, const UpsampleShape& shape) {
    __syncthreads();  // the rows before are no longer read
    const int r = threadIdx.x;
    if (r < kRows) {
      const SourcePair pair =
          source_pair(y + min(r, count - 1), shape.H, shape.scale_H, shape.align_corners);
      rows[r] = make_float2(pair.w0, pair.w1);
    }
    __syncthreads();
  }

  __device__ Progression progression(int num_rows) const {
    Progression p{{}, 0.0f, num_rows};
    for (int i = 0; i < kRows / kRestart; ++i) p.starts[i] = rows[i * kRestart];
    if (num_rows > 1)
      p.step = (rows[num_rows - 1].y - rows[0].y) / static_cast<float>(num_rows - 1);
    return p;
  }
};

// Centred logits of a chunk of classes at the top and bottom of a strip's source columns, in shared
// memory [chunk, kEdges].
template <typename Logit>
struct Edges {
  float2* values;
  const float2* maxima;
  const Logit* top;  // of class 0, source column `origin`
  const Logit* bottom;
  int64_t stride_C, stride_W;
  int32_t num_edges, C, chunk, first, count;

  __device__ Edges(float2* values, const Frame& frame, const Logit* logits, const Strip& strip,
                   const UpsampleShape& shape, int32_t chunk)
      : values(values),
        maxima(frame.maxima),
        stride_C(shape.stride_C),
        stride_W(shape.stride_W),
        num_edges(strip.num_edges),
        C(static_cast<int32_t>(shape.C)),
        chunk(chunk),
        first(-1),
        count(0) {
    const Logit* origin = logits + strip.n * shape.stride_N + strip.origin * shape.stride_W;
    top = origin + strip.top * shape.stride_H;
    bottom = origin + strip.bottom * shape.stride_H;
  }

  __device__ const float2* end() const { return values + count * kEdges; }

  // By all threads of the block.
  __device__ void load_from(int32_t first_class) {
    if (first == first_class) return;
    first = first_class;
    count = min(chunk, C - first);
    __syncthreads();  // the classes before are no longer read
    const auto put = [&](int c, int i) {
      const int64_t offset = (first + c) * stride_C + i * stride_W;
      values[c * kEdges + i] = make_float2(centre(load(top + offset), maxima[i].x),
                                           centre(load(bottom + offset), maxima[i].y));
    };
    if (stride_C < stride_W) {
#pragma unroll 1
      for (int i = threadIdx.x / 32; i < num_edges; i += kWarps) {
#pragma unroll 1
        for (int c = threadIdx.x % 32; c < count; c += 32) put(c, i);
      }
    } else {
#pragma unroll 1
      for (int k = threadIdx.x; k < count * kEdges; k += kThreads) {
        if (k % kEdges < num_edges) put(k / kEdges, k % kEdges);
      }
    }
    __syncthreads();
  }
};

// An output column between two edges.
struct Column {
  int32_t left, right;
  float2 w;

  __device__ Column(int64_t x, const Strip& strip, const UpsampleShape& shape) {
    const SourcePair pair = source_pair(x, shape.W, shape.scale_W, shape.align_corners);
    left = static_cast<int32_t>(pair.lo) - strip.origin;
    right = static_cast<int32_t>(pair.hi) - strip.origin;
    w = make_float2(pair.w0, pair.w1);
  }

  // At the top and bottom of the cell.
  __device__ float2 ends(const float2* edges) const {
    const float2 l = edges[left], r = edges[right];
    return make_float2(interpolate(l.x, r.x, w.x, w.y), interpolate(l.y, r.y, w.x, w.y));
  }
};

__device__ float between(float2 ends, float2 h) { return interpolate(ends.x, ends.y, h.x, h.y); }

// Calls visit(row, exponential) for the rows of a column. Rows past the last have finite ones.
template <typename Visit>
__device__ __forceinline__ void for_each_exponential(float2 ends, const Progression& progression,
                                                     Visit visit) {
  const float ratio = ptx::ex2_approx(mul_rn(ends.y - ends.x, progression.step));
#pragma unroll
  for (int i = 0; i < kRows / kRestart; ++i) {
    if (i > 0 && i * kRestart >= progression.num_rows) break;
    float e = ptx::ex2_approx(between(ends, progression.starts[i]));
#pragma unroll
    for (int r = i * kRestart; r < (i + 1) * kRestart; ++r) {
      visit(r, e);
      e = mul_rn(e, ratio);
    }
  }
}

// Of a column's pixels, log2 of the softmax's denominator: the sum over classes of
// 2^(logit - shift). shift is 0 in a tame block, else the greatest logit.
struct Denominators {
  float log_sum[kRows], shift[kRows];
};

// By all threads of the block. each_class(c, ends) and each_chunk() see every class once.
template <typename Logit, typename EachClass, typename EachChunk>
__device__ __forceinline__ void sum_exponentials(Denominators& d, Edges<Logit>& edges,
                                                 const Frame& frame, bool wild,
                                                 const Column& column, int num_rows,
                                                 EachClass each_class, EachChunk each_chunk) {
  const Progression progression = frame.progression(num_rows);
  float sum[kRows] = {};
  for (float& shift : d.shift) shift = wild ? -INFINITY : 0.0f;
  if (wild) {
    for (int32_t first = 0; first < edges.C; first += edges.chunk) {
      edges.load_from(first);
#pragma unroll 1
      for (const float2* values = edges.values; values < edges.end(); values += kEdges) {
        const float2 ends = column.ends(values);
        for (int r = 0; r < kRows; ++r) {
          const float z = between(ends, frame.rows[r]);
          d.shift[r] = z > d.shift[r] ? z : d.shift[r];
        }
      }
    }
  }
  for (int32_t first = 0; first < edges.C; first += edges.chunk) {
    edges.load_from(first);
    int32_t c = first;
    if (wild) {
#pragma unroll 1
      for (const float2* values = edges.values; values < edges.end(); values += kEdges) {
        const float2 ends = column.ends(values);
        each_class(c++, ends);
        for (int r = 0; r < kRows; ++r) {
          sum[r] += ptx::ex2_approx(between(ends, frame.rows[r]) - d.shift[r]);
        }
      }
    } else {
#pragma unroll 1
      for (const float2* values = edges.values; values < edges.end(); values += kEdges) {
        const float2 ends = column.ends(values);
        each_class(c++, ends);
        for_each_exponential(ends, progression, [&](int r, float e) { sum[r] += e; });
      }
    }
    each_chunk();
  }
  for (int r = 0; r < kRows; ++r) d.log_sum[r] = log2f(sum[r]);
}

__device__ int32_t label_of(int64_t target, const CrossEntropyTerms& terms, int64_t C) {
  if (target == terms.ignore_index) return kIgnored;
  return target < 0 || target >= C ? kBad : static_cast<int32_t>(target);
}

struct ForwardTile {
  Frame frame;
  Sums warps[kWarps];
};

template <typename Logit>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM) upsample_cross_entropy_fwd_kernel(
    float* __restrict__ pixel_losses,  // [N, out_H, out_W] or null
    float* __restrict__ log_sum_exp,   // [N, out_H, out_W]
    const Workspace workspace,
    const Logit* __restrict__ logits,    // [N, C, H, W]
    const int64_t* __restrict__ target,  // [N, out_H, out_W]
    const UpsampleShape shape, const CrossEntropyTerms terms, const Layout layout) {
  ForwardTile& tile = *shared_memory<ForwardTile>();
  Frame& frame = tile.frame;
  const Strip strip(shape, layout);
  const bool wild = frame.set_maxima(strip, workspace.ranges, shape);
  Edges<Logit> edges(reinterpret_cast<float2*>(&tile + 1), frame, logits, strip, shape,
                     layout.chunk);

  const float target_part = 1.0f - terms.label_smoothing;
  const float smooth_part = terms.label_smoothing / static_cast<float>(shape.C);
  const bool smooths = smooth_part > 0.0f;
  const float total_class_weight = *workspace.total_class_weight;
  const auto out_W = static_cast<int32_t>(shape.out_W);
  Sums sums{0.0, 0.0};
  const int32_t y_end = workspace.row_begin[strip.row + 1];
  const int32_t x_begin = workspace.col_begin[strip.first];
  const int32_t x_end = workspace.col_begin[strip.first + strip.count];
  for (int32_t y = workspace.row_begin[strip.row]; y < y_end; y += kRows) {
    const int num_rows = min(kRows, y_end - y);
    frame.set_rows(y, num_rows, shape);
    for (int32_t x = x_begin; x < x_end; x += kThreads) {
      // Threads without a column repeat the last.
      const int64_t my_x = min(x + static_cast<int32_t>(threadIdx.x), x_end - 1);
      const int64_t pixel = (strip.n * shape.out_H + y) * shape.out_W + my_x;
      const Column column(my_x, strip, shape);
      int32_t label[kRows];
      for (int r = 0; r < kRows; ++r) {
        label[r] = r < num_rows ? label_of(target[pixel + r * out_W], terms, shape.C) : kIgnored;
      }

      Denominators d;
      float logit_of_label[kRows] = {};
      float2 weighted = make_float2(0.0f, 0.0f);
      sum_exponentials(
          d, edges, frame, wild, column, num_rows,
          [&](int32_t c, float2 ends) {
            if (!smooths) return;
            weighted.x = fma_rn(class_weight(terms, c), ends.x, weighted.x);
            weighted.y = fma_rn(class_weight(terms, c), ends.y, weighted.y);
          },
          [&] {
            for (int r = 0; r < kRows; ++r) {
              const int c = label[r] - edges.first;
              if (c < 0 || c >= edges.count) continue;
              logit_of_label[r] = between(column.ends(edges.values + c * kEdges), frame.rows[r]);
            }
          });

      const bool active = x + static_cast<int32_t>(threadIdx.x) < x_end;
      float loss_sum = 0.0f, weight_sum = 0.0f;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float log_sum = d.shift[r] + d.log_sum[r];
        float loss = label[r] == kBad ? NAN : 0.0f;
        if (label[r] >= 0) {
          const float weight = class_weight(terms, label[r]);
          const float hit = d.shift[r] - logit_of_label[r] + d.log_sum[r];
          const float smooth = total_class_weight * log_sum - between(weighted, frame.rows[r]);
          loss = (target_part * weight * hit + smooth_part * smooth) * kLn2;
          weight_sum += weight;
        }
        loss_sum += loss;
        if (active && r < num_rows) {
          log_sum_exp[pixel + r * out_W] = log_sum * kLn2;
          if (pixel_losses) pixel_losses[pixel + r * out_W] = loss;
        }
      }
      if (active) {
        sums.loss += loss_sum;
        sums.weight += weight_sum;
      }
    }
  }

  for (int lanes = 16; lanes > 0; lanes /= 2) {
    sums.loss += __shfl_xor_sync(kAllLanes, sums.loss, lanes);
    sums.weight += __shfl_xor_sync(kAllLanes, sums.weight, lanes);
  }
  if (threadIdx.x % 32 == 0) tile.warps[threadIdx.x / 32] = sums;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < kWarps; ++warp) {
    sums.loss += tile.warps[warp].loss;
    sums.weight += tile.warps[warp].weight;
  }
  workspace.block_sums[blockIdx.x] = sums;
}

__global__ void __launch_bounds__(kReduceThreads)
    upsample_cross_entropy_reduce_kernel(float* __restrict__ loss,  // [] or null
                                         float* __restrict__ total_weight,
                                         const Sums* __restrict__ block_sums, const int64_t blocks,
                                         const bool mean) {
  Sums* warps = shared_memory<Sums>();
  Sums sums{0.0, 0.0};
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < blocks; i += kReduceThreads) {
    sums.loss += block_sums[i].loss;
    sums.weight += block_sums[i].weight;
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    sums.loss += __shfl_xor_sync(kAllLanes, sums.loss, lanes);
    sums.weight += __shfl_xor_sync(kAllLanes, sums.weight, lanes);
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sums;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < kReduceThreads / 32; ++warp) {
    sums.loss += warps[warp].loss;
    sums.weight += warps[warp].weight;
  }
  *total_weight = static_cast<float>(sums.weight);
  if (loss) *loss = static_cast<float>(mean ? sums.loss / sums.weight : sums.loss);
}

// Pixels of one target below each other, and what they take from its class.
struct alignas(16) Run {
  int32_t label;
  float top, bottom;
  int32_t count;  // of the column's runs, in its first
};

// Gradients of the pixels of kThreads columns and kRows rows, in shared memory. Of a pixel, its
// share of the cell's top and of its bottom is a pair.
struct alignas(16) BackwardTile {
  float2 softmax[kThreads][kRows + 2];  // what its exponentials are multiplied by; no conflicts
  float4 columns[kThreads];             // w0, w1, and what smoothing takes per class weight
  Run runs[kRows][kThreads];
  float shift[kRows][kThreads];  // in wild blocks
  Frame frame;
};

struct Gradient {
  const float* loss;
  int64_t stride_N, stride_H, stride_W;
  const float* divisor;  // or nullptr
};

// What the first pixel of a column reads.
struct PixelInputs {
  const float* grad_loss;
  int64_t grad_stride_H;
  float grad_scale;
  const float* log_sum_exp;
  const int64_t* target;
};

// Fills this thread's column of the tile.
__device__ void set_column(BackwardTile& tile, const Column& column, Denominators& d, bool wild,
                           int num_rows, PixelInputs pixel, float total_class_weight,
                           const UpsampleShape& shape, const CrossEntropyTerms& terms) {
  const int i = threadIdx.x;
  const float target_part = 1.0f - terms.label_smoothing;
  const float smooth_part = terms.label_smoothing / static_cast<float>(shape.C);
  int32_t label[kRows];
  float grad[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    label[r] = r < num_rows ? label_of(*pixel.target, terms, shape.C) : kIgnored;
    grad[r] = *pixel.grad_loss * pixel.grad_scale;
    // Beside a large shift log_sum_exp has lost the logarithm.
    if (!wild) d.log_sum[r] = *pixel.log_sum_exp * kLog2E;
    if (r + 1 < num_rows) {
      pixel.target += shape.out_W;
      pixel.log_sum_exp += shape.out_W;
      pixel.grad_loss += pixel.grad_stride_H;
    }
  }

  float2 smooth = make_float2(0.0f, 0.0f);
  Run run{kIgnored, 0.0f, 0.0f, 0};
  int num_runs = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float2 h = tile.frame.rows[r];
    float scale = label[r] == kBad ? NAN : 0.0f;
    if (label[r] >= 0) {
      const float taken = target_part * class_weight(terms, label[r]) * grad[r];
      const float smoothed = smooth_part * grad[r];
      if (label[r] != run.label) {
        if (run.label != kIgnored) tile.runs[num_runs++][i] = run;
        run = {label[r], 0.0f, 0.0f, 0};
      }
      run.top = fma_rn(taken, h.x, run.top);
      run.bottom = fma_rn(taken, h.y, run.bottom);
      smooth = make_float2(fma_rn(smoothed, h.x, smooth.x), fma_rn(smoothed, h.y, smooth.y));
      scale = (taken + smoothed * total_class_weight) * ptx::ex2_approx(-d.log_sum[r]);
    }
    tile.softmax[i][r] = make_float2(scale * h.x, scale * h.y);
    if (wild) tile.shift[r][i] = d.shift[r];
  }
  tile.columns[i] = make_float4(column.w.x, column.w.y, smooth.x, smooth.y);
  tile.runs[num_runs][i] = run;
  tile.runs[0][i].count = num_runs + 1;
}

// Adds to the gradients of a cell's corners, a b / c d, those of columns [begin, end) in class c.
__device__ __forceinline__ float4 add_columns(float4 corners, const BackwardTile& tile, float2 left,
                                              float2 right, int begin, int end,
                                              const Progression& progression, bool wild, int32_t c,
                                              float weight) {
#pragma unroll 1
  for (int i = begin; i < end; ++i) {
    const float4 column = tile.columns[i];
    const float2 w = make_float2(column.x, column.y);
    float top = -weight * column.z, bottom = -weight * column.w;
    Run run = tile.runs[0][i];
    top -= run.label == c ? run.top : 0.0f;
    bottom -= run.label == c ? run.bottom : 0.0f;
#pragma unroll 1
    for (int k = 1; k < tile.runs[0][i].count; ++k) {
      run = tile.runs[k][i];
      top -= run.label == c ? run.top : 0.0f;
      bottom -= run.label == c ? run.bottom : 0.0f;
    }
    const float2 ends =
        make_float2(interpolate(left.x, right.x, w.x, w.y), interpolate(left.y, right.y, w.x, w.y));
    const auto add = [&](int r, float e) {
      const float2 softmax = tile.softmax[i][r];
      top = fma_rn(softmax.x, e, top);
      bottom = fma_rn(softmax.y, e, bottom);
    };
    if (wild) {
#pragma unroll 1
      for (int r = 0; r < progression.num_rows; ++r) {
        add(r, ptx::ex2_approx(between(ends, tile.frame.rows[r]) - tile.shift[r][i]));
      }
    } else {
      for_each_exponential(ends, progression, add);
    }
    corners.x = fma_rn(top, w.x, corners.x);
    corners.y = fma_rn(top, w.y, corners.y);
    corners.z = fma_rn(bottom, w.x, corners.z);
    corners.w = fma_rn(bottom, w.y, corners.w);
  }
  return corners;
}

template <typename Logit>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    upsample_cross_entropy_bwd_kernel(const Workspace workspace, const Gradient grad,
                                      const float* __restrict__ log_sum_exp,  // [N, out_H, out_W]
                                      const Logit* __restrict__ logits,       // [N, C, H, W]
                                      const int64_t* __restrict__ target,     // [N, out_H, out_W]
                                      const UpsampleShape shape, const CrossEntropyTerms terms,
                                      const Layout layout, const bool channels_last) {
  BackwardTile& tile = *shared_memory<BackwardTile>();
  Frame& frame = tile.frame;
  const Strip strip(shape, layout);
  const bool wild = frame.set_maxima(strip, workspace.ranges, shape);
  auto* corners = reinterpret_cast<float4*>(&tile + 1);  // [kCells, chunk]
  Edges<Logit> edges(reinterpret_cast<float2*>(corners + kCells * layout.chunk), frame, logits,
                     strip, shape, layout.chunk);
  const auto first_class = static_cast<int32_t>(blockIdx.y) * layout.chunk;
  const int num_classes = min(layout.chunk, edges.C - first_class);
  const int items = strip.count * num_classes;
  for (int i = threadIdx.x; i < items; i += kThreads) {
    corners[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }

  const float total_class_weight = *workspace.total_class_weight;
  const float grad_scale = grad.divisor ? 1.0f / *grad.divisor : 1.0f;
  const int32_t y_end = workspace.row_begin[strip.row + 1];
  const int32_t* col_begin = workspace.col_begin + strip.first;
  const int32_t x_end = col_begin[strip.count];
  for (int32_t y = workspace.row_begin[strip.row]; y < y_end; y += kRows) {
    const int num_rows = min(kRows, y_end - y);
    frame.set_rows(y, num_rows, shape);
    const Progression progression = frame.progression(num_rows);
    for (int32_t x = col_begin[0]; x < x_end; x += kThreads) {
      // Threads without a column repeat the last, in a place that nobody reads.
      const int64_t my_x = min(x + static_cast<int32_t>(threadIdx.x), x_end - 1);
      const Column column(my_x, strip, shape);
      Denominators d;
      if (wild) {
        sum_exponentials(d, edges, frame, true, column, num_rows, [](int32_t, float2) {}, [] {});
      }
      const int64_t pixel = (strip.n * shape.out_H + y) * shape.out_W + my_x;
      const PixelInputs inputs{
          grad.loss + strip.n * grad.stride_N + y * grad.stride_H + my_x * grad.stride_W,
          grad.stride_H, grad_scale, log_sum_exp + pixel, target + pixel};
      set_column(tile, column, d, wild, num_rows, inputs, total_class_weight, shape, terms);
      edges.load_from(first_class);
      __syncthreads();

      for (int i = threadIdx.x; i < items; i += kThreads) {
        const int cell = i / num_classes, c = i % num_classes;
        const float2* values = edges.values + c * kEdges;
        const int begin = max(col_begin[cell], x) - x;
        const int end = min(col_begin[cell + 1], x + kThreads) - x;
        corners[i] = add_columns(corners[i], tile, values[strip.left(cell)],
                                 values[strip.right(cell)], begin, end, progression, wild,
                                 first_class + c, class_weight(terms, first_class + c));
      }
      __syncthreads();
    }
  }
  __syncthreads();

  // Source column first + k lies between cells k and k + 1; the two at the ends have one more.
  const int columns = min(layout.strip_cells, strip.W - strip.first);
  const int64_t plane = shape.C * shape.W;
  float* edge_grads = workspace.edge_grads + (strip.n * (shape.H + 1) + strip.row) * 2 * plane;
#pragma unroll 1
  for (int i = threadIdx.x; i < columns * num_classes; i += kThreads) {
    const int k = channels_last ? i / num_classes : i % columns;
    const int c = channels_last ? i % num_classes : i / columns;
    const float4 before = corners[k * num_classes + c], after = corners[(k + 1) * num_classes + c];
    const int x = strip.first + k;
    float top = (x > 0 ? before.y : before.x) + after.x;
    float bottom = (x > 0 ? before.w : before.z) + after.z;
    if (x == strip.W - 1) {
      top += after.y;
      bottom += after.w;
    }
    const int64_t offset =
        channels_last ? x * shape.C + first_class + c : (first_class + c) * shape.W + x;
    edge_grads[offset] = top;
    edge_grads[plane + offset] = bottom;
  }
}

// Adds the gradients of the cells above and below each source row.
template <typename Logit>
__global__ void __launch_bounds__(kThreads)
    upsample_cross_entropy_gather_kernel(Logit* __restrict__ grad_logits,  // [N, C, H, W], dense
                                         const float* __restrict__ edge_grads,
                                         const UpsampleShape shape, const bool channels_last) {
  const int64_t plane = shape.C * shape.W;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= shape.N * shape.H * plane) return;
  const int64_t in_plane = i % plane, y = i / plane % shape.H, n = i / plane / shape.H;
  const float* tops = edge_grads + (n * (shape.H + 1) + y) * 2 * plane + in_plane;
  const float* bottoms = tops + plane;
  float sum = (y > 0 ? *bottoms : *tops) + tops[2 * plane];
  if (y == shape.H - 1) sum += bottoms[2 * plane];
  const int64_t c = in_plane / shape.W, x = in_plane % shape.W;
  store(grad_logits + (channels_last ? i : ((n * shape.C + c) * shape.H + y) * shape.W + x), sum);
}

Status check_limits(const char* kernel, const UpsampleShape& shape, const Layout& layout) {
  const int64_t source = shape.N * shape.H * shape.W;
  if (std::max({shape.C, shape.H, shape.W, shape.out_H, shape.out_W}) >= INT32_MAX / kRows ||
      source * shape.C / kThreads >= INT32_MAX || source * kLanesPerPixel / kThreads >= INT32_MAX ||
      num_blocks(shape, layout) >= INT32_MAX || layout.num_chunks >= 1 << 16) {
    return {kernel, "a size is too large"};
  }
  return {};
}

template <typename Logit>
Status prepare(const Workspace& workspace, const Logit* logits, const UpsampleShape& shape,
               const CrossEntropyTerms& terms, void* stream) {
  const auto blocks_for = [](int64_t threads) { return (threads + kThreads - 1) / kThreads; };
  const int64_t pixel_blocks = blocks_for(shape.N * shape.H * shape.W * kLanesPerPixel);
  const int64_t blocks = pixel_blocks + blocks_for(shape.H + 2 + shape.W + 2);
  return launch("upsample_cross_entropy_prepare_kernel",
                upsample_cross_entropy_prepare_kernel<Logit>, static_cast<unsigned>(blocks),
                kThreads, 0, stream, workspace, logits, shape, terms, pixel_blocks);
}

template <typename Logit>
Status forward(float* loss, float* pixel_losses, float* log_sum_exp, float* total_weight,
               const Workspace& workspace, const void* logits_, const int64_t* target, bool mean,
               const UpsampleShape& shape, const CrossEntropyTerms& terms, void* stream) {
  const auto* logits = static_cast<const Logit*>(logits_);
  const Layout layout(shape, false);
  const int64_t blocks = num_blocks(shape, layout);
  if (blocks > 0) {
    Status status = check_limits("upsample_cross_entropy_fwd_kernel", shape, layout);
    if (status.ok()) status = prepare(workspace, logits, shape, terms, stream);
    if (!status.ok()) return status;
    const size_t smem = sizeof(ForwardTile) + layout.chunk * kEdges * sizeof(float2);
    status = launch("upsample_cross_entropy_fwd_kernel", upsample_cross_entropy_fwd_kernel<Logit>,
                    static_cast<unsigned>(blocks), kThreads, smem, stream, pixel_losses,
                    log_sum_exp, workspace, logits, target, shape, terms, layout);
    if (!status.ok()) return status;
  }
  return launch("upsample_cross_entropy_reduce_kernel", upsample_cross_entropy_reduce_kernel, 1,
                kReduceThreads, kReduceThreads / 32 * sizeof(Sums), stream, loss, total_weight,
                workspace.block_sums, blocks, mean);
}

template <typename Logit>
Status backward(void* grad_logits, const Workspace& workspace, const Gradient& grad,
                const float* log_sum_exp, const void* logits_, const int64_t* target,
                bool channels_last, const UpsampleShape& shape, const CrossEntropyTerms& terms,
                void* stream) {
  const auto* logits = static_cast<const Logit*>(logits_);
  const Layout layout(shape, true);
  Status status = check_limits("upsample_cross_entropy_bwd_kernel", shape, layout);
  if (status.ok()) status = prepare(workspace, logits, shape, terms, stream);
  if (!status.ok()) return status;
  const dim3 blocks(static_cast<unsigned>(num_blocks(shape, layout)),
                    static_cast<unsigned>(layout.num_chunks));
  const size_t smem =
      sizeof(BackwardTile) + layout.chunk * (kCells * sizeof(float4) + kEdges * sizeof(float2));
  status = launch("upsample_cross_entropy_bwd_kernel", upsample_cross_entropy_bwd_kernel<Logit>,
                  blocks, kThreads, smem, stream, workspace, grad, log_sum_exp, logits, target,
                  shape, terms, layout, channels_last);
  if (!status.ok()) return status;
  const int64_t elements = shape.N * shape.C * shape.H * shape.W;
  return launch("upsample_cross_entropy_gather_kernel", upsample_cross_entropy_gather_kernel<Logit>,
                static_cast<unsigned>((elements + kThreads - 1) / kThreads), kThreads, 0, stream,
                static_cast<Logit*>(grad_logits), workspace.edge_grads, shape, channels_last);
}

}  // namespace

int64_t upsample_cross_entropy_workspace(const UpsampleShape& shape, bool backward) {
  Workspace workspace;
  return lay_out(workspace, nullptr, shape, backward);
}

Status upsample_cross_entropy_fwd(float* loss, float* pixel_losses, float* log_sum_exp,
                                  float* total_weight, void* memory, const void* logits,
                                  const int64_t* target, bool mean, const UpsampleShape& shape,
                                  const CrossEntropyTerms& terms, DType dtype, void* stream) {
  Workspace workspace;
  lay_out(workspace, memory, shape, false);
  const auto run = [&](auto logit) {
    return forward<decltype(logit)>(loss, pixel_losses, log_sum_exp, total_weight, workspace,
                                    logits, target, mean, shape, terms, stream);
  };
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kFloat16:
      return run(__half{});
    case DType::kBFloat16:
      return run(__nv_bfloat16{});
    default:
      return {"upsample_cross_entropy_fwd", "logits must be float32, float16 or bfloat16"};
  }
}

Status upsample_cross_entropy_bwd(void* grad_logits, void* memory, const float* grad_loss,
                                  const std::array<int64_t, 3>& grad_loss_strides,
                                  const float* total_weight, const float* log_sum_exp,
                                  const void* logits, const int64_t* target, bool channels_last,
                                  const UpsampleShape& shape, const CrossEntropyTerms& terms,
                                  DType dtype, void* stream) {
  if (shape.N == 0) return {};
  Workspace workspace;
  lay_out(workspace, memory, shape, true);
  const Gradient grad{grad_loss, grad_loss_strides[0], grad_loss_strides[1], grad_loss_strides[2],
                      total_weight};
  const auto run = [&](auto logit) {
    return backward<decltype(logit)>(grad_logits, workspace, grad, log_sum_exp, logits, target,
                                     channels_last, shape, terms, stream);
  };
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kFloat16:
      return run(__half{});
    case DType::kBFloat16:
      return run(__nv_bfloat16{});
    default:
      return {"upsample_cross_entropy_bwd", "logits must be float32, float16 or bfloat16"};
  }
}

}  // namespace deeplab_fast::cuda
