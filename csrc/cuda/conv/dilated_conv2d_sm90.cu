// output = dilated_conv2d(input) as in dilated_conv2d.cu, for compute capability 9.0 with wgmma.
//
// An output tile is 256 pixels x 256 output channels, a k-iteration one tap x 64 input channels;
// all taps of 64 channels come before the next 64, so that later taps find their pixels in L2.
// Persistent clusters of two CTAs share a work item, 128 pixels each. One warpgroup of producers
// gathers input channels with cp.async, which zero-fills pixels outside the map, and copies half of
// the weights to both CTAs. Two warpgroups of consumers multiply 64 pixels each with wgmma,
// accumulating in registers. Four stages (pipeline.cuh). In a 1x1 convolution, which gathers each
// pixel once, the producers can also sum the pixels of each image.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "api.h"
#include "cuda/common/elements.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pairs.cuh"
#include "cuda/common/pipeline.cuh"
#include "cuda/common/ptx_sm90.cuh"
#include "cuda/common/tensor_map.cuh"
#include "cuda/conv/conv_epilogue.cuh"
#include "cuda/conv/warp_rows.cuh"
#include "schedule/work_list.h"

namespace deeplab_fast::cuda {
namespace {

constexpr int kBlockM = 128, kBlockN = 256, kBlockK = 64;  // per CTA
constexpr int kClusterSize = 2;                            // CTAs
constexpr int kStages = 4;
constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;  // warpgroups
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;

constexpr int kRowBytes = 128;  // per row of a stage, swizzled
constexpr int kInputBytes = kBlockM * kRowBytes, kWeightBytes = kBlockN * kRowBytes;
constexpr int kStageBytes = kInputBytes + kWeightBytes;

constexpr int kChunk = 8;                        // elements per copy
constexpr int kChunks = kBlockK / kChunk;        // copies per row
constexpr int kCopyRows = kWarpgroup / kChunks;  // rows that the producers copy at once
constexpr int kCopies = kBlockM / kCopyRows;     // copies per thread and stage
constexpr int kMaxInFlight = 2;                  // k-iterations whose copies are in flight

// setmaxnreg redistributes the registers of the launch, 168 per thread.
constexpr int kLaunchRegisters = 168, kProducerRegisters = 104, kConsumerRegisters = 200;
static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <=
                  kLaunchRegisters * kThreads,
              "or setmaxnreg would wait forever");
static_assert(kBlockM == kConsumers * 64, "a warpgroup multiplies 64 rows");
static_assert(kClusterSize * kBlockM == kConvTileSm90 && kBlockN == kConvTileSm90 &&
                  kRowBytes == kConvKIterBytesSm90,
              "the work list assumes this output tile and k-iteration");
static_assert(kBlockM == kConvSumRun && kWarpgroup == kConvSumParts * 32,
              "a warp writes one row of pixel sums");

// How the pixels of a stage arrive at its full barrier, and who orders them before wgmma. Both
// forms are kept until one has been measured to be faster on a GPU.
enum class Arrival {
  kThread,  // a producer waits for its copies, fences them and arrives
  kCopies,  // the copies arrive by themselves; consumers fence after their wait
};

using Barriers = PipelineBarriers<kStages>;

constexpr int kStagedAt = kStages * kStageBytes;  // rows of each warp, staged for stores
constexpr int kBarriersAt = kStagedAt + kConsumers * 4 * kStagedBytes;
constexpr size_t kSmem = kBarriersAt + sizeof(Barriers);
static_assert(kSmem <= 227 * 1024, "shared memory per CTA");

struct TensorMaps {
  CUtensorMap weights[kMaxConvBranches];  // of each source
};

// Sums the pixels that a warp has gathered in a stage, one row of `sums` per warp and image. The
// CTA's pixels are first to end - 1, in images from first_image on; rows past the end are skipped.
template <typename T>
__device__ void sum_pixels(float* sums, const unsigned char* first_copy, int first, int end,
                           int first_image, int c, int C, const ConvShape& shape) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_row = threadIdx.x / kChunks, plane = shape.H * shape.W;
  for (int image = first_image; image * plane < end; ++image) {
    if (image * plane + plane <= first) continue;
    float sum[kChunk] = {};
#pragma unroll
    for (int j = 0; j < kCopies; ++j) {
      const int pixel = first + first_row + j * kCopyRows - image * plane;
      float value[kChunk] = {};
      if (pixel >= 0 && pixel < plane)
        load(value, reinterpret_cast<const T*>(first_copy + j * kCopyRows * kRowBytes));
#pragma unroll
      for (int i = 0; i < kChunk; ++i) sum[i] += value[i];
    }
#pragma unroll
    for (int distance = kChunks; distance < 32; distance *= 2) {
#pragma unroll
      for (float& value : sum) value += __shfl_xor_sync(0xffffffffu, value, distance);
    }
    const int64_t row = int64_t{first / kBlockM + image} * kConvSumParts + warp;
    if (lane < kChunks && c < C) store(sums + row * C + c, sum);
  }
}

