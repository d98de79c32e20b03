// Gradient of upsample_cross_entropy. A thread sums the pixels of a cell for one class at a time, a
// block adds the cells on both sides of its source columns, and a second kernel adds the cells
// above and below each source row.

#include "cuda/common/dtypes.cuh"
#include "cuda/upsample/upsample_cross_entropy.cuh"

namespace deeplab_fast::cuda {
namespace {

using namespace cross_entropy;

// Consecutive pixels of a column with the same target, and their share of its class's gradient.
struct alignas(16) Run {
  int32_t label;
  float top, bottom;
  int32_t count;  // in the first run: the number of runs of the column
};

// Gradients of kRows pixels of a column, in pairs: the shares of the cell's top and bottom. Columns
// are an odd number of 16-byte vectors apart, so that vectors which neighbouring threads store at
// once lie in different banks.
struct alignas(16) ColumnGradients {
  float4 softmax[kRows / 2];  // factors of the exponentials, two pixels each
  float4 weights;             // w0, w1, and the factors of class weights, from label smoothing
  Run runs[kRows];
};
static_assert(sizeof(ColumnGradients) / 16 % 2 == 1, "no bank conflicts");

// Shared memory of a block: kThreads columns.
struct alignas(16) BackwardTile {
  ColumnGradients columns[kThreads];
  float shift[kRows][kThreads];  // in wild blocks
  Frame frame;
};

struct Gradient {
  const float* loss;
  int64_t stride_N, stride_H, stride_W;
  const float* divisor;  // or nullptr
};

// Inputs at the first pixel of a column.
struct PixelInputs {
  const float* grad_loss;
  int64_t grad_stride_H;
  float grad_scale;
  const float* log_sum_exp;
  const int64_t* target;
};

// Fills the thread's column of the tile.
__device__ void set_column(BackwardTile& tile, const Column& column, Denominators& d, bool wild,
                           int num_rows, PixelInputs pixel, float total_class_weight,
                           const UpsampleShape& shape, const CrossEntropyParams& params) {
  const int i = threadIdx.x;
  ColumnGradients& gradients = tile.columns[i];
  const float target_part = 1.0f - params.label_smoothing;
  const float smooth_part = params.label_smoothing / static_cast<float>(shape.C);
  const auto out_W = static_cast<int32_t>(shape.out_W);
  int32_t label[kRows];
  float grad[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = min(r, num_rows - 1);
    label[r] = label_of(pixel.target[row * out_W], params, shape.C);
    if (r >= num_rows) label[r] = kIgnored;
    grad[r] = pixel.grad_loss[row * pixel.grad_stride_H] * pixel.grad_scale;
    // A large shift has rounded the logarithm off the saved log_sum_exp.
    if (!wild) d.log_sum[r] = pixel.log_sum_exp[row * out_W] * kLog2E;
  }

  float2 smooth = make_float2(0.0f, 0.0f);
  Run run{kIgnored, 0.0f, 0.0f, 0};
  int num_runs = 0;
  float2 row_before = smooth;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float2 h = tile.frame.rows[r];
    float scale = label[r] == kBad ? NAN : 0.0f;
    if (label[r] >= 0) {
      const float taken = target_part * class_weight(params, label[r]) * grad[r];
      const float smoothed = smooth_part * grad[r];
      if (label[r] != run.label) {
        if (run.label != kIgnored) gradients.runs[num_runs++] = run;
        run = {label[r], 0.0f, 0.0f, 0};
      }
      run.top = fma_rn(taken, h.x, run.top);
      run.bottom = fma_rn(taken, h.y, run.bottom);
      smooth = make_float2(fma_rn(smoothed, h.x, smooth.x), fma_rn(smoothed, h.y, smooth.y));
      scale = taken + smoothed * total_class_weight;
    }
    // An ignored pixel gives 0 times its softmax, as in PyTorch: NaN if a logit is NaN.
    scale *= ptx::ex2_approx(-d.log_sum[r]);
    const float2 row = make_float2(scale * h.x, scale * h.y);
    if (r % 2 == 1) {
      gradients.softmax[r / 2] = make_float4(row_before.x, row_before.y, row.x, row.y);
    }
    row_before = row;
    if (wild) tile.shift[r][i] = d.shift[r];
  }
  gradients.weights = make_float4(column.w.x, column.w.y, smooth.x, smooth.y);
  gradients.runs[num_runs] = run;
  gradients.runs[0].count = num_runs + 1;
}

// Adds the gradients of a column to those of the cell's top and bottom: exponentials times softmax
// factors. The exponentials grow by one ratio, so their sum is a polynomial, which Horner's rule
// evaluates from the last row up. Rows past the last one of the cell have factors of 0.
__device__ __forceinline__ void add_progression(float& top, float& bottom,
                                                const ColumnGradients& column, float2 ends,
                                                const Progression& progression) {
  static_assert(kRestart == 4, "two vectors of two rows");
  const float ratio = ratio_of(ends, progression);
#pragma unroll
  for (int i = 0; i < kRows / kRestart; ++i) {
    if (i > 0 && i * kRestart >= progression.num_rows) break;
    const float e = ptx::ex2_approx(between(ends, progression.starts[i]));
    const float4 rows = column.softmax[2 * i], rows_after = column.softmax[2 * i + 1];
    float2 sum = make_float2(rows_after.z, rows_after.w);
    sum = make_float2(fma_rn(sum.x, ratio, rows_after.x), fma_rn(sum.y, ratio, rows_after.y));
    sum = make_float2(fma_rn(sum.x, ratio, rows.z), fma_rn(sum.y, ratio, rows.w));
    sum = make_float2(fma_rn(sum.x, ratio, rows.x), fma_rn(sum.y, ratio, rows.y));
    top = fma_rn(sum.x, e, top);
    bottom = fma_rn(sum.y, e, bottom);
  }
}

// Adds the gradients of class c in columns [begin, end) to those of a cell's corners, a b / c d.
template <bool kWild>
__device__ __forceinline__ float4 add_columns(float4 corners, const BackwardTile& tile, float2 left,
                                              float2 right, int begin, int end,
                                              const Progression& progression, int32_t c,
                                              float weight) {
#pragma unroll 1
  for (int i = begin; i < end; ++i) {
    const ColumnGradients& column = tile.columns[i];
    const float4 weights = column.weights;
    const float2 w = make_float2(weights.x, weights.y);
    Run run = column.runs[0];
    float top = fma_rn(-weight, weights.z, run.label == c ? -run.top : 0.0f);
    float bottom = fma_rn(-weight, weights.w, run.label == c ? -run.bottom : 0.0f);
    const int num_runs = run.count;
#pragma unroll 1
    for (int k = 1; k < num_runs; ++k) {
      run = column.runs[k];
      top -= run.label == c ? run.top : 0.0f;
      bottom -= run.label == c ? run.bottom : 0.0f;
    }
    const float2 ends =
        make_float2(interpolate(left.x, right.x, w.x, w.y), interpolate(left.y, right.y, w.x, w.y));
    if constexpr (kWild) {
      const auto* softmax = reinterpret_cast<const float2*>(column.softmax);
#pragma unroll 1
      for (int r = 0; r < progression.num_rows; ++r) {
        const float e = ptx::ex2_approx(between(ends, tile.frame.rows[r]) - tile.shift[r][i]);
        top = fma_rn(softmax[r].x, e, top);
        bottom = fma_rn(softmax[r].y, e, bottom);
      }
    } else {
      add_progression(top, bottom, column, ends, progression);
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
                                      const UpsampleShape shape, const CrossEntropyParams params,
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

  // Without smoothing, the infinite weight of a class without pixels would give 0 * inf.
  const bool smooths = params.label_smoothing > 0.0f;
  const float total_class_weight = smooths ? *workspace.total_class_weight : 0.0f;
  const float grad_scale = grad.divisor ? 1.0f / *grad.divisor : 1.0f;
  const int32_t y_end = workspace.row_begin[strip.row + 1];
  const int32_t* col_begin = workspace.col_begin + strip.first;
  const int32_t x_end = col_begin[strip.count];
  for (int32_t y = workspace.row_begin[strip.row]; y < y_end; y += kRows) {
    const int num_rows = min(kRows, y_end - y);
    frame.set_rows(y, num_rows, shape);
    const Progression progression = frame.progression(num_rows);
    for (int32_t x = col_begin[0]; x < x_end; x += kThreads) {
      // Threads without a column repeat the last one; no thread reads their copies.
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
      set_column(tile, column, d, wild, num_rows, inputs, total_class_weight, shape, params);
      edges.load_from(first_class);
      __syncthreads();

      for (int i = threadIdx.x; i < items; i += kThreads) {
        const int cell = i / num_classes, c = i % num_classes;
        const float2* values = edges.values + c * kEdges;
        const int begin = max(col_begin[cell], x) - x;
        const int end = min(col_begin[cell + 1], x + kThreads) - x;
        const float weight = smooths ? class_weight(params, first_class + c) : 0.0f;
        const auto add = [&](auto is_wild) {
          return add_columns<is_wild.value>(corners[i], tile, values[strip.left(cell)],
                                            values[strip.right(cell)], begin, end, progression,
                                            first_class + c, weight);
        };
        corners[i] = wild ? add(std::true_type{}) : add(std::false_type{});
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
  round_to(grad_logits[channels_last ? i : ((n * shape.C + c) * shape.H + y) * shape.W + x], sum);
}

template <typename Logit>
Status backward(void* grad_logits, const Workspace& workspace, const Gradient& grad,
                const float* log_sum_exp, const void* logits_, const int64_t* target,
                bool channels_last, const UpsampleShape& shape, const CrossEntropyParams& params,
                void* stream) {
  const auto* logits = static_cast<const Logit*>(logits_);
  const Layout layout(shape, true);
  Status status = prepare("upsample_cross_entropy_bwd_kernel", workspace, logits, shape, layout,
                          params, stream);
  if (!status.ok()) return status;
  const dim3 blocks(static_cast<unsigned>(num_blocks(shape, layout)),
                    static_cast<unsigned>(layout.num_chunks));
  const size_t smem =
      sizeof(BackwardTile) + layout.chunk * (kCells * sizeof(float4) + kEdges * sizeof(float2));
  status = launch("upsample_cross_entropy_bwd_kernel", upsample_cross_entropy_bwd_kernel<Logit>,
                  blocks, kThreads, smem, stream, workspace, grad, log_sum_exp, logits, target,
                  shape, params, layout, channels_last);
  if (!status.ok()) return status;
  const int64_t elements = shape.N * shape.C * shape.H * shape.W;
  return launch("upsample_cross_entropy_gather_kernel", upsample_cross_entropy_gather_kernel<Logit>,
                static_cast<unsigned>((elements + kThreads - 1) / kThreads), kThreads, 0, stream,
                static_cast<Logit*>(grad_logits), workspace.edge_grads, shape, channels_last);
}

}  // namespace

Status upsample_cross_entropy_bwd(void* grad_logits, void* memory, const float* grad_loss,
                                  const std::array<int64_t, 3>& grad_loss_strides,
                                  const float* total_weight, const float* log_sum_exp,
                                  const void* logits, const int64_t* target, bool channels_last,
                                  const UpsampleShape& shape, const CrossEntropyParams& params,
                                  DType dtype, void* stream) {
  if (shape.N == 0) return {};
  Workspace workspace;
  lay_out(workspace, memory, shape, true);
  const Gradient grad{grad_loss, grad_loss_strides[0], grad_loss_strides[1], grad_loss_strides[2],
                      total_weight};
  return with_elements(dtype, "upsample_cross_entropy_bwd", [&](auto logit) {
    return backward<decltype(logit)>(grad_logits, workspace, grad, log_sum_exp, logits, target,
                                     channels_last, shape, params, stream);
  });
}

}  // namespace deeplab_fast::cuda
