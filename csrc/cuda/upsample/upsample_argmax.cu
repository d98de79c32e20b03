// labels[n, y, x] = argmax_c bilinear(logits[n, c])(y, x), interpolated in fp32.
// logits [N, C, H, W] in any strides, labels [N, out_H, out_W] contiguous.
//
// The output pixels between the same four source pixels form a cell. A block labels a tile of
// output pixels. It ranks the classes at each source pixel of the tile. If the corners of a cell
// agree on a safe winner (bilinear.h), the whole cell gets that class. Each other cell goes to a
// warp, whose lanes first divide the classes, to list those that can win, then the pixels, to
// compare the listed classes. Aligned rows of labels are stored in vectors of 16 bytes. If cells
// are small, a thread per pixel compares all classes instead.

#include <cfloat>
#include <cmath>

#include "api.h"
#include "common/bilinear.h"
#include "cuda/common/dtypes.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/upsample/cells.cuh"

namespace deeplab_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSM = 4;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kTileH = 32, kTileW = 128;  // output pixels
constexpr int kMaxCandidates = 32;        // a cell with more of them compares all classes
constexpr int kLanesPerPixel = 4;         // lanes that rank the classes of a source pixel
constexpr int kCellLanesW = 8;            // a warp covers 8 x 4 pixels of a cell at a time,
constexpr int kCellLanesH = 32 / kCellLanesW;
constexpr int kRowsPerLane = 2;  // and the 8 x 4 below, which share the interpolation along x

// True if pruning is faster: from about ten pixels per cell on.
bool pruning_pays(const UpsampleShape& shape) {
  return shape.scale_H <= kMaxCellScale && shape.scale_W <= kMaxCellScale &&
         shape.out_H <= kMaxCellSize && shape.out_W <= kMaxCellSize && shape.N < 1 << 16 &&
         shape.C <= INT32_MAX - 32;
}

// Rank of a source pixel: the class that wins safely, else kNotFinite or kUnsure - winner.
constexpr int32_t kNotFinite = -1;
constexpr int32_t kUnsure = -2;
__device__ int32_t winner_of(int32_t rank) { return rank >= 0 ? rank : kUnsure - rank; }

constexpr int32_t kContested = -1;  // replaces the label of a cell whose corners do not agree

// Argmax over all classes. Ties go to the lowest class, the first NaN wins.
template <typename Logit>
__device__ int64_t argmax_of_all(const Corners<Logit>& corners, int64_t C, float2 w, float2 h) {
  float best = 0.0f;
  int64_t best_class = -1;
  for (int64_t c = 0; c < C; ++c) {
    const float4 x = corners.at(c);
    const float value = interpolate(x.x, x.y, x.z, x.w, w.x, w.y, h.x, h.y);
    if (best_class < 0 || replaces_best(value, best)) {
      best = value;
      best_class = c;
    }
  }
  return best_class;
}

// Classes that can win in a cell.
struct CandidateList {
  float4 bounds[4];  // for the winner of each corner, its losing bounds at the four corners
  float4 corners[kMaxCandidates];
  int32_t classes[kMaxCandidates];
};

struct Tile {
  Side<kTileH> rows;
  Side<kTileW> cols;
  int32_t rank[(Side<kTileH>::kMaxCells + 1) * (Side<kTileW>::kMaxCells + 1)];  // source pixels
  int32_t cell_label[Side<kTileH>::kMaxCells * Side<kTileW>::kMaxCells];        // or kContested
  int32_t contested[Side<kTileH>::kMaxCells * Side<kTileW>::kMaxCells];         // cells, unordered
  int32_t num_contested;
  int32_t label[kTileH][kTileW];     // set for the pixels of contested cells only
  CandidateList candidates[kWarps];  // one per warp, for the cell that it works on
};

