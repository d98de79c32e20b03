// dilated_conv2d_fwd for compute capability 9.0: what dilated_conv2d.cu computes, over the same
// work list, of 256 pixels by 256 output channels an item, in steps of one tap and 64 channels.
//
// Persistent clusters of two thread blocks, which share an item: each has 128 of the pixels. A
// warpgroup of producers gathers their channels with cp.async, which zero-fills what lies outside,
// and brings half of the weights, by bulk copy, to both blocks. Two warpgroups of consumers have 64
// pixels each: wgmma, sums in registers. Four stages, for each an mbarrier that it is full and one
// that both blocks have read it. Steps take all taps of 64 channels before the next 64, so that the
// taps find in L2 what the first of them read.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <climits>
#include <cstdint>

#include "../api.h"
#include "../common/zones.h"
#include "conv_epilogue.cuh"
#include "elements.cuh"
#include "launch.cuh"
#include "pipeline.cuh"
#include "ptx_sm90.cuh"
#include "tensor_map.cuh"

namespace deeplab_fast::cuda {
namespace {

constexpr int kBlockM = 128, kBlockN = 256, kBlockK = 64;  // of a thread block
constexpr int kBlocks = 2;                                 // of a cluster
constexpr int kStages = 4;
constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;  // warpgroups
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;

constexpr int kRowBytes = 128;  // of a stage, swizzled
constexpr int kInputBytes = kBlockM * kRowBytes, kWeightBytes = kBlockN * kRowBytes;
constexpr int kStageBytes = kInputBytes + kWeightBytes;

constexpr int kChunk = 8;                        // elements of a copy
constexpr int kChunks = kBlockK / kChunk;        // in a row
constexpr int kCopyRows = kWarpgroup / kChunks;  // that the producers copy at once
constexpr int kCopies = kBlockM / kCopyRows;     // of a thread, for a stage
constexpr int kLag = 2;                          // stages that cp.async has to arrive

// Of a warp of consumers: 16 rows of 64 sums at a time, on their way from registers to memory.
constexpr int kStagedCols = 64;
constexpr int kStagedSums = 16 * kStagedCols;

// 65536 are what an SM has, 168 a thread what the kernel starts with.
constexpr int kProducerRegisters = 88, kConsumerRegisters = 208;
static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536);
static_assert(kBlockM == kConsumers * 64, "a warpgroup multiplies 64 rows");
static_assert(kBlocks * kBlockM == kConvTileSm90 && kBlockN == kConvTileSm90 &&
                  kRowBytes == kConvStepBytesSm90,
              "the work list is made for these");

struct Barriers {
  uint64_t full[kStages], empty[kStages];
};

constexpr int kSumsAt = kStages * kStageBytes;
constexpr int kBarriersAt = kSumsAt + kConsumers * 4 * kStagedSums * int{sizeof(float)};
constexpr size_t kSmem = kBarriersAt + sizeof(Barriers);
static_assert(kSmem <= 227 * 1024, "what a block can have");

// Of the weights of each source.
struct TensorMaps {
  CUtensorMap of[kMaxConvBranches];
};

// For the first warpgroup: the stages of the worker's items.
template <typename T>
__device__ void produce(const T* input, const ConvOperands& operands, const TensorMaps& maps,
                        const ConvWork& work, const ConvShape& shape, int first_item, int end_item,
                        int rank, unsigned char* stages, Barriers& barriers) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int chunk = threadIdx.x % kChunks, first_row = threadIdx.x / kChunks;
  static_assert(kCopyRows % 8 == 0, "the rows of a thread are swizzled alike");
  unsigned char* first_copy = stages + first_row * kRowBytes + (chunk ^ first_row % 8) * 16;

