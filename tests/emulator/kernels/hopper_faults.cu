// Kernels for sm_90a that are wrong on purpose, each with a correct version, as in faults.cu. in is
// [kSteps, 64]. All compute out[i] = in[0][63 - i], except that those whose name begins with sum_
// add the steps up.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "cuda/common/launch.cuh"
#include "cuda/common/ptx_sm90.cuh"
#include "cuda/common/tensor_map.cuh"

namespace {

using deeplab_fast::Status;
using deeplab_fast::cuda::launch_with;
using deeplab_fast::cuda::shared_memory;
namespace ptx = deeplab_fast::ptx;

constexpr int kTile = 64;  // floats, two rows of 128 bytes
constexpr int kSteps = 6;
constexpr int kTileBytes = kTile * 4;
constexpr int kStage = 1024 / 4;  // floats from tile to tile

// Offset of float i of a tile after a copy has swizzled it.
int swizzled(int i) { return i / 32 * 32 + (i / 4 % 8 ^ i / 32) * 4 + i % 4; }

void wait(uint64_t* barrier, int parity) {
  while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
}

// The mbarriers, behind the stages.
uint64_t* barriers() { return shared_memory<uint64_t>() + 4096 / 8; }

void init(uint64_t* barrier, int count) {
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, count);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
}

void copy(float* tile, const CUtensorMap& map, uint64_t* barrier, int step,
          int bytes = kTileBytes) {
  ptx::mbarrier_arrive_expect_tx(barrier, bytes);
  ptx::cp_async_bulk_tensor(tile, &map, barrier, {0, 0, 0, step});
}

void write_reversed(float* out, const float* tile) {
  if (threadIdx.x < kTile) out[threadIdx.x] = tile[swizzled(kTile - 1 - threadIdx.x)];
}

template <bool kFault>
__global__ void copy_wait_kernel(float* out, const float*,
                                 const __grid_constant__ CUtensorMap map) {
  float* tile = shared_memory<float>();
  init(barriers(), 1);
  if (threadIdx.x == 0) copy(tile, map, barriers(), 0);
  if (!kFault) wait(barriers(), 0);
  write_reversed(out, tile);
  wait(barriers(), 0);
}

// The fault: one try, which may time out.
template <bool kFault>
__global__ void try_once_kernel(float* out, const float*, const __grid_constant__ CUtensorMap map) {
  float* tile = shared_memory<float>();
  init(barriers(), 1);
  if (threadIdx.x == 0) copy(tile, map, barriers(), 0);
  if (kFault) {
    ptx::mbarrier_try_wait_parity(barriers(), 0);
  } else {
    wait(barriers(), 0);
  }
  write_reversed(out, tile);
  wait(barriers(), 0);
}

// The fault: waits for the previous phase, which is complete.
template <bool kFault>
__global__ void parity_kernel(float* out, const float*, const __grid_constant__ CUtensorMap map) {
  float* tile = shared_memory<float>();
  init(barriers(), 1);
  if (threadIdx.x == 0) copy(tile, map, barriers(), 0);
  wait(barriers(), kFault ? 1 : 0);
  write_reversed(out, tile);
  wait(barriers(), 0);
}

// The fault: no fence makes the initialised mbarrier visible to the copy.
template <bool kFault>
__global__ void init_fence_kernel(float* out, const float*,
                                  const __grid_constant__ CUtensorMap map) {
  float* tile = shared_memory<float>();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barriers(), 1);
    if (!kFault) ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) copy(tile, map, barriers(), 0);
  wait(barriers(), 0);
  write_reversed(out, tile);
}

// The fault: threads wait at an mbarrier that may not be initialised yet.
template <bool kFault>
__global__ void init_sync_kernel(float* out, const float*,
                                 const __grid_constant__ CUtensorMap map) {
  float* tile = shared_memory<float>();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barriers(), 1);
    ptx::fence_mbarrier_init();
    copy(tile, map, barriers(), 0);
  }
  if (!kFault) __syncthreads();
  wait(barriers(), 0);
  write_reversed(out, tile);
}