// Rank of a source pixel. kLanesPerPixel adjacent lanes, numbered by `part`, share the pixel; all
// return the rank.
template <typename Logit>
__device__ int32_t rank_classes(const Logit* pixel, int64_t stride_C, int32_t C, int part) {
  float best = -FLT_MAX, second = -FLT_MAX;
  int32_t winner = 0;
  int finite = 1;
#pragma unroll 4
  for (int32_t c = part; c < C; c += kLanesPerPixel) {
    const float value = to_float(pixel[c * stride_C]);
    finite &= fabsf(value) < 0x1p126f;  // else an interpolated value may overflow
    second = fmaxf(second, fminf(value, best));
    winner = value > best ? c : winner;
    best = fmaxf(best, value);
  }
  for (int lanes = 1; lanes < kLanesPerPixel; lanes *= 2) {
    const float other = __shfl_xor_sync(kAllLanes, best, lanes);
    const float other_second = __shfl_xor_sync(kAllLanes, second, lanes);
    const int32_t other_winner = __shfl_xor_sync(kAllLanes, winner, lanes);
    finite &= __shfl_xor_sync(kAllLanes, finite, lanes);
    second = fmaxf(fmaxf(second, other_second), fminf(best, other));
    winner = other > best ? other_winner : winner;
    best = fmaxf(best, other);
  }
  if (!finite) return kNotFinite;
  return second <= losing_bound(best) ? winner : kUnsure - winner;
}

// Lists the classes that can win in a cell, lowest first. Returns how many there are, or any number
// above kMaxCandidates. A warp calls it; lanes 0 to 3 each pass the rank of a corner.
template <typename Logit>
__device__ int list_candidates(CandidateList& list, const Corners<Logit>& corners, int32_t rank,
                               int32_t C, int lane) {
  if (lane < 4) {
    const float4 x = corners.at(winner_of(rank));
    list.bounds[lane] =
        make_float4(losing_bound(x.x), losing_bound(x.y), losing_bound(x.z), losing_bound(x.w));
  }
  __syncwarp();
  int count = 0;
  for (int32_t first = 0; first < C && count <= kMaxCandidates; first += 32) {
    const int32_t c = first + lane;
    const float4 x = corners.at(min(c, C - 1));
    bool can_win = c < C;
    for (const float4& bound : list.bounds) {
      can_win &= x.x > bound.x || x.y > bound.y || x.z > bound.z || x.w > bound.w;
    }
    const unsigned winners = __ballot_sync(kAllLanes, can_win);
    const int slot = count + __popc(winners & ((1u << lane) - 1));
    if (can_win && slot < kMaxCandidates) {
      list.corners[slot] = x;
      list.classes[slot] = c;
    }
    count += __popc(winners);
  }
  __syncwarp();
  return count;
}

// Writes tile.label of the pixels of a contested cell. A warp calls it.
template <typename Logit>
__device__ void label_cell(Tile& tile, const Logit* logits, const UpsampleShape& shape, int cell,
                           int warp, int lane) {
  const int i = cell / tile.cols.num_cells, j = cell % tile.cols.num_cells;
  const int corner = (i + lane / 2 % 2) * (tile.cols.num_cells + 1) + j + lane % 2;
  const int32_t rank = tile.rank[corner];
  const bool finite = __all_sync(kAllLanes, rank != kNotFinite);

  const Corners<Logit> corners =
      corners_of(logits, shape, blockIdx.z, tile.rows.first_cell + i, tile.cols.first_cell + j);
  const auto C = static_cast<int32_t>(shape.C);
  CandidateList& list = tile.candidates[warp];
  const int count = finite ? list_candidates(list, corners, rank, C, lane) : kMaxCandidates + 1;
  const int y_end = tile.rows.begin[i + 1], x_end = tile.cols.begin[j + 1];
  for (int y = tile.rows.begin[i] + lane / kCellLanesW; y < y_end;
       y += kRowsPerLane * kCellLanesH) {
    for (int x = tile.cols.begin[j] + lane % kCellLanesW; x < x_end; x += kCellLanesW) {
      const float2 w = tile.cols.weights[x];
      int32_t label[kRowsPerLane];
      float2 h[kRowsPerLane];
      for (int r = 0; r < kRowsPerLane; ++r) {
        h[r] = tile.rows.weights[min(y + r * kCellLanesH, y_end - 1)];
      }
      if (count <= kMaxCandidates) {
        float best[kRowsPerLane];
        for (int r = 0; r < kRowsPerLane; ++r) {
          best[r] = -INFINITY;
          label[r] = 0;
        }
        for (int k = 0; k < count; ++k) {
          const float4 v = list.corners[k];
          const float top = interpolate(v.x, v.y, w.x, w.y);
          const float bottom = interpolate(v.z, v.w, w.x, w.y);
          for (int r = 0; r < kRowsPerLane; ++r) {
            const float value = interpolate(top, bottom, h[r].x, h[r].y);
            label[r] = value > best[r] ? k : label[r];
            best[r] = fmaxf(best[r], value);
          }
        }
        for (int32_t& l : label) l = list.classes[l];
      } else {
        for (int r = 0; r < kRowsPerLane; ++r) {
          label[r] = static_cast<int32_t>(argmax_of_all(corners, C, w, h[r]));
        }
      }
      for (int r = 0; r < kRowsPerLane; ++r) {
        if (y + r * kCellLanesH < y_end) tile.label[y + r * kCellLanesH][x] = label[r];
      }
    }
  }
  __syncwarp();  // before the list of candidates is reused
}