  Place<kStages> place, filled;  // where the next copies go, and those that have not been announced
  int under_way = 0;    // stages between the two
  const auto announce = [&] {
    ptx::fence_proxy_async();
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&barriers.full[filled.stage]);
    filled.advance();
    --under_way;
  };

  for (int i = first_item; i < end_item; ++i) {
    const WorkItem item = work.items[i];
    const Tile tile = work.tiles[item.job];
    const Tap* taps = work.taps + tile.first_tap;
    const int first_k = item.block * kBlockN + rank * (kBlockN / kBlocks);
    int pixel[kCopies], y[kCopies], x[kCopies];
#pragma unroll
    for (int j = 0; j < kCopies; ++j) {
      const int row = rank * kBlockM + first_row + j * kCopyRows;
      const bool is_listed = row < tile.num_pixels;
      pixel[j] = is_listed ? work.pixels[tile.first_pixel + row] : 0;
      x[j] = pixel[j] % shape.W;
      y[j] = is_listed ? pixel[j] / shape.W % shape.H : INT_MIN;  // no tap gets inside from there
    }
    int next_tap = item.first_step % tile.num_taps;
    int next_c = item.first_step / tile.num_taps * kBlockK;
    Tap tap = taps[next_tap];
    for (int step = 0; step < item.num_steps; ++step) {
      uint64_t* full = &barriers.full[place.stage];
      wait(&barriers.empty[place.stage], place.parity ^ 1);
      if (warp == 0 && ptx::elect_sync()) {
        constexpr int kHalf = kWeightBytes / kBlocks;
        ptx::mbarrier_arrive_expect_tx(full, kWeightBytes);
        ptx::cp_async_bulk_tensor_multicast(
            stages + place.stage * kStageBytes + kInputBytes + rank * kHalf, &maps.of[tap.branch],
            full, {next_c, tap.index, first_k}, (1 << kBlocks) - 1);
      }
      const ConvSource& source = operands.sources[tap.branch];
      const int c = next_c + chunk * kChunk;
      const auto shift = static_cast<uint32_t>(tap.dy * shape.W + tap.dx);
#pragma unroll
      for (int j = 0; j < kCopies; ++j) {
        const bool has_input = c < source.C && is_inside(tap, y[j], x[j], shape.H, shape.W);
        const int64_t neighbour = static_cast<uint32_t>(pixel[j]) + shift;  // below 2^31, if inside
        const T* p = input + neighbour * shape.in_channels + source.first_channel + c;
        ptx::cp_async<16>(first_copy + place.stage * kStageBytes + j * kCopyRows * kRowBytes,
                          has_input ? p : input, has_input ? 16 : 0);
      }
      ptx::cp_async_commit_group();
      place.advance();
      ++under_way;
      if (under_way > kLag) {
        ptx::cp_async_wait_group<kLag>();
        announce();
      }
      if (++next_tap == tile.num_taps) {
        next_tap = 0;
        next_c += kBlockK;
      }
      tap = taps[next_tap];  // arrives while this thread waits
    }
  }
  ptx::cp_async_wait_all();
  while (under_way > 0) announce();
}

// Four sums of a row are in one place, so that the fragments of a warp go to all banks.
__device__ int staged_at(int row, int col) {
  return row * kStagedCols + (col / 4 ^ row % 8 * 2) * 4 + col % 4;
}

// Stores the sums of a warp, of 16 pixels from first_row of the tile on; a lane has the pixel of
// row lane % 16, or -1 past the end.
template <typename T>
__device__ void store_sums(const float (&sum)[kBlockN / 2], int pixel_of_lane, T* tensor,
                           float* partial_sums, const ConvEpilogue& terms, const ConvShape& shape,
                           const WorkItem& item, const ConvOutput& output, int first_row,
                           float* staged) {
  constexpr int kRowLanes = kStagedCols / 4;
  const int lane = threadIdx.x % 32, col = lane % kRowLanes * 4;
#pragma unroll
  for (int part = 0; part < kBlockN / kStagedCols; ++part) {
    const int tile_col = part * kStagedCols + col;
    const Epilogue<T> epilogue(tensor, terms, shape, output, item.block * kBlockN + tile_col);
    __syncwarp();  // what was staged before has been read
#pragma unroll
    for (int j = 0; j < kStagedCols / 8; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = part * kStagedCols / 2 + j * 4 + half * 2;
        const float pair[2] = {sum[at], sum[at + 1]};
        store(staged + staged_at(half * 8 + lane / 4, j * 8 + lane % 4 * 2), pair);
      }
    }
    __syncwarp();
#pragma unroll 2  // more is more code than there is cache for
    for (int row = lane / kRowLanes; row < 16; row += 32 / kRowLanes) {
      const int pixel = __shfl_sync(0xffffffffu, pixel_of_lane, row);
      if (pixel < 0 || epilogue.count <= 0) continue;
      float value[4];
      load(value, staged + staged_at(row, col));
      if (item.slot < 0) {
        epilogue.finish(pixel, value);
        epilogue.write(pixel, value);
      } else {
        const int64_t slot_row = static_cast<int64_t>(item.slot) * kConvTileSm90 + first_row + row;
        store(partial_sums + slot_row * kConvTileSm90 + tile_col, value);
      }
    }
  }
}