template <bool kFault>
__global__ void expects_more_kernel(float* out, const float*,
                                    const __grid_constant__ CUtensorMap map) {
  float* tile = shared_memory<float>();
  init(barriers(), 1);
  if (threadIdx.x == 0) copy(tile, map, barriers(), 0, kTileBytes + (kFault ? 16 : 0));
  wait(barriers(), 0);
  write_reversed(out, tile);
}

template <bool kFault>
__global__ void expects_less_kernel(float* out, const float*,
                                    const __grid_constant__ CUtensorMap map) {
  float* tile = shared_memory<float>();
  init(barriers(), 1);
  if (threadIdx.x == 0) copy(tile, map, barriers(), 0, kTileBytes - (kFault ? 16 : 0));
  wait(barriers(), 0);
  write_reversed(out, tile);
}

// The fault: one arrival too many, before the copy has completed the phase.
template <bool kFault>
__global__ void arrivals_kernel(float* out, const float*, const __grid_constant__ CUtensorMap map) {
  float* tile = shared_memory<float>();
  init(barriers(), 2);
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive(barriers());
    ptx::mbarrier_arrive_expect_tx(barriers(), kTileBytes);
    if (kFault) ptx::mbarrier_arrive(barriers());
    ptx::cp_async_bulk_tensor(tile, &map, barriers(), {0, 0, 0, 0});
  }
  wait(barriers(), 0);
  write_reversed(out, tile);
}

template <bool kFault>
__global__ void unaligned_copy_kernel(float* out, const float*,
                                      const __grid_constant__ CUtensorMap map) {
  float* tile = shared_memory<float>() + (kFault ? 4 : 0);
  init(barriers(), 1);
  if (threadIdx.x == 0) copy(tile, map, barriers(), 0);
  wait(barriers(), 0);
  write_reversed(out, tile);
}

// The fault: no thread waits for the copy.
template <bool kFault>
__global__ void copy_never_waited_kernel(float* out, const float*,
                                         const __grid_constant__ CUtensorMap map) {
  float* tile = shared_memory<float>();
  init(barriers(), 1);
  if (threadIdx.x == 0) copy(tile, map, barriers(), 0);
  wait(barriers(), 0);
  write_reversed(out, tile);
  __syncthreads();
  if (threadIdx.x == 0) copy(tile, map, barriers(), 1);
  if (!kFault) wait(barriers(), 1);
}

// One thread fills two stages and 64 read them. The fault: it does not wait until a stage was read.
template <bool kFault>
__global__ void sum_refill_kernel(float* out, const float*,
                                  const __grid_constant__ CUtensorMap map) {
  float* stages = shared_memory<float>();
  uint64_t *full = barriers(), *empty = full + 2;
  for (int i = 0; i < 2; ++i) {
    init(&full[i], 1);
    init(&empty[i], kTile);
  }
  if (threadIdx.x == kTile) {
    for (int step = 0; step < kSteps; ++step) {
      if (!kFault) wait(&empty[step % 2], step / 2 % 2 ^ 1);
      copy(stages + step % 2 * kStage, map, &full[step % 2], step);
      if (kFault) wait(&full[step % 2], step / 2 % 2);
    }
  } else if (threadIdx.x < kTile) {
    float sum = 0.0f;
    for (int step = 0; step < kSteps; ++step) {
      wait(&full[step % 2], step / 2 % 2);
      sum += stages[step % 2 * kStage + swizzled(kTile - 1 - threadIdx.x)];
      ptx::mbarrier_arrive(&empty[step % 2]);
    }
    out[threadIdx.x] = sum;
  }
}

// Products. Column key(m) of a [64, 16] has in[step][63 - m]; b [16, 256] brings column key(m) of a
// to column 3 - m % 4 of the sums. So rows of a can be four floats that a copy of 16 bytes brings,
// of which each is a zero and the same float in bf16.

constexpr int kN = 256;
constexpr int kStageA = 64 * 64;  // elements: rows of 128 bytes, of which 32 are used
constexpr int kProductSmem = (2 * kStageA + kN * 64) * 2;

__nv_bfloat16* matrix_b() { return shared_memory<__nv_bfloat16>() + 2 * kStageA; }