// Producer warpgroup: fills the stages for the work items of the cluster.
template <typename T, Arrival kArrival>
__device__ void produce(const T* input, const ConvOperands& operands, const TensorMaps& maps,
                        const ConvWork& work, const ConvShape& shape, int first_item, int end_item,
                        int rank, unsigned char* stages, Barriers& barriers) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int chunk = threadIdx.x % kChunks, first_row = threadIdx.x / kChunks;
  static_assert(kCopyRows % 8 == 0, "the rows of a thread have the same swizzle");
  unsigned char* first_copy = stages + first_row * kRowBytes + (chunk ^ first_row % 8) * 16;

  PipelineState<kStages> state;  // stage of the next copies
  for (int i = first_item; i < end_item; ++i) {
    const TileItem item = work.tile_items[i];
    const int num_rows = item.num_pixels - rank * kBlockM;  // of this CTA; may be negative
    const ListedPixel* listed = work.listed_pixels + item.first_pixel;
    const Tap* taps = work.taps + item.first_tap;
    int next_tap = item.tap, next_c = item.c;
    ListedPixel pixel[kCopies];
    // Rows past the end repeat the last pixel; their sums are not stored. All loads are issued at
    // once.
#pragma unroll
    for (int j = 0; j < kCopies; ++j)
      pixel[j] = listed[min(rank * kBlockM + first_row + j * kCopyRows, item.num_pixels - 1)];
    Tap tap = taps[next_tap];
    int y[kCopies], x[kCopies];
#pragma unroll
    for (int j = 0; j < kCopies; ++j) {
      y[j] = pixel[j].yx >> 16;
      x[j] = pixel[j].yx & 0xffff;
    }
    float* sums = item.block == 0 ? operands.outputs[item.output].pixel_sums : nullptr;
    if (i == first_item) ptx::griddepcontrol_wait();  // the previous kernel may write input

    // A thread waits for its copies kMaxInFlight rounds later, so extra rounds follow the last
    // k-iteration.
    const bool waits = kArrival == Arrival::kThread || sums != nullptr;
    const int num_rounds = item.num_k_iters + (waits ? kMaxInFlight : 0);
    PipelineState<kStages> in_flight = state;  // stage of the oldest copies in flight
    for (int round = 0; round < num_rounds; ++round) {
      if (waits && round >= kMaxInFlight) {
        ptx::cp_async_wait_group<kMaxInFlight - 1>();
        if (sums != nullptr) {
          const int first = item.first_index + rank * kBlockM;
          sum_pixels<T>(sums, first_copy + in_flight.stage * kStageBytes, first,
                        first + min(num_rows, kBlockM), item.first_image,
                        item.c + (round - kMaxInFlight) * kBlockK + chunk * kChunk,
                        operands.sources[tap.branch].C, shape);
        }
        if constexpr (kArrival == Arrival::kThread) {
          ptx::fence_proxy_async();
          __syncwarp();
          if (lane == 0) ptx::mbarrier_arrive(&barriers.full[in_flight.stage]);
        }
        in_flight.advance();
      }
      if (round < item.num_k_iters) {
        uint64_t* full = &barriers.full[state.stage];
        wait(&barriers.empty[state.stage], state.phase ^ 1);
        if (warp == 0 && ptx::elect_sync()) {
          constexpr int kHalf = kWeightBytes / kClusterSize;
          ptx::mbarrier_arrive_expect_tx(full, kWeightBytes);
          ptx::cp_async_bulk_tensor_multicast(
              stages + state.stage * kStageBytes + kInputBytes + rank * kHalf,
              &maps.weights[tap.branch], full,
              {next_c, tap.index, item.block * kBlockN + rank * (kBlockN / kClusterSize)},
              (1 << kClusterSize) - 1);
        }
        // With rows = 0 no pixel is inside: a thread past the last channel copies only zeros.
        const ConvSource& source = operands.sources[tap.branch];
        const int c = next_c + chunk * kChunk, rows = c < source.C ? shape.H : 0;
        const T* channels = input + source.first_channel + (c < source.C ? c : 0);
        const auto shift = static_cast<uint32_t>(tap.dy * shape.W + tap.dx);
#pragma unroll
        for (int j = 0; j < kCopies; ++j) {
          const bool has_input = is_inside(tap, y[j], x[j], rows, shape.W);
          const uint32_t input_pixel = has_input ? pixel[j].index + shift : 0;
          const T* p = channels + uint64_t{input_pixel} * static_cast<uint32_t>(shape.in_channels);
          ptx::cp_async(first_copy + state.stage * kStageBytes + j * kCopyRows * kRowBytes, p,
                        has_input ? 16 : 0);
        }
        if constexpr (kArrival == Arrival::kCopies) ptx::cp_async_mbarrier_arrive_noinc(full);
        state.advance();
        if (++next_tap == item.num_taps) {
          next_tap = 0;
          next_c += kBlockK;
        }
        tap = taps[next_tap];  // loaded while this thread waits
      }
      if (waits) ptx::cp_async_commit_group();  // empty after the last k-iteration
    }
  }
  wait_for_readers(state, barriers.empty);
}