// For the other warpgroups: what the stages give.
template <typename T>
__device__ void consume(T* tensor, float* partial_sums, const ConvOperands& operands,
                        const ConvWork& work, const ConvEpilogue& terms, const ConvShape& shape,
                        int first_item, int end_item, int rank, unsigned char* stages,
                        Barriers& barriers) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 4;
  const int warpgroup = warp / 4;
  float* staged = reinterpret_cast<float*>(stages + kSumsAt) + warp * kStagedSums;
  const auto release = [&](int stage) {
    if (lane != 0) return;
    for (int block = 0; block < kBlocks; ++block)
      ptx::mbarrier_arrive_cluster(&barriers.empty[stage], block);
  };

  Place<kStages> place;
  float sum[kBlockN / 2];
  for (int i = first_item; i < end_item; ++i) {
    const WorkItem item = work.items[i];
    const Tile tile = work.tiles[item.job];
    const int first_row = rank * kBlockM + warp * 16;
    const int row = first_row + lane % 16;
    const int pixel = row < tile.num_pixels ? work.pixels[tile.first_pixel + row] : -1;
#pragma unroll
    for (float& value : sum) value = 0.0f;
    int previous = -1;
    for (int step = 0; step < item.num_steps; ++step) {
      wait(&barriers.full[place.stage], place.parity);
      const unsigned char* stage = stages + place.stage * kStageBytes;
      const uint64_t a = ptx::swizzled_128b_descriptor(stage + warpgroup * 64 * kRowBytes);
      const uint64_t b = ptx::swizzled_128b_descriptor(stage + kInputBytes);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kBlockK / 16; ++k)
        ptx::wgmma_m64k16<T, kBlockN>(sum, a + 2 * k, b + 2 * k, true);
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<1>();
      if (previous >= 0) release(previous);
      previous = place.stage;
      place.advance();
    }
    ptx::wgmma_wait_group<0>();
    if (previous >= 0) release(previous);
    store_sums(sum, pixel, tensor, partial_sums, terms, shape, item, operands.outputs[tile.output],
               first_row, staged);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    dilated_conv2d_fwd_sm90_kernel(T* tensor,            // [N, H, W, out_channels]
                                   float* partial_sums,  // [slots, kConvTileSm90, kConvTileSm90]
                                   const T* __restrict__ input,  // [N, H, W, in_channels]
                                   const __grid_constant__ ConvOperands operands,
                                   const __grid_constant__ TensorMaps maps,
                                   const __grid_constant__ ConvWork work,
                                   const __grid_constant__ ConvEpilogue terms,
                                   const __grid_constant__ ConvShape shape) {
  if (ptx::kIsSm90a) {
    auto* stages = shared_memory<unsigned char>();
    Barriers& barriers = *reinterpret_cast<Barriers*>(stages + kBarriersAt);
    const int rank = ptx::cluster_ctarank();
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        ptx::mbarrier_init(&barriers.full[stage], 4 + 1);  // warps that gather; who brings weights
        ptx::mbarrier_init(&barriers.empty[stage], kBlocks * kConsumers * 4);
      }
      ptx::fence_mbarrier_init();
    }
    ptx::cluster_arrive();
    ptx::cluster_wait();
    const int worker = blockIdx.x / kBlocks;
    const int first_item = work.first_items[worker], end_item = work.first_items[worker + 1];
    if (threadIdx.x < kWarpgroup) {
      ptx::setmaxnreg_dec<kProducerRegisters>();
      produce(input, operands, maps, work, shape, first_item, end_item, rank, stages, barriers);
    } else {
      ptx::setmaxnreg_inc<kConsumerRegisters>();
      consume(tensor, partial_sums, operands, work, terms, shape, first_item, end_item, rank,
              stages, barriers);
    }
    ptx::cluster_arrive();  // the other block may still have something for this one
    ptx::cluster_wait();
  }
}