// Offset of an element of a matrix with rows of 128 bytes, swizzled.
int element(int row, int k) { return row * 64 + (k / 8 ^ row % 8) * 8 + k % 8; }

int key(int m) { return 2 * (3 - m % 4) + 1; }

// The four floats with in[63 - m].
const float* row_of(const float* in, int m) { return in + (63 - m) / 4 * 4; }

void store_b() {
  for (int i = threadIdx.x; i < kN * 16; i += 128)
    matrix_b()[element(i / 16, i % 16)] =
        __float2bfloat16(i % 16 == 2 * (i / 16) + 1 ? 1.0f : 0.0f);
}

void store_a(__nv_bfloat16* a, const float* in) {
  for (int i = threadIdx.x; i < 64 * 16; i += 128)
    a[element(i / 16, i % 16)] = __float2bfloat16(i % 16 == key(i / 16) ? in[63 - i / 16] : 0.0f);
}

void multiply(float (&sum)[kN / 2], const __nv_bfloat16* a, bool accumulate) {
  ptx::wgmma_m64k16<__nv_bfloat16, kN>(sum, ptx::swizzled_128b_descriptor(a),
                                       ptx::swizzled_128b_descriptor(matrix_b()), accumulate);
}

// Writes column 3 - m % 4 of each row m of the sums. A lane has columns 2 (lane % 4) and the next
// of two rows, which need the same column.
void write_column(float* out, const float (&sum)[kN / 2]) {
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = 3 - row % 4;
  if (static_cast<int>(threadIdx.x % 4) != column / 2) return;
  out[row] = sum[column % 2];
  out[row + 8] = sum[2 + column % 2];
}

template <bool kFault>
__global__ void proxy_fence_kernel(float* out, const float* in,
                                   const __grid_constant__ CUtensorMap) {
  auto* a = shared_memory<__nv_bfloat16>();
  store_a(a, in);
  store_b();
  if (!kFault) ptx::fence_proxy_async();
  __syncthreads();
  float sum[kN / 2];
  ptx::wgmma_fence();
  multiply(sum, a, false);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  write_column(out, sum);
}

// The fault: cp.async is waited for after the fence.
template <bool kFault>
__global__ void proxy_fence_order_kernel(float* out, const float* in,
                                         const __grid_constant__ CUtensorMap) {
  auto* a = shared_memory<__nv_bfloat16>();
  for (int i = threadIdx.x; i < 64 * 16; i += 128)
    a[element(i / 16, i % 16)] = __float2bfloat16(0.0f);
  store_b();
  __syncthreads();
  if (threadIdx.x < 64) ptx::cp_async(a + element(threadIdx.x, 0), row_of(in, threadIdx.x));
  if (kFault) ptx::fence_proxy_async();
  ptx::cp_async_wait_all();
  if (!kFault) ptx::fence_proxy_async();
  __syncthreads();
  float sum[kN / 2];
  ptx::wgmma_fence();
  multiply(sum, a, false);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  write_column(out, sum);
}

// 64 producers, threads 128 .. 191, copy or store a row each; the other threads multiply.
enum Handover {
  kProducersFence,
  kWarpFences,  // one lane for all, after __syncwarp
  kOneDoesNotFence,
  kNoFence,
  kConsumersFence,  // producers arrive by the end of their copies
  kFenceBeforeWait,
  kLaneFences,
  kNoWait,
  kCopyAfterArrival,
  kCountOfIncrements,  // the count that cp.async.mbarrier.arrive without noinc takes
  kNobodyWaits         // for the last copies
};