template <typename Label, int kVector>
__device__ void store_vector_of_labels(Label* labels, const int32_t (&vector)[kVector]) {
  if constexpr (kVector == 1) {
    *labels = static_cast<Label>(vector[0]);
  } else {
    static_assert(kVector * sizeof(Label) == 16, "vectors are 16 bytes");
    unsigned words[4] = {};
    for (int e = 0; e < kVector; ++e) {
      const int byte = e * static_cast<int>(sizeof(Label));
      words[byte / 4] |= static_cast<unsigned>(vector[e]) << byte % 4 * 8;
    }
    __stcs(reinterpret_cast<uint4*>(labels), make_uint4(words[0], words[1], words[2], words[3]));
  }
}

// Stores the labels of a tile, whose first pixel is at `labels`. A thread stores a column of
// vectors.
template <int kVector, typename Label>
__device__ void store_labels(Label* labels, const Tile& tile, int64_t out_W) {
  constexpr int kColumns = kTileW / kVector;
  constexpr int kRowStep = kThreads / kColumns;
  const int x = threadIdx.x % kColumns * kVector;
  if (x >= tile.cols.count) return;
  const int first_cell = tile.cols.cell[x], last_cell = tile.cols.cell[x + kVector - 1];
  for (int y = threadIdx.x / kColumns; y < tile.rows.count; y += kRowStep) {
    const int32_t* cell_label = tile.cell_label + tile.rows.cell[y] * tile.cols.num_cells;
    const int32_t label = cell_label[last_cell];
    bool same = label != kContested;
    for (int c = first_cell; c < last_cell; ++c) same &= cell_label[c] == label;
    int32_t vector[kVector];
    for (int32_t& l : vector) l = label;
    if (!same) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const int32_t of_cell = cell_label[tile.cols.cell[x + e]];
        vector[e] = of_cell != kContested ? of_cell : tile.label[y][x + e];
      }
    }
    store_vector_of_labels(labels + y * out_W + x, vector);
  }
}

template <typename Label, typename Logit>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    upsample_argmax_fwd_pruned_kernel(Label* __restrict__ labels,        // [N, out_H, out_W]
                                      const Logit* __restrict__ logits,  // [N, C, H, W]
                                      const UpsampleShape shape) {
  Tile& tile = *shared_memory<Tile>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int x = blockIdx.x * kTileW, y = blockIdx.y * kTileH;

  // Cells
  static_assert(kTileW + kTileH <= kThreads, "a thread for each row and column");
  if (threadIdx.x < kTileW) {
    tile.cols.set(threadIdx.x, x, shape.out_W, shape.W, shape.scale_W, shape.align_corners);
  } else {
    tile.rows.set(threadIdx.x - kTileW, y, shape.out_H, shape.H, shape.scale_H,
                  shape.align_corners);
  }
  if (threadIdx.x == 0) tile.num_contested = 0;
  __syncthreads();

  // Ranks of source pixels
  const int cells_H = tile.rows.num_cells, cells_W = tile.cols.num_cells;
  const int pixels = (cells_H + 1) * (cells_W + 1);
  const int last_row = static_cast<int>(shape.H) - 1, last_col = static_cast<int>(shape.W) - 1;
  for (int i = threadIdx.x; i - lane < pixels * kLanesPerPixel; i += kThreads) {
    const int pixel = min(i / kLanesPerPixel, pixels - 1);
    const int row = min(tile.rows.first_cell + pixel / (cells_W + 1), last_row);
    const int col = min(tile.cols.first_cell + pixel % (cells_W + 1), last_col);
    const Logit* source =
        logits + blockIdx.z * shape.stride_N + row * shape.stride_H + col * shape.stride_W;
    const int part = i % kLanesPerPixel;
    const int32_t rank = rank_classes(source, shape.stride_C, static_cast<int32_t>(shape.C), part);
    if (part == 0 && i / kLanesPerPixel < pixels) tile.rank[pixel] = rank;
  }
  __syncthreads();

  // Labels of cells
  for (int cell = threadIdx.x; cell < cells_H * cells_W; cell += kThreads) {
    const int32_t* rank = tile.rank + cell / cells_W * (cells_W + 1) + cell % cells_W;
    const int32_t* below = rank + cells_W + 1;
    const bool agree =
        rank[0] >= 0 && rank[1] == rank[0] && below[0] == rank[0] && below[1] == rank[0];
    tile.cell_label[cell] = agree ? rank[0] : kContested;
    if (!agree) tile.contested[atomicAdd(&tile.num_contested, 1)] = cell;
  }
  __syncthreads();

  for (int i = warp; i < tile.num_contested; i += kWarps) {
    label_cell(tile, logits, shape, tile.contested[i], warp, lane);
  }
  __syncthreads();

  constexpr int kVector = 16 / sizeof(Label);
  labels += (blockIdx.z * shape.out_H + y) * shape.out_W + x;
  if (shape.out_W % kVector == 0) {  // torch's allocations are aligned
    store_labels<kVector>(labels, tile, shape.out_W);
  } else {
    store_labels<1>(labels, tile, shape.out_W);
  }
}

