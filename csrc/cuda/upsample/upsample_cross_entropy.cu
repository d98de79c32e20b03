// Cross entropy of bilinear(logits[n])(y, x) against target[n, y, x]. A thread computes columns of
// output pixels.

#include "cuda/common/dtypes.cuh"
#include "cuda/upsample/upsample_cross_entropy.cuh"

namespace deeplab_fast::cuda {
namespace {

using namespace cross_entropy;

constexpr int kReduceThreads = 512;

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
    const UpsampleShape shape, const CrossEntropyParams params, const Layout layout) {
  ForwardTile& tile = *shared_memory<ForwardTile>();
  Frame& frame = tile.frame;
  const Strip strip(shape, layout);
  const bool wild = frame.set_maxima(strip, workspace.ranges, shape);
  Edges<Logit> edges(reinterpret_cast<float2*>(&tile + 1), frame, logits, strip, shape,
                     layout.chunk);

  const float target_part = 1.0f - params.label_smoothing;
  const float smooth_part = params.label_smoothing / static_cast<float>(shape.C);
  const bool smooths = smooth_part > 0.0f;
  const float total_class_weight = smooths ? *workspace.total_class_weight : 0.0f;
  const auto out_W = static_cast<int32_t>(shape.out_W);
  Sums sums{0.0, 0.0};
  const int32_t y_end = workspace.row_begin[strip.row + 1];
  const int32_t x_begin = workspace.col_begin[strip.first];
  const int32_t x_end = workspace.col_begin[strip.first + strip.count];
  for (int32_t y = workspace.row_begin[strip.row]; y < y_end; y += kRows) {
    const int num_rows = min(kRows, y_end - y);
    frame.set_rows(y, num_rows, shape);
    for (int32_t x = x_begin; x < x_end; x += kThreads) {
      // Threads without a column repeat the last one.
      const int64_t my_x = min(x + static_cast<int32_t>(threadIdx.x), x_end - 1);
      const int64_t pixel = (strip.n * shape.out_H + y) * shape.out_W + my_x;
      const Column column(my_x, strip, shape);
      int32_t label[kRows];
      const int64_t* column_target = target + pixel;
      for (int r = 0; r < kRows; ++r) {
        label[r] = label_of(column_target[min(r, num_rows - 1) * out_W], params, shape.C);
        if (r >= num_rows) label[r] = kIgnored;
      }

      Denominators d;
      float logit_of_label[kRows] = {};
      float2 weighted = make_float2(0.0f, 0.0f);
      sum_exponentials(
          d, edges, frame, wild, column, num_rows,
          [&](int32_t c, float2 ends) {
            if (!smooths) return;
            weighted.x = fma_rn(class_weight(params, c), ends.x, weighted.x);
            weighted.y = fma_rn(class_weight(params, c), ends.y, weighted.y);
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
      float* column_log_sum_exp = log_sum_exp + pixel;
      float* column_losses = pixel_losses ? pixel_losses + pixel : nullptr;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float log_sum = d.shift[r] + d.log_sum[r];
        float loss = label[r] == kBad ? NAN : 0.0f;
        if (label[r] >= 0) {
          const float weight = class_weight(params, label[r]);
          const float hit = d.shift[r] - logit_of_label[r] + d.log_sum[r];
          loss = target_part * weight * hit;
          if (smooths) {
            const float smooth = total_class_weight * log_sum - between(weighted, frame.rows[r]);
            loss += smooth_part * smooth;
          }
          loss *= kLn2;
          weight_sum += weight;
        }
        loss_sum += loss;
        if (active && r < num_rows) {
          column_log_sum_exp[r * out_W] = log_sum * kLn2;
          if (column_losses) column_losses[r * out_W] = loss;
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

template <typename Logit>
Status forward(float* loss, float* pixel_losses, float* log_sum_exp, float* total_weight,
               const Workspace& workspace, const void* logits_, const int64_t* target, bool mean,
               const UpsampleShape& shape, const CrossEntropyParams& params, void* stream) {
  const auto* logits = static_cast<const Logit*>(logits_);
  const Layout layout(shape, false);
  const int64_t blocks = num_blocks(shape, layout);
  if (blocks > 0) {
    Status status = prepare("upsample_cross_entropy_fwd_kernel", workspace, logits, shape, layout,
                            params, stream);
    if (!status.ok()) return status;
    const size_t smem = sizeof(ForwardTile) + layout.chunk * kEdges * sizeof(float2);
    status = launch("upsample_cross_entropy_fwd_kernel", upsample_cross_entropy_fwd_kernel<Logit>,
                    static_cast<unsigned>(blocks), kThreads, smem, stream, pixel_losses,
                    log_sum_exp, workspace, logits, target, shape, params, layout);
    if (!status.ok()) return status;
  }
  return launch("upsample_cross_entropy_reduce_kernel", upsample_cross_entropy_reduce_kernel, 1,
                kReduceThreads, kReduceThreads / 32 * sizeof(Sums), stream, loss, total_weight,
                workspace.block_sums, blocks, mean);
}

}  // namespace

Status upsample_cross_entropy_fwd(float* loss, float* pixel_losses, float* log_sum_exp,
                                  float* total_weight, void* memory, const void* logits,
                                  const int64_t* target, bool mean, const UpsampleShape& shape,
                                  const CrossEntropyParams& params, DType dtype, void* stream) {
  Workspace workspace;
  lay_out(workspace, memory, shape, false);
  return with_elements(dtype, "upsample_cross_entropy_fwd", [&](auto logit) {
    return forward<decltype(logit)>(loss, pixel_losses, log_sum_exp, total_weight, workspace,
                                    logits, target, mean, shape, params, stream);
  });
}

}  // namespace deeplab_fast::cuda