// Loads a lane's share of the bias: channels 8 j + 2 (lane % 4) and the next, for all j that are
// lane / 4 modulo 8.
template <typename T>
__device__ void load_bias(Pair<T> (&bias)[kBlockN / 64], const ConvOutput& output, int first_k) {
  const int lane = threadIdx.x % 32;
  const T* p = static_cast<const T*>(output.bias);
#pragma unroll
  for (int i = 0; i < kBlockN / 64; ++i) {
    const int k = first_k + (i * 8 + lane / 4) * 8 + lane % 4 * 2;
    bias[i] = {};
    if (p != nullptr && k < output.K) bias[i].x = p[k];
    if (p != nullptr && k + 1 < output.K) bias[i].y = p[k + 1];
  }
}

// Adds p[0] and p[1] to the sums, or only the first `count` of them if fewer.
template <bool kIsVector, typename U>
__device__ void add_two(float* sum, const U* p, int count) {
  if constexpr (kIsVector) {
    float value[2] = {};
    if (count > 0) load(value, p);
    sum[0] += value[0];
    sum[1] += value[1];
  } else {
    if (count > 0) sum[0] += to_float(p[0]);
    if (count > 1) sum[1] += to_float(p[1]);
  }
}

// Epilogue of a warp's wgmma accumulators: adds biases and residual, clamps, and stores 16 pixels x
// kBlockN channels from first_k on. pixel_of_lane is the pixel of row lane % 16, or -1 past the
// end. kIsVector: rows of the output consist of whole vectors of 16 bytes.
template <bool kIsVector, typename T>
__device__ void finish(float (&sum)[kBlockN / 2], T* tensor, const Pair<T> (&bias)[kBlockN / 64],
                       const ConvOutput& output, const ConvEpilogue& params, const ConvShape& shape,
                       int pixel_of_lane, int first_k, unsigned char* staged) {
  const int lane = threadIdx.x % 32, col = lane % 4 * 2;
  const int first_channel = output.first_channel + first_k;
  const int count = output.K - first_k;  // remaining channels; may exceed kBlockN
  int pixel[2];                          // of the two rows whose sums this lane holds
  const float* image_bias[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    pixel[half] = __shfl_sync(0xffffffffu, pixel_of_lane, half * 8 + lane / 4);
    image_bias[half] = output.image_bias;
    if (output.image_bias != nullptr)
      image_bias[half] += int64_t{max(pixel[half], 0) / (shape.H * shape.W)} * output.K + first_k;
  }
  const auto row_of = [&](auto* elements, int row_pixel, int k) {
    // An unsigned 32 x 32 -> 64-bit product is one instruction; int * int64_t is not.
    return elements + (first_channel + k) +
           uint64_t{static_cast<uint32_t>(row_pixel)} * static_cast<uint32_t>(shape.out_channels);
  };
  Pair<T> low, high;  // 0, 6 or infinite: exact in 16 bits, so rounding before clamping is safe
  round_to(low, params.low, params.low);
  round_to(high, params.high, params.high);

#pragma unroll
  for (int part = 0; part < kBlockN; part += kStagedCols) {
    float* part_sum = sum + part / 2;
    if (output.bias != nullptr) {
#pragma unroll
      for (int j = 0; j < kStagedCols / 8; ++j) {
        const Pair<T> lane_bias = bias[part / 64 + j / 8];
        const uint32_t bits = __shfl_sync(0xffffffffu, bits_of(lane_bias), j % 8 * 4 + lane % 4);
        const float2 added = to_floats(pair_of<T>(bits));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          part_sum[j * 4 + half * 2] += added.x;
          part_sum[j * 4 + half * 2 + 1] += added.y;
        }
      }
    }
    if (output.image_bias != nullptr) {
#pragma unroll
      for (int i = 0; i < kStagedCols / 4; ++i) {
        const int k = part + i / 2 * 8 + col;
        add_two<kIsVector>(part_sum + i * 2, image_bias[i % 2] + k, count - k);
      }
    }
    if (params.residual != nullptr) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (pixel[half] < 0) continue;
        const T* residual = row_of(static_cast<const T*>(params.residual), pixel[half], col);
#pragma unroll
        for (int j = 0; j < kStagedCols / 8; ++j) {
          const int k = part + j * 8;
          add_two<kIsVector>(part_sum + j * 4 + half * 2, residual + k, count - k - col);
        }
      }
    }
    // If the residual is the output, lanes overwrite what others have read: those reads are done.
    store_rows<T>(
        staged,
        [&](int j, int half) {
          Pair<T> pair;
          round_to(pair, part_sum[j * 4 + half * 2], part_sum[j * 4 + half * 2 + 1]);
          return bits_of(clamp_pair(pair, low, high));
        },
        [&](int row, int k, const Chunk<T>& chunk) {
          const int row_pixel = __shfl_sync(0xffffffffu, pixel_of_lane, row);
          if (row_pixel < 0) return;
          T* p = row_of(tensor, row_pixel, k) + part;
          if constexpr (kIsVector) {
            if (part + k < count) *reinterpret_cast<Chunk<T>*>(p) = chunk;
          } else {
#pragma unroll
            for (int i = 0; i < 8; ++i)
              if (part + k + i < count) p[i] = chunk.element[i];
          }
        });
  }
}