template <Handover kHandover, bool kStores = false>
__global__ void handover_kernel(float* out, const float* in, const __grid_constant__ CUtensorMap) {
  constexpr int kConsumers = 128, kProducers = 64;
  auto* a = shared_memory<__nv_bfloat16>();
  auto* full = reinterpret_cast<uint64_t*>(a + kStageA);
  if (threadIdx.x < kConsumers) {
    for (int i = threadIdx.x; i < 64 * 16; i += kConsumers)
      a[element(i / 16, i % 16)] = __float2bfloat16(0.0f);
    store_b();
    ptx::fence_proxy_async();
  }
  init(full, kHandover == kCountOfIncrements ? 1 : kHandover == kWarpFences ? 2 : kProducers);
  if (threadIdx.x >= kConsumers) {
    const int row = threadIdx.x - kConsumers;
    const bool is_first = row % 32 == 0;
    if (kStores) {
      a[element(row, key(row))] = __float2bfloat16(in[63 - row]);
      ptx::mbarrier_arrive(full);
      return;
    }
    if (kHandover == kCopyAfterArrival) ptx::cp_async_mbarrier_arrive_noinc(full);
    ptx::cp_async(a + element(row, 0), row_of(in, row));
    if (kHandover == kCopyAfterArrival) {
      ptx::cp_async_wait_all();
    } else if (kHandover >= kConsumersFence) {
      ptx::cp_async_mbarrier_arrive_noinc(full);
    } else {
      ptx::cp_async_wait_all();
      if (kHandover == kWarpFences) __syncwarp();
      const bool fences = (kHandover == kWarpFences && is_first) || kHandover == kProducersFence ||
                          (kHandover == kOneDoesNotFence && row != 5);
      if (fences) ptx::fence_proxy_async();
      if (kHandover != kWarpFences || is_first) ptx::mbarrier_arrive(full);
    }
    return;
  }
  if (kHandover == kFenceBeforeWait) ptx::fence_proxy_async();
  if (kHandover != kNoWait) wait(full, 0);
  if (kHandover >= kConsumersFence && kHandover != kFenceBeforeWait &&
      (kHandover != kLaneFences || threadIdx.x % 32 == 0))
    ptx::fence_proxy_async();
  float sum[kN / 2];
  ptx::wgmma_fence();
  multiply(sum, a, false);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  write_column(out, sum);
  if (kHandover == kNobodyWaits) {
    if (threadIdx.x == 0) {
      ptx::cp_async(a, in);
      ptx::cp_async_mbarrier_arrive_noinc(full);
    }
  } else {
    wait(full, 0);
  }
}

// The fault: relies on a relaxed barrier, which orders nothing. The cluster has one block.
template <bool kFault>
__global__ void relaxed_data_kernel(float* out, const float* in,
                                    const __grid_constant__ CUtensorMap) {
  float* tile = shared_memory<float>();
  if (threadIdx.x < kTile) tile[threadIdx.x] = in[threadIdx.x];
  if (!kFault) __syncthreads();
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();
  if (threadIdx.x < kTile) {
    out[threadIdx.x] = tile[kTile - 1 - threadIdx.x];
  }
}

// The same fault, with copies of an operand of a product.
template <bool kFault>
__global__ void relaxed_order_kernel(float* out, const float* in,
                                     const __grid_constant__ CUtensorMap) {
  auto* a = shared_memory<__nv_bfloat16>();
  for (int i = threadIdx.x; i < 64 * 16; i += 128)
    a[element(i / 16, i % 16)] = __float2bfloat16(0.0f);
  store_b();
  __syncthreads();
  if (threadIdx.x < 64) ptx::cp_async(a + element(threadIdx.x, 0), row_of(in, threadIdx.x));
  ptx::cp_async_wait_all();
  if (!kFault) __syncthreads();
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();
  ptx::fence_proxy_async();
  float sum[kN / 2];
  ptx::wgmma_fence();
  multiply(sum, a, false);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  write_column(out, sum);
}

// The fault: no fence before the second sum, though threads could access the first one's registers.
template <bool kFault>
__global__ void wgmma_fence_kernel(float* out, const float* in,
                                   const __grid_constant__ CUtensorMap) {
  auto* a = shared_memory<__nv_bfloat16>();
  store_a(a, in);
  store_b();
  ptx::fence_proxy_async();
  __syncthreads();
  float sum[kN / 2];
  for (int i = 0; i < 2; ++i) {
    if (!kFault || i == 0) ptx::wgmma_fence();
    multiply(sum, a, false);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
  }
  write_column(out, sum);
}