// Weights [K, taps, C] of the source, as many taps as a row has room for, in boxes of half of a
// stage's rows. Of a single row the stride means nothing.
Status encode_weights(CUtensorMap* map, const ConvOutput& output, const ConvSource& source) {
  const auto unsigned_64 = [](int64_t value) { return static_cast<uint64_t>(value); };
  const int64_t row = output.K > 1 ? output.weight_stride : int64_t{source.C} << 16;
  const int64_t taps = std::max<int64_t>(1, (row - source.first_weight) / source.C);
  const char* address = static_cast<const char*>(output.weight) + int64_t{source.first_weight} * 2;
  return encode_tensor_map<3>(
      map, address, {unsigned_64(source.C), unsigned_64(taps), unsigned_64(output.K)},
      {unsigned_64(source.C) * 2, unsigned_64(row) * 2}, {kBlockK, 1, kBlockN / kBlocks});
}

template <typename T>
Status launch_typed(void* output, float* partial_sums, const void* input,
                    const ConvOperands& operands, const TensorMaps& maps, const ConvWork& work,
                    const ConvEpilogue& terms, const ConvShape& shape, void* stream) {
  auto* tensor = static_cast<T*>(output);
  const Status status = launch_clusters(
      "dilated_conv2d_fwd_sm90_kernel", dilated_conv2d_fwd_sm90_kernel<T>,
      kBlocks * work.num_workers, kThreads, kBlocks, kSmem, stream, tensor, partial_sums,
      static_cast<const T*>(input), operands, maps, work, terms, shape);
  if (!status.ok()) return status;
  return launch_reduce<kConvTileSm90, kConvTileSm90>(tensor, partial_sums, operands, work, terms,
                                                     shape, stream);
}

}  // namespace

Status dilated_conv2d_fwd_sm90(void* output, float* partial_sums, const void* input,
                               const std::vector<ConvOutput>& outputs,
                               const std::vector<ConvSource>& sources, const ConvWork& work,
                               const ConvEpilogue& epilogue, const ConvShape& shape, DType dtype,
                               void* stream) {
  constexpr const char* kName = "dilated_conv2d_fwd_sm90";
  if (std::max(outputs.size(), sources.size()) > kMaxConvBranches)
    return {kName, "too many branches"};
  if (outputs.size() != 1 && outputs.size() != sources.size())
    return {kName, "sources must be those of one output, or one of each"};
  if (work.num_items == 0) return {};
  int64_t unaligned = shape.in_channels;
  for (const ConvSource& s : sources) unaligned |= s.C | s.first_channel | s.first_weight;
  for (const ConvOutput& o : outputs) unaligned |= o.weight_stride;
  if (unaligned % kChunk != 0) return {kName, "input channels must be a multiple of 16 bytes"};
  ConvOperands operands{};
  std::copy(outputs.begin(), outputs.end(), operands.outputs);
  std::copy(sources.begin(), sources.end(), operands.sources);
  TensorMaps maps;
  for (size_t i = 0; i < sources.size(); ++i) {
    const Status status =
        encode_weights(&maps.of[i], outputs[outputs.size() == 1 ? 0 : i], sources[i]);
    if (!status.ok()) return status;
  }
  switch (dtype) {
    case DType::kFloat16:
      return launch_typed<__half>(output, partial_sums, input, operands, maps, work, epilogue,
                                  shape, stream);
    case DType::kBFloat16:
      return launch_typed<__nv_bfloat16>(output, partial_sums, input, operands, maps, work,
                                         epilogue, shape, stream);
    default:
      return {kName, "input must be float16 or bfloat16"};
  }
}

}  // namespace deeplab_fast::cuda
