// grad_weight as in dilated_conv2d_wgrad.cu, for compute capability 9.0 with wgmma.
//
// An output tile is 256 output channels x 256 input channels of a tap, a k-iteration 64 pixels.
// Persistent clusters of two CTAs share a work item, 128 output channels each. One thread per CTA
// copies boxes of pixels: the gradient's to its own CTA, half of the input's to both. A box may
// reach over the edge of the tap's rectangle; there either operand is outside the map and
// zero-filled. Two warpgroups of consumers multiply 64 output channels each with wgmma, both
// operands transposed (pixels are rows), accumulating in registers. Four stages (pipeline.cuh).

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>

#include "api.h"
#include "cuda/common/elements.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pairs.cuh"
#include "cuda/common/pipeline.cuh"
#include "cuda/common/ptx_sm90.cuh"
#include "cuda/common/tensor_map.cuh"
#include "cuda/conv/warp_rows.cuh"
#include "cuda/conv/wgrad_reduce.cuh"
#include "schedule/work_list.h"

namespace deeplab_fast::cuda {
namespace {

constexpr int kBlockM = 128, kBlockN = 256;  // output and input channels per CTA
constexpr int kBlockK = 64;                  // pixels per k-iteration
constexpr int kClusterSize = 2;              // CTAs
constexpr int kStages = 4;
constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;  // warpgroups
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;

// A stage consists of chunks of 64 channels, each with a swizzled row of 128 bytes per pixel.
constexpr int kRowBytes = 128, kChunk = kRowBytes / 2;
constexpr int kChunkBytes = kBlockK * kRowBytes;
constexpr int kChunksM = kBlockM / kChunk, kChunksN = kBlockN / kChunk;
constexpr int kStageBytes = (kChunksM + kChunksN) * kChunkBytes;
constexpr int kBoxes = kBlockK / kWgradBoxSm90;
constexpr int kBoxBytes = kWgradBoxSm90 * kRowBytes;

// setmaxnreg redistributes the registers of the launch, 168 per thread.
constexpr int kLaunchRegisters = 168, kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <=
                  kLaunchRegisters * kThreads,
              "or setmaxnreg would wait forever");
static_assert(kChunksM == kConsumers, "a warpgroup multiplies 64 rows");
static_assert(kBoxBytes % 1024 == 0, "the swizzle of a box starts at its first row");
static_assert(kClusterSize * kBlockM == kConvTileSm90 && kBlockN == kConvTileSm90 &&
                  kBlockK * 2 == kConvKIterBytesSm90,
              "the work list assumes this output tile and k-iteration");

using Barriers = PipelineBarriers<kStages>;

constexpr int kStagedAt = kStages * kStageBytes;  // rows of each warp, staged for stores
constexpr int kBarriersAt = kStagedAt + kConsumers * 4 * kStagedBytes;
constexpr size_t kSmem = kBarriersAt + sizeof(Barriers);
static_assert(kSmem <= 227 * 1024, "shared memory per CTA");

struct TensorMaps {
  CUtensorMap grad_output, input;  // [N, H, W, channels]
};

// Producer thread: fills the stages for the work items of the cluster.
__device__ void produce(const TensorMaps& maps, const WgradBranches& branches,
                        const ConvWgradWork& work, int first_item, int end_item, int rank,
                        unsigned char* stages, Barriers& barriers) {
  PipelineState<kStages> state;
  for (int i = first_item; i < end_item; ++i) {
    const BoxItem item = work.box_items[i];
    const int first_k = branches.branch[item.branch].first_channel + item.k + rank * kBlockM;
    const int first_chunk = rank * (kChunksN / kClusterSize);
    const int first_c = item.c + first_chunk * kChunk;
    // The last boxes may lie past the last image; they are zero-filled as well.
    int column = item.column, row = item.row, n = item.n;
    for (int k_iter = 0; k_iter < item.num_k_iters; ++k_iter) {
      uint64_t* full = &barriers.full[state.stage];
      wait(&barriers.empty[state.stage], state.phase ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, kStageBytes);
      unsigned char* grad_rows = stages + state.stage * kStageBytes;
      unsigned char* input_rows = grad_rows + (kChunksM + first_chunk) * kChunkBytes;
#pragma unroll
      for (int box = 0; box < kBoxes; ++box) {
        const int y = item.y + row * work.box_y, x = item.x + column * work.box_x;
#pragma unroll
        for (int chunk = 0; chunk < kChunksM; ++chunk)
          ptx::cp_async_bulk_tensor(grad_rows + chunk * kChunkBytes + box * kBoxBytes,
                                    &maps.grad_output, full, {first_k + chunk * kChunk, x, y, n});
#pragma unroll
        for (int chunk = 0; chunk < kChunksN / kClusterSize; ++chunk)
          ptx::cp_async_bulk_tensor_multicast(
              input_rows + chunk * kChunkBytes + box * kBoxBytes, &maps.input, full,
              {first_c + chunk * kChunk, x + item.dx, y + item.dy, n}, (1 << kClusterSize) - 1);
        if (++column < item.columns) continue;
        column = 0;
        if (++row < item.rows) continue;
        row = 0;
        n += work.box_n;
      }
      state.advance();
    }
  }
  wait_for_readers(state, barriers.empty);
}

// Stores the sums of a warp: 16 output channels, from first_row of the output tile on.
template <typename T>
__device__ void store_sums(const float (&sum)[kBlockN / 2], float* partial_sums,
                           const ConvWgradBranch& branch, const ConvWgradShape& shape,
                           const BoxItem& item, int first_row, unsigned char* staged) {
  if (item.slot >= 0) {
    store_partial_sums<kConvTileSm90>(sum, partial_sums, item.slot, first_row);
    return;
  }
  const int first_k = item.k + first_row;
#pragma unroll
  for (int part = 0; part < kBlockN; part += kStagedCols) {
    store_rows<T>(
        staged,
        [&](int j, int half) {
          Pair<T> pair;
          const int at = part / 2 + j * 4 + half * 2;
          round_to(pair, sum[at], sum[at + 1]);
          return bits_of(pair);
        },
        [&](int row, int col, const Chunk<T>& chunk) {
          const int k = first_k + row, c = item.c + part + col;
          if (k >= branch.K || c >= shape.C) return;
          T* weight = static_cast<T*>(branch.grad_weight) +
                      (static_cast<int64_t>(k) * branch.num_taps + item.index) * shape.C;
          *reinterpret_cast<Chunk<T>*>(weight + c) = chunk;
        });
  }
}

// Consumer warpgroups: multiply the stages and store the sums of each work item.
template <typename T>
__device__ void consume(float* partial_sums, const WgradBranches& branches,
                        const ConvWgradWork& work, const ConvWgradShape& shape, int first_item,
                        int end_item, int rank, unsigned char* stages, Barriers& barriers) {
  const int warp = threadIdx.x / 32 - 4;
  const int warpgroup = warp / 4;
  unsigned char* staged = stages + kStagedAt + warp * kStagedBytes;
  const auto release = [&](int stage) { release_stage<kClusterSize>(&barriers.empty[stage]); };

  PipelineState<kStages> state;
  float sum[kBlockN / 2];
  for (int i = first_item; i < end_item; ++i) {
    const BoxItem item = work.box_items[i];
#pragma unroll
    for (float& value : sum) value = 0.0f;
    int previous = -1;
    for (int k_iter = 0; k_iter < item.num_k_iters; ++k_iter) {
      wait(&barriers.full[state.stage], state.phase);
      const unsigned char* stage = stages + state.stage * kStageBytes;
      const uint64_t a = ptx::swizzled_128b_descriptor(stage + warpgroup * kChunkBytes);
      const uint64_t b =
          ptx::swizzled_128b_descriptor(stage + kChunksM * kChunkBytes, 1024, kChunkBytes);
      constexpr int kNext = 16 * kRowBytes / 16;  // 16 pixels further, in descriptor units
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kBlockK / 16; ++k)
        ptx::wgmma_m64k16<T, kBlockN, true, true>(sum, a + kNext * k, b + kNext * k, true);
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<1>();
      if (previous >= 0) release(previous);
      previous = state.stage;
      state.advance();
    }
    ptx::wgmma_wait_group<0>();
    if (previous >= 0) release(previous);
    store_sums<T>(sum, partial_sums, branches.branch[item.branch], shape, item,
                  rank * kBlockM + warp * 16, staged);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    dilated_conv2d_wgrad_sm90_kernel(float* partial_sums,  // [slots, kConvTileSm90, kConvTileSm90]
                                     const __grid_constant__ TensorMaps maps,
                                     const __grid_constant__ WgradBranches branches,
                                     const __grid_constant__ ConvWgradWork work,
                                     const __grid_constant__ ConvWgradShape shape) {
  if (ptx::kIsSm90a) {
    auto* stages = shared_memory<unsigned char>();
    Barriers& barriers = *reinterpret_cast<Barriers*>(stages + kBarriersAt);
    const int rank = ptx::cluster_ctarank();
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        ptx::mbarrier_init(&barriers.full[stage], 1);
        ptx::mbarrier_init(&barriers.empty[stage], kClusterSize * kConsumers * 4);
      }
      ptx::fence_mbarrier_init();
      ptx::prefetch_tensormap(&maps.grad_output);
      ptx::prefetch_tensormap(&maps.input);
    }
    ptx::cluster_arrive_relaxed();  // the fence makes the barriers visible
    ptx::cluster_wait();
    const int cluster = blockIdx.x / kClusterSize;
    const int first_item = work.first_items[cluster], end_item = work.first_items[cluster + 1];
    if (threadIdx.x < kWarpgroup) {
      ptx::setmaxnreg_dec<kProducerRegisters>();
      if (threadIdx.x < 32 && ptx::elect_sync())
        produce(maps, branches, work, first_item, end_item, rank, stages, barriers);
      __syncwarp();
    } else {
      ptx::setmaxnreg_inc<kConsumerRegisters>();
      consume<T>(partial_sums, branches, work, shape, first_item, end_item, rank, stages, barriers);
    }
  }
}