// The fault: the wait leaves out the newest group.
template <bool kFault>
__global__ void wgmma_wait_kernel(float* out, const float* in,
                                  const __grid_constant__ CUtensorMap) {
  auto* a = shared_memory<__nv_bfloat16>();
  store_a(a, in);
  store_b();
  ptx::fence_proxy_async();
  __syncthreads();
  float sum[kN / 2];
  ptx::wgmma_fence();
  multiply(sum, a, false);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<kFault ? 1 : 0>();
  write_column(out, sum);
  ptx::wgmma_wait_group<0>();
}

// The fault: a sum is written while the product adds to it.
template <bool kFault>
__global__ void wgmma_written_kernel(float* out, const float* in,
                                     const __grid_constant__ CUtensorMap) {
  auto* a = shared_memory<__nv_bfloat16>();
  store_a(a, in);
  store_b();
  ptx::fence_proxy_async();
  __syncthreads();
  float sum[kN / 2];
  ptx::wgmma_fence();
  multiply(sum, a, false);
  ptx::wgmma_commit_group();
  if (kFault) sum[5] = 0.0f;
  ptx::wgmma_wait_group<0>();
  write_column(out, sum);
}

template <bool kFault>
__global__ void wgmma_never_waited_kernel(float* out, const float* in,
                                          const __grid_constant__ CUtensorMap) {
  auto* a = shared_memory<__nv_bfloat16>();
  store_a(a, in);
  store_b();
  ptx::fence_proxy_async();
  __syncthreads();
  float sum[kN / 2], unused[kN / 2] = {};
  ptx::wgmma_fence();
  multiply(sum, a, false);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  write_column(out, sum);
  ptx::wgmma_fence();
  multiply(unused, a, false);
  if (!kFault) ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
}

// The fault: the operand is overwritten while the product may still read it.
template <bool kFault>
__global__ void sum_wgmma_refill_kernel(float* out, const float* in,
                                        const __grid_constant__ CUtensorMap) {
  auto* a = shared_memory<__nv_bfloat16>();
  store_b();
  float sum[kN / 2];
  for (int step = 0; step < kSteps; ++step) {
    __syncthreads();
    store_a(a + step % 2 * kStageA, in + step * kTile);
    ptx::fence_proxy_async();
    __syncthreads();
    ptx::wgmma_fence();
    multiply(sum, a + step % 2 * kStageA, step > 0);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<kFault ? 2 : 1>();
  }
  ptx::wgmma_wait_group<0>();
  write_column(out, sum);
}

// The fault: a matrix that does not start at a multiple of 1024 bytes.
template <bool kFault>
__global__ void descriptor_kernel(float* out, const float* in,
                                  const __grid_constant__ CUtensorMap) {
  auto* a = shared_memory<__nv_bfloat16>() + (kFault ? 256 : 0);
  store_a(a, in);
  store_b();
  ptx::fence_proxy_async();
  __syncthreads();
  float sum[kN / 2];
  ptx::wgmma_fence();
  multiply(sum, a, false);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  write_column(out, sum);
}

// Products of matrices whose rows are k: 64 rows of a, and chunks of 64 columns of b, in two steps
// of
// 16. Only k = 24 and columns of the last chunk contribute.
enum Major { kCorrect, kBitA, kBitB, kExchanged, kStep };

template <Major kFault>
__global__ void major_kernel(float* out, const float* in, const __grid_constant__ CUtensorMap) {
  constexpr int kK = 32, kCounts = 24, kChunk = kK * 64;
  auto* a = shared_memory<__nv_bfloat16>();
  __nv_bfloat16* b = a + kChunk;
  for (int i = threadIdx.x; i < kChunk; i += 128)
    a[element(i / 64, i % 64)] = __float2bfloat16(i / 64 == kCounts ? in[63 - i % 64] : 0.0f);
  for (int i = threadIdx.x; i < kN / 64 * kChunk; i += 128)
    b[element(i / 64, i % 64)] = __float2bfloat16(i >= 3 * kChunk ? 1.0f : 0.0f);
  ptx::fence_proxy_async();
  __syncthreads();
  const bool exchange = kFault == kExchanged;
  const uint64_t a_at = ptx::swizzled_128b_descriptor(a);
  const uint64_t b_at =
      ptx::swizzled_128b_descriptor(b, exchange ? kChunk * 2 : 1024, exchange ? 1024 : kChunk * 2);
  const int step = (kFault == kStep ? 32 : 16 * 128) / 16;
  float sum[kN / 2];
  ptx::wgmma_fence();
  for (int i = 0; i < kK / 16; ++i)
    ptx::wgmma_m64k16<__nv_bfloat16, kN, kFault != kBitA, kFault != kBitB>(sum, a_at + i * step,
                                                                           b_at + i * step, i > 0);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  if (threadIdx.x % 4 != 0) return;
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  out[row] = sum[3 * 64 / 8 * 4];
  out[row + 8] = sum[3 * 64 / 8 * 4 + 2];
}