// Consumer warpgroups: multiply the stages and store the sums of each work item.
template <typename T, Arrival kArrival>
__device__ void consume(T* tensor, float* partial_sums, const ConvOperands& operands,
                        const ConvWork& work, const ConvEpilogue& params, const ConvShape& shape,
                        int first_item, int end_item, int rank, unsigned char* stages,
                        Barriers& barriers) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 4;
  const int warpgroup = warp / 4;
  unsigned char* staged = stages + kStagedAt + warp * kStagedBytes;
  const auto release = [&](int stage) { release_stage<kClusterSize>(&barriers.empty[stage]); };

  PipelineState<kStages> state;
  float sum[kBlockN / 2];
  for (int i = first_item; i < end_item; ++i) {
    const TileItem item = work.tile_items[i];
    const ConvOutput& output = operands.outputs[item.output];
    const int first_row = rank * kBlockM + warp * 16, row = first_row + lane % 16;
    const int last_row = item.num_pixels - 1;
    const int pixel = work.listed_pixels[item.first_pixel + min(row, last_row)].index;
    const int pixel_of_lane = row <= last_row ? pixel : -1, first_k = item.block * kBlockN;
    if (i == first_item) ptx::griddepcontrol_wait();  // the previous kernel may write biases
    Pair<T> bias[kBlockN / 64];
    load_bias<T>(bias, output, first_k);
#pragma unroll
    for (float& value : sum) value = 0.0f;
    int previous = -1;
    for (int k_iter = 0; k_iter < item.num_k_iters; ++k_iter) {
      wait(&barriers.full[state.stage], state.phase);
      if constexpr (kArrival == Arrival::kCopies) ptx::fence_proxy_async();
      const unsigned char* stage = stages + state.stage * kStageBytes;
      const uint64_t a = ptx::swizzled_128b_descriptor(stage + warpgroup * 64 * kRowBytes);
      const uint64_t b = ptx::swizzled_128b_descriptor(stage + kInputBytes);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kBlockK / 16; ++k)
        ptx::wgmma_m64k16<T, kBlockN>(sum, a + 2 * k, b + 2 * k, true);
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<1>();
      if (previous >= 0) release(previous);
      previous = state.stage;
      state.advance();
    }
    ptx::wgmma_wait_group<0>();
    if (previous >= 0) release(previous);
    const bool is_vector = (output.K | output.first_channel | shape.out_channels) % 8 == 0;
    if (item.slot >= 0) {
      store_partial_sums<kConvTileSm90>(sum, partial_sums, item.slot, first_row);
    } else if (is_vector) {
      finish<true>(sum, tensor, bias, output, params, shape, pixel_of_lane, first_k, staged);
    } else {
      finish<false>(sum, tensor, bias, output, params, shape, pixel_of_lane, first_k, staged);
    }
  }
}