template <typename T>
Status launch_typed(float* partial_sums, const TensorMaps& maps, const WgradBranches& branches,
                    const ConvWgradWork& work, const ConvWgradShape& shape, void* stream) {
  const Status status =
      launch_with({kClusterSize}, "dilated_conv2d_wgrad_sm90_kernel",
                  dilated_conv2d_wgrad_sm90_kernel<T>, kClusterSize * work.num_ctas, kThreads,
                  kSmem, stream, partial_sums, maps, branches, work, shape);
  if (!status.ok()) return status;
  return launch_wgrad_reduce<T, kConvTileSm90>(partial_sums, branches, work, shape, stream);
}

// Encodes [N, H, W, channels] in boxes of work.box_* pixels x 64 channels.
Status encode_pixels(CUtensorMap* map, const void* tensor, int32_t channels,
                     const ConvWgradWork& work, const ConvWgradShape& shape) {
  const auto unsigned_32 = [](int32_t value) { return static_cast<uint32_t>(value); };
  const uint64_t C = unsigned_32(channels), W = unsigned_32(shape.W), H = unsigned_32(shape.H);
  return encode_tensor_map<4>(
      map, tensor, {C, W, H, unsigned_32(shape.N)}, {C * 2, W * C * 2, H * W * C * 2},
      {kChunk, unsigned_32(work.box_x), unsigned_32(work.box_y), unsigned_32(work.box_n)});
}

}  // namespace