// Two warpgroups share the registers that a third releases, of 384 x 168 at launch.
template <int kLeft, int kTaken>
__global__ void __launch_bounds__(384, 1)
    registers_kernel(float* out, const float* in, const __grid_constant__ CUtensorMap) {
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_dec<kLeft>();
  } else {
    ptx::setmaxnreg_inc<kTaken>();
  }
  if (threadIdx.x < kTile) out[threadIdx.x] = in[kTile - 1 - threadIdx.x];
}

// Clusters of two: each block copies half of the tile to both, and writes half of the output.

// The fault: the blocks do not wait until both have initialised their mbarrier.
template <bool kFault>
__global__ void cluster_init_kernel(float* out, const float*,
                                    const __grid_constant__ CUtensorMap map) {
  float* tile = shared_memory<float>();
  const int rank = ptx::cluster_ctarank();
  init(barriers(), 1);
  if (!kFault) {
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
  }
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(barriers(), 2 * kTileBytes);
    ptx::cp_async_bulk_tensor_multicast(tile + rank * kStage, &map, barriers(), {0, 0, 0, rank}, 3);
  }
  wait(barriers(), 0);
  if (rank == 0) write_reversed(out, tile);
}

// The fault: no fence makes the initialised mbarrier visible to the other block.
template <bool kFault>
__global__ void cluster_init_fence_kernel(float* out, const float* in,
                                          const __grid_constant__ CUtensorMap) {
  const int rank = ptx::cluster_ctarank();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barriers(), 1);
    if (!kFault) ptx::fence_mbarrier_init();
  }
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();
  if (threadIdx.x == 0) ptx::mbarrier_arrive_cluster(barriers(), rank ^ 1);
  wait(barriers(), 0);
  if (rank == 0 && threadIdx.x < kTile) out[threadIdx.x] = in[kTile - 1 - threadIdx.x];
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();
}

// The fault: a block may exit before the other block arrives at its mbarrier.
template <bool kFault>
__global__ void cluster_exit_kernel(float* out, const float* in,
                                    const __grid_constant__ CUtensorMap) {
  const int rank = ptx::cluster_ctarank();
  init(barriers(), 1);
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();
  if (rank == 0 && threadIdx.x < kTile) out[threadIdx.x] = in[kTile - 1 - threadIdx.x];
  if (threadIdx.x == 0) ptx::mbarrier_arrive_cluster(barriers(), rank ^ 1);
  if (!kFault) wait(barriers(), 0);
}

// The fault: the barrier does not wait for arrivals that were sent to the other block before it.
template <bool kFault>
__global__ void cluster_exit_relaxed_kernel(float* out, const float* in,
                                            const __grid_constant__ CUtensorMap) {
  const int rank = ptx::cluster_ctarank();
  init(barriers(), 1);
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();
  if (rank == 0 && threadIdx.x < kTile) out[threadIdx.x] = in[kTile - 1 - threadIdx.x];
  if (threadIdx.x == 0) ptx::mbarrier_arrive_cluster(barriers(), rank ^ 1);
  if (kFault) {
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
  } else {
    wait(barriers(), 0);
  }
}