template <typename T, Arrival kArrival>
__global__ void __launch_bounds__(kThreads, 1)
    dilated_conv2d_fwd_sm90_kernel(T* tensor,            // [N, H, W, out_channels]
                                   float* partial_sums,  // [slots, kConvTileSm90, kConvTileSm90]
                                   const T* input,       // [N, H, W, in_channels]
                                   const __grid_constant__ ConvOperands operands,
                                   const __grid_constant__ TensorMaps maps,
                                   const __grid_constant__ ConvWork work,
                                   const __grid_constant__ ConvEpilogue params,
                                   const __grid_constant__ ConvShape shape) {
  if (ptx::kIsSm90a) {
    ptx::griddepcontrol_launch_dependents();
    auto* stages = shared_memory<unsigned char>();
    Barriers& barriers = *reinterpret_cast<Barriers*>(stages + kBarriersAt);
    const int rank = ptx::cluster_ctarank();
    if (threadIdx.x == 0) {
      constexpr int kArrivals = kArrival == Arrival::kThread ? 4 : kWarpgroup;  // warps or threads
      for (int stage = 0; stage < kStages; ++stage) {
        ptx::mbarrier_init(&barriers.full[stage], kArrivals + 1);  // 1 for the weights
        ptx::mbarrier_init(&barriers.empty[stage], kClusterSize * kConsumers * 4);
      }
      ptx::fence_mbarrier_init();
      for (int i = 0; i < operands.num_sources; ++i) ptx::prefetch_tensormap(&maps.weights[i]);
    }
    ptx::cluster_arrive_relaxed();  // the fence makes the barriers visible
    ptx::cluster_wait();
    const int cluster = blockIdx.x / kClusterSize;
    const int first_item = work.first_items[cluster], end_item = work.first_items[cluster + 1];
    if (threadIdx.x < kWarpgroup) {
      ptx::setmaxnreg_dec<kProducerRegisters>();
      produce<T, kArrival>(input, operands, maps, work, shape, first_item, end_item, rank, stages,
                           barriers);
    } else {
      ptx::setmaxnreg_inc<kConsumerRegisters>();
      consume<T, kArrival>(tensor, partial_sums, operands, work, params, shape, first_item,
                           end_item, rank, stages, barriers);
    }
  }
}

