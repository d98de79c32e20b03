// Sums of exponentials of bilinear(logits), for the two directions of upsample_cross_entropy.
// logits [N, C, H, W] in any strides, target and log_sum_exp [N, out_H, out_W] contiguous.
//
// Output pixels between the same four source pixels form a cell; a block has up to kCells of a row.
// Logits are centred: the maximum over classes of their source pixel is subtracted, on which the
// softmax does not depend, and they are scaled by log2(e). Down a column of a cell they grow
// linearly, their exponentials geometrically: three exponentials serve kRows pixels. Where a
// centred logit is below kTame, exponentials could underflow on the way; such blocks ("wild" ones)
// subtract each pixel's maximum and compute one exponential per pixel.
#pragma once

#include <cfloat>
#include <cmath>

#include "api.h"
#include "common/bilinear.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/upsample/cells.cuh"

namespace deeplab_fast::cuda::cross_entropy {

constexpr int kThreads = 128;
constexpr int kBlocksPerSM = 6;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kRows = 8;     // output rows of a cell that are computed at a time
constexpr int kRestart = 4;  // rows that follow from one exponential; with more, errors add up
constexpr int kCells = 16;   // cells of a block: 128 columns if logits are upsampled 8 times
constexpr int kEdges = kCells + 1;
constexpr int kMaxForwardClasses = 160, kMaxBackwardClasses = 64;  // in shared memory at a time

// Lowest centred logit of a block that is not wild. A progression may run past the last row of a
// cell by two rows, each a step of at most a cell: it stays finite, below 2^120.
constexpr float kTame = -60.0f;
constexpr float kLog2E = 0x1.715476p+0f;
constexpr float kLn2 = 0x1.62e43p-1f;

constexpr int32_t kIgnored = -1, kBad = -2;  // labels of targets that are not classes

struct Sums {
  double loss, weight;
};

// Workspace of a launcher.
struct Workspace {
  Sums* block_sums;                // [blocks], forward
  float2* ranges;                  // [N, H, W] maximum and lowest centred logit of a source pixel
  int32_t *row_begin, *col_begin;  // [H + 2], [W + 2] first output of each cell, or of a later one
  float* total_class_weight;
  float* edge_grads;  // [N, H + 1, 2, C, W] or [..., W, C] gradients at tops and bottoms of cells
};

struct Layout {
  int32_t strips;       // blocks in a row of cells
  int32_t strip_cells;  // cells from one block to the next
  int32_t chunk;        // classes in shared memory at a time
  int32_t num_chunks;

  // Neighbouring blocks of the backward pass share a cell: each writes the source columns between
  // its cells.
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

int64_t num_blocks(const UpsampleShape& shape, const Layout& layout);

// Sets the pointers of a workspace that begins at `memory`. Returns its bytes.
int64_t lay_out(Workspace& workspace, void* memory, const UpsampleShape& shape, bool backward);

// Fills the parts of the workspace that both directions read. Fails in the name of `kernel` if the
// sizes are too large.
template <typename Logit>
Status prepare(const char* kernel, const Workspace& workspace, const Logit* logits,
               const UpsampleShape& shape, const Layout& layout, const CrossEntropyParams& params,
               void* stream);

__device__ inline float class_weight(const CrossEntropyParams& params, int64_t c) {
  return params.weight ? params.weight[c] : 1.0f;
}

// Centred logit. A finite one stays finite: an infinite one with weight 0 would give NaN.
__device__ inline float centre(float logit, float maximum) {
  const float value = mul_rn(logit - maximum, kLog2E);
  return value < -0x1p126f && logit >= -FLT_MAX ? -0x1p126f : value;
}

// Cell v lies between source coordinates v - 1 and v. Cell 0 holds the outputs whose coordinate was
// clamped to 0, so that inside every cell the weights change evenly; its source pixels are 0 and 1.
__device__ inline int low_source(int cell) { return max(cell - 1, 0); }
__device__ inline int high_source(int cell, int size) { return min(max(cell, 1), size - 1); }

// Cells of a block: [first, first + count) of cell row `row`, with the source columns
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

  // Index of the edge at a cell's left or right side.
  __device__ int left(int cell) const { return low_source(first + cell) - origin; }
  __device__ int right(int cell) const { return high_source(first + cell, W) - origin; }
};

// Weights down a column: those of each kRestart-th row, and the even step between rows.
struct Progression {
  float2 starts[kRows / kRestart];
  float step;
  int num_rows;
};

// State of a strip and of its current output rows, in shared memory.
struct Frame {
  int32_t wild;
  float2 maxima[kEdges];  // maxima over classes of the source pixels at the top and bottom
  float2 rows[kRows];     // weights h0, h1; those after the last row repeat it