// The fault: the peer's stage is refilled when only the block's own threads have read theirs.
template <bool kFault>
__global__ void sum_cluster_refill_kernel(float* out, const float*,
                                          const __grid_constant__ CUtensorMap map) {
  float* stages = shared_memory<float>();
  const int rank = ptx::cluster_ctarank();
  uint64_t *full = barriers(), *empty = full + 1;
  init(full, 1);
  init(empty, kFault ? kTile : 2 * kTile);
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();
  if (threadIdx.x == kTile) {
    for (int step = 0; step < kSteps; step += 2) {
      wait(empty, step / 2 % 2 ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, 2 * kTileBytes);
      ptx::cp_async_bulk_tensor_multicast(stages + rank * kStage, &map, full,
                                          {0, 0, 0, step + rank}, 3);
    }
    wait(empty, kSteps / 2 % 2 ^ 1);  // before the block exits
  } else if (threadIdx.x < kTile) {
    float sum = 0.0f;
    for (int step = 0; step < kSteps; step += 2) {
      wait(full, step / 2 % 2);
      for (int i = 0; i < 2; ++i) sum += stages[i * kStage + swizzled(kTile - 1 - threadIdx.x)];
      if (!kFault) ptx::mbarrier_arrive_cluster(empty, rank ^ 1);
      ptx::mbarrier_arrive(empty);
    }
    if (static_cast<int>(threadIdx.x) / 32 == rank) out[threadIdx.x] = sum;
  }
}

// Kernels launched so that they may overlap the previous one in the stream.

// The fault: one thread does not wait for the previous kernel.
template <bool kFault>
__global__ void overlap_wait_kernel(float* out, const float* in,
                                    const __grid_constant__ CUtensorMap) {
  if (!kFault || threadIdx.x != kTile) ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  if (threadIdx.x < kTile) out[threadIdx.x] = in[kTile - 1 - threadIdx.x];
}

// The fault: a copy reads memory that the previous kernel may not have written yet.
template <bool kFault>
__global__ void overlap_copy_kernel(float* out, const float*,
                                    const __grid_constant__ CUtensorMap map) {
  float* tile = shared_memory<float>();
  init(barriers(), 1);
  if (!kFault) ptx::griddepcontrol_wait();
  if (threadIdx.x == 0) copy(tile, map, barriers(), 0);
  ptx::griddepcontrol_wait();
  wait(barriers(), 0);
  write_reversed(out, tile);
}

using Kernel = void (*)(float*, const float*, CUtensorMap);

struct Case {
  const char* name;
  Kernel correct, faulty;
  int threads = 128;
  unsigned cluster_size = 1;
  bool overlaps = false;
};