// Encodes the weights [K, taps, C] of a source, with as many taps as fit a row, in boxes of half of
// a stage's rows. With one row or one tap the stride is unused, but must be a multiple of 16 bytes
// and no larger than the next stride.
Status encode_weights(CUtensorMap* map, const ConvOutput& output, const ConvSource& source) {
  const auto unsigned_64 = [](int64_t value) { return static_cast<uint64_t>(value); };
  const int64_t row = output.K > 1 ? output.weight_stride : int64_t{source.C} << 16;
  const int64_t taps = std::max<int64_t>(1, (row - source.first_weight) / source.C);
  const char* address = static_cast<const char*>(output.weight) + int64_t{source.first_weight} * 2;
  return cached_tensor_map<3>(map, address,
                              {unsigned_64(source.C), unsigned_64(taps), unsigned_64(output.K)},
                              {unsigned_64(taps > 1 ? source.C : row) * 2, unsigned_64(row) * 2},
                              {kBlockK, 1, kBlockN / kClusterSize});
}

std::atomic<bool> copies_arrive{false};

template <typename T>
Status launch_typed(void* output, float* partial_sums, const void* input,
                    const ConvOperands& operands, const TensorMaps& maps, const ConvWork& work,
                    const ConvEpilogue& params, const ConvShape& shape, void* stream) {
  auto* tensor = static_cast<T*>(output);
  const Status status =
      launch_with({kClusterSize, /*overlaps=*/true}, "dilated_conv2d_fwd_sm90_kernel",
                  copies_arrive ? dilated_conv2d_fwd_sm90_kernel<T, Arrival::kCopies>
                                : dilated_conv2d_fwd_sm90_kernel<T, Arrival::kThread>,
                  kClusterSize * work.num_ctas, kThreads, kSmem, stream, tensor, partial_sums,
                  static_cast<const T*>(input), operands, maps, work, params, shape);
  if (!status.ok()) return status;
  return launch_reduce<kConvTileSm90, kConvTileSm90>({1, /*overlaps=*/true}, tensor, partial_sums,
                                                     operands, work, params, shape, stream);
}

}  // namespace

bool set_copies_arrive(bool value) { return copies_arrive.exchange(value); }

Status dilated_conv2d_fwd_sm90(void* output, float* partial_sums, const void* input,
                               const std::vector<ConvOutput>& outputs,
                               const std::vector<ConvSource>& sources, const ConvWork& work,
                               const ConvEpilogue& epilogue, const ConvShape& shape, DType dtype,
                               void* stream) {
  constexpr const char* kName = "dilated_conv2d_fwd_sm90";
  if (std::max(outputs.size(), sources.size()) > kMaxConvBranches)
    return {kName, "too many branches"};
  if (outputs.size() != 1 && outputs.size() != sources.size())
    return {kName, "expected one output, or one source per output"};
  if (work.num_items == 0) return {};
  int64_t unaligned = shape.in_channels;
  for (const ConvSource& s : sources) unaligned |= s.C | s.first_channel | s.first_weight;
  for (const ConvOutput& o : outputs)
    if (o.K > 1) unaligned |= o.weight_stride;
  if (unaligned % kChunk != 0) return {kName, "expected input channels in multiples of 16 bytes"};
  if (work.tile_items == nullptr || work.listed_pixels == nullptr)
    return {kName, "expected the work list of this kernel"};
  ConvOperands operands{};
  operands.num_sources = static_cast<int>(sources.size());
  std::copy(outputs.begin(), outputs.end(), operands.outputs);
  std::copy(sources.begin(), sources.end(), operands.sources);
  TensorMaps maps;
  for (size_t i = 0; i < sources.size(); ++i) {
    const Status status =
        encode_weights(&maps.weights[i], outputs[outputs.size() == 1 ? 0 : i], sources[i]);
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
      return {kName, "expected float16 or bfloat16"};
  }
}

}  // namespace deeplab_fast::cuda