Status dilated_conv2d_wgrad_sm90(float* partial_sums, const void* grad_output, const void* input,
                                 const std::vector<ConvWgradBranch>& branches,
                                 const ConvWgradWork& work, const ConvWgradShape& shape,
                                 DType dtype, void* stream) {
  constexpr const char* kName = "dilated_conv2d_wgrad_sm90";
  if (branches.size() > kMaxConvBranches) return {kName, "too many branches"};
  int32_t unaligned = shape.C | shape.out_channels;
  for (const ConvWgradBranch& branch : branches) unaligned |= branch.K | branch.first_channel;
  if (unaligned % 8 != 0) return {kName, "expected channels in multiples of 16 bytes"};
  if (work.box_x * work.box_y * work.box_n != kWgradBoxSm90)
    return {kName, "expected boxes of 32 pixels in the work list"};
  if (work.num_items == 0) return {};
  if (work.box_items == nullptr) return {kName, "expected the work list of this kernel"};
  WgradBranches params;
  std::copy(branches.begin(), branches.end(), params.branch);
  TensorMaps maps;
  Status status = encode_pixels(&maps.grad_output, grad_output, shape.out_channels, work, shape);
  if (status.ok()) status = encode_pixels(&maps.input, input, shape.C, work, shape);
  if (!status.ok()) return status;
  switch (dtype) {
    case DType::kFloat16:
      return launch_typed<__half>(partial_sums, maps, params, work, shape, stream);
    case DType::kBFloat16:
      return launch_typed<__nv_bfloat16>(partial_sums, maps, params, work, shape, stream);
    default:
      return {kName, "expected float16 or bfloat16"};
  }
}

}  // namespace deeplab_fast::cuda