template <typename Label, typename Logit>
__global__ void __launch_bounds__(kThreads)
    upsample_argmax_fwd_kernel(Label* __restrict__ labels,        // [N, out_H, out_W]
                               const Logit* __restrict__ logits,  // [N, C, H, W]
                               const UpsampleShape shape) {
  const int64_t pixels = shape.N * shape.out_H * shape.out_W;
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (pixel >= pixels) return;

  const int64_t x = pixel % shape.out_W;
  const int64_t y = pixel / shape.out_W % shape.out_H;
  const int64_t n = pixel / shape.out_W / shape.out_H;
  const SourcePair row = source_pair(y, shape.H, shape.scale_H, shape.align_corners);
  const SourcePair col = source_pair(x, shape.W, shape.scale_W, shape.align_corners);
  labels[pixel] =
      static_cast<Label>(argmax_of_all(corners_of(logits, shape, n, row.lo, col.lo), shape.C,
                                       make_float2(col.w0, col.w1), make_float2(row.w0, row.w1)));
}

template <typename Label, typename Logit>
Status launch_typed(void* labels_, const void* logits_, const UpsampleShape& shape, void* stream) {
  auto* labels = static_cast<Label*>(labels_);
  const auto* logits = static_cast<const Logit*>(logits_);
  if (pruning_pays(shape)) {
    const dim3 blocks(static_cast<unsigned>((shape.out_W + kTileW - 1) / kTileW),
                      static_cast<unsigned>((shape.out_H + kTileH - 1) / kTileH),
                      static_cast<unsigned>(shape.N));
    return launch("upsample_argmax_fwd_pruned_kernel",
                  upsample_argmax_fwd_pruned_kernel<Label, Logit>, blocks, kThreads, sizeof(Tile),
                  stream, labels, logits, shape);
  }
  const int64_t pixels = shape.N * shape.out_H * shape.out_W;
  const auto blocks = static_cast<unsigned>((pixels + kThreads - 1) / kThreads);
  return launch("upsample_argmax_fwd_kernel", upsample_argmax_fwd_kernel<Label, Logit>, blocks,
                kThreads, 0, stream, labels, logits, shape);
}

template <typename Label>
Status launch_label(void* labels, const void* logits, const UpsampleShape& shape, DType logit_dtype,
                    void* stream) {
  return with_elements(logit_dtype, "upsample_argmax_fwd", [&](auto logit) {
    return launch_typed<Label, decltype(logit)>(labels, logits, shape, stream);
  });
}

}  // namespace

Status upsample_argmax_fwd(void* labels, const void* logits, const UpsampleShape& shape,
                           DType label_dtype, DType logit_dtype, void* stream) {
  if (shape.N * shape.out_H * shape.out_W == 0) return {};
  switch (label_dtype) {
    case DType::kInt64:
      return launch_label<int64_t>(labels, logits, shape, logit_dtype, stream);
    case DType::kInt32:
      return launch_label<int32_t>(labels, logits, shape, logit_dtype, stream);
    case DType::kUInt8:
      return launch_label<uint8_t>(labels, logits, shape, logit_dtype, stream);
    default:
      return {"upsample_argmax_fwd", "labels must be int64, int32 or uint8"};
  }
}

}  // namespace deeplab_fast::cuda