const Case kCases[] = {
    {"copy_wait", copy_wait_kernel<false>, copy_wait_kernel<true>},
    {"try_once", try_once_kernel<false>, try_once_kernel<true>},
    {"parity", parity_kernel<false>, parity_kernel<true>},
    {"init_fence", init_fence_kernel<false>, init_fence_kernel<true>},
    {"init_sync", init_sync_kernel<false>, init_sync_kernel<true>},
    {"expects_more", expects_more_kernel<false>, expects_more_kernel<true>},
    {"expects_less", expects_less_kernel<false>, expects_less_kernel<true>},
    {"arrivals", arrivals_kernel<false>, arrivals_kernel<true>},
    {"unaligned_copy", unaligned_copy_kernel<false>, unaligned_copy_kernel<true>},
    {"copy_never_waited", copy_never_waited_kernel<false>, copy_never_waited_kernel<true>},
    {"sum_refill", sum_refill_kernel<false>, sum_refill_kernel<true>},
    {"proxy_fence", proxy_fence_kernel<false>, proxy_fence_kernel<true>},
    {"proxy_fence_order", proxy_fence_order_kernel<false>, proxy_fence_order_kernel<true>},
    {"one_does_not_fence", handover_kernel<kProducersFence>, handover_kernel<kOneDoesNotFence>,
     192},
    {"nobody_fences", handover_kernel<kWarpFences>, handover_kernel<kNoFence>, 192},
    {"fence_before_wait", handover_kernel<kConsumersFence>, handover_kernel<kFenceBeforeWait>, 192},
    {"one_lane_fences", handover_kernel<kConsumersFence>, handover_kernel<kLaneFences>, 192},
    {"store_before_wait", handover_kernel<kConsumersFence, true>,
     handover_kernel<kFenceBeforeWait, true>, 192},
    {"store_and_one_lane", handover_kernel<kConsumersFence, true>,
     handover_kernel<kLaneFences, true>, 192},
    {"no_wait_for_arrival", handover_kernel<kConsumersFence>, handover_kernel<kNoWait>, 192},
    {"copy_after_arrival", handover_kernel<kConsumersFence>, handover_kernel<kCopyAfterArrival>,
     192},
    {"count_of_increments", handover_kernel<kConsumersFence>, handover_kernel<kCountOfIncrements>,
     192},
    {"arrival_never_waited", handover_kernel<kConsumersFence>, handover_kernel<kNobodyWaits>, 192},
    {"relaxed_data", relaxed_data_kernel<false>, relaxed_data_kernel<true>},
    {"relaxed_order", relaxed_order_kernel<false>, relaxed_order_kernel<true>},
    {"wgmma_fence", wgmma_fence_kernel<false>, wgmma_fence_kernel<true>},
    {"wgmma_wait", wgmma_wait_kernel<false>, wgmma_wait_kernel<true>},
    {"wgmma_written", wgmma_written_kernel<false>, wgmma_written_kernel<true>},
    {"wgmma_never_waited", wgmma_never_waited_kernel<false>, wgmma_never_waited_kernel<true>},
    {"sum_wgmma_refill", sum_wgmma_refill_kernel<false>, sum_wgmma_refill_kernel<true>},
    {"descriptor", descriptor_kernel<false>, descriptor_kernel<true>},
    {"major_a_bit", major_kernel<kCorrect>, major_kernel<kBitA>},
    {"major_b_bit", major_kernel<kCorrect>, major_kernel<kBitB>},
    {"major_exchanged", major_kernel<kCorrect>, major_kernel<kExchanged>},
    {"major_step", major_kernel<kCorrect>, major_kernel<kStep>},
    {"registers", registers_kernel<24, 240>, registers_kernel<24, 248>, 384},
    {"registers_of_launch", registers_kernel<88, 208>, registers_kernel<96, 208>, 384},
    {"cluster_init", cluster_init_kernel<false>, cluster_init_kernel<true>, 128, 2},
    {"cluster_init_fence", cluster_init_fence_kernel<false>, cluster_init_fence_kernel<true>, 128,
     2},
    {"cluster_exit", cluster_exit_kernel<false>, cluster_exit_kernel<true>, 128, 2},
    {"cluster_exit_relaxed", cluster_exit_relaxed_kernel<false>, cluster_exit_relaxed_kernel<true>,
     128, 2},
    {"sum_cluster_refill", sum_cluster_refill_kernel<false>, sum_cluster_refill_kernel<true>, 128,
     2},
    {"overlap_wait", overlap_wait_kernel<false>, overlap_wait_kernel<true>, 128, 1, true},
    {"overlap_copy", overlap_copy_kernel<false>, overlap_copy_kernel<true>, 128, 1, true},
};

}  // namespace

// Returns the error message, or null.
extern "C" const char* run_fault(const char* name, bool fault, uint64_t seed, float* out,
                                 const float* in) {
  deeplab_fast::emulator::options = {seed, 227 * 1024};
  CUtensorMap map;
  const Status status = deeplab_fast::cuda::encode_tensor_map<4>(
      &map, in, {kTile, 2, 1, kSteps}, {kTileBytes / 2, kTileBytes, kTileBytes}, {kTile, 2, 1, 1});
  if (!status.ok()) return status.message;
  for (const Case& c : kCases) {
    if (strcmp(c.name, name) != 0) continue;
    return launch_with({c.cluster_size, c.overlaps}, name, fault ? c.faulty : c.correct,
                       c.cluster_size, c.threads, kProductSmem, nullptr, out, in, map)
        .message;
  }
  return "no such kernel";
}

// True if the driver would encode such a tensor map.
extern "C" bool can_encode(uintptr_t address, const uint64_t* dims, const uint64_t* strides,
                           const uint32_t* box) {
  CUtensorMap map;
  return deeplab_fast::cuda::encode_tensor_map<3>(
             &map, reinterpret_cast<void*>(address), {dims[0], dims[1], dims[2]},
             {strides[0], strides[1]}, {box[0], box[1], box[2]})
      .ok();
}