  // Sets `maxima`. Returns true if the block is wild.
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
    __syncthreads();  // before the rows are overwritten
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

// Centred logits of a chunk of classes at the top and bottom of a strip's source columns:
// [chunk, kEdges] in shared memory.
template <typename Logit>
struct Edges {
  float2* values;
  const float2* maxima;
  const Logit* top;  // logit of class 0 at source column `origin`
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

  // Loads the chunk of classes from first_class on. All threads of the block call it.
  __device__ void load_from(int32_t first_class) {
    if (first == first_class) return;
    first = first_class;
    count = min(chunk, C - first);
    __syncthreads();  // before the values are overwritten
    const auto put = [&](int c, int i) {
      const int64_t offset = (first + c) * stride_C + i * stride_W;
      values[c * kEdges + i] = make_float2(centre(to_float(top[offset]), maxima[i].x),
                                           centre(to_float(bottom[offset]), maxima[i].y));
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

  // Logits of a class at the top and bottom of the cell.
  __device__ float2 ends(const float2* edges) const {
    const float2 l = edges[left], r = edges[right];
    return make_float2(interpolate(l.x, r.x, w.x, w.y), interpolate(l.y, r.y, w.x, w.y));
  }
};

__device__ inline float between(float2 ends, float2 h) {
  return interpolate(ends.x, ends.y, h.x, h.y);
}

// Ratio of the exponentials of two rows of a column.
__device__ inline float ratio_of(float2 ends, const Progression& progression) {
  return ptx::ex2_approx(mul_rn(ends.y - ends.x, progression.step));
}

// Calls visit(row, exponential) for the first kCount rows of a column. Rows past the last one have
// finite exponentials.
template <int kCount, typename Visit>
__device__ __forceinline__ void for_each_exponential(float2 ends, const Progression& progression,
                                                     Visit visit) {
  const float ratio = ratio_of(ends, progression);
#pragma unroll
  for (int i = 0; i < kCount / kRestart; ++i) {
    float e = ptx::ex2_approx(between(ends, progression.starts[i]));
#pragma unroll
    for (int r = i * kRestart; r < (i + 1) * kRestart; ++r) {
      visit(r, e);
      e = mul_rn(e, ratio);
    }
  }
}

// log2(x) for positive, normal x, within 4 ulp, also near 1; NaN stays NaN. It uses the polynomial
// of csrc/cpu/exp2_log2.h and takes half as many instructions as log2f.
__device__ __forceinline__ float log2_of_normal(float x) {
  const unsigned sqrt_half = 0x3f3504f3u;
  const unsigned exponent = (__float_as_uint(x) - sqrt_half) & 0xff800000u;
  const float m = __uint_as_float(__float_as_uint(x) - exponent);  // [sqrt(1/2), sqrt(2))
  const float s = mul_rn(m - 1.0f, ptx::rcp_approx(m + 1.0f));
  const float u = mul_rn(s, s);
  float p = 0x1.ba18f8p-2f;
  p = fma_rn(p, u, 0x1.27471cp-1f);
  p = fma_rn(p, u, 0x1.ec70e6p-1f);
  p = fma_rn(p, u, 0x1.715476p+1f);
  const float integer = fma_rn(static_cast<float>(static_cast<int>(exponent)), 0x1p-23f, x - x);
  return fma_rn(p, s, integer);
}

// log2 of the softmax's denominator at each pixel of a column: the sum over classes of
// 2^(logit - shift). shift is the greatest logit in a wild block, else 0.
struct Denominators {
  float log_sum[kRows], shift[kRows];
};

// Sets d. Calls each_class(c, ends) once for every class and each_chunk() after every chunk. All
// threads of the block call it.
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
      const auto sum_rows = [&](auto count) {
#pragma unroll 1
        for (const float2* values = edges.values; values < edges.end(); values += kEdges) {
          const float2 ends = column.ends(values);
          each_class(c++, ends);
          for_each_exponential<count.value>(ends, progression,
                                            [&](int r, float e) { sum[r] += e; });
        }
      };
      if (num_rows > kRestart) {
        sum_rows(std::integral_constant<int, kRows>{});
      } else {
        sum_rows(std::integral_constant<int, kRestart>{});
      }
    }
    each_chunk();
  }
  for (int r = 0; r < kRows; ++r) d.log_sum[r] = log2_of_normal(sum[r]);
}

__device__ inline int32_t label_of(int64_t target, const CrossEntropyParams& params, int64_t C) {
  if (target == params.ignore_index) return kIgnored;
  const bool is_class = static_cast<uint64_t>(target) < static_cast<uint64_t>(C);
  return is_class ? static_cast<int32_t>(target) : kBad;
}

}  // namespace deeplab_fast::cuda::cross_entropy
