// Each instruction of cuda/common/ptx_sm90.cuh as a kernel from words to words, compiled for a GPU
// and for the emulator, to compare the two. map: a tensor map of in, as [20, 3, 72] or [5, 4, 3,
// 72] 16-bit elements.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

#include "cuda/common/launch.cuh"
#include "cuda/common/ptx_sm90.cuh"
#include "cuda/common/tensor_map.cuh"

namespace {

using deeplab_fast::Status;
using deeplab_fast::cuda::launch_with;
using deeplab_fast::cuda::shared_memory;
namespace ptx = deeplab_fast::ptx;

constexpr int kSmem = 48 * 1024;

__device__ uint64_t* barriers() { return shared_memory<uint64_t>() + (kSmem - 1024) / 8; }

__device__ void wait(uint64_t* barrier, int parity) {
  while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
}

// Boxes of [2, 4, 2, 64] from all over and around the tensor, as they lie in shared memory.
__global__ void copy_kernel(uint32_t* out, const uint32_t*,
                            const __grid_constant__ CUtensorMap map) {
  if constexpr (ptx::kIsSm90a) {
    constexpr int kBoxes = 6, kBytes = 8 * 2 * 64 * 2;
    const int at[kBoxes][4] = {{0, 0, 0, 0},   {8, 1, 1, 3},  {64, 2, 2, 4},
                               {-8, -1, 1, 0}, {16, 0, 0, 5}, {0, 1, -3, -1}};
    auto* boxes = shared_memory<unsigned char>();
    if (threadIdx.x == 0) {
      ptx::prefetch_tensormap(&map);
      ptx::mbarrier_init(barriers(), 1);
      ptx::fence_mbarrier_init();
      ptx::mbarrier_arrive_expect_tx(barriers(), kBoxes * kBytes);
      for (int i = 0; i < kBoxes; ++i)
        ptx::cp_async_bulk_tensor(boxes + i * kBytes, &map, barriers(), at[i]);
    }
    __syncthreads();
    wait(barriers(), 0);
    for (int i = threadIdx.x; i < kBoxes * kBytes / 4; i += blockDim.x)
      out[i] = shared_memory<uint32_t>()[i];
  }
}

// Each of two blocks copies half of the boxes to both. Block r writes out[r].
template <int kRank>
__global__ void multicast_kernel(uint32_t* out, const uint32_t*,
                                 const __grid_constant__ CUtensorMap map) {
  if constexpr (ptx::kIsSm90a) {
    constexpr int kBytes = 8 * 2 * 64 * 2;
    auto* boxes = shared_memory<unsigned char>();
    const int rank = ptx::cluster_ctarank();
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(barriers(), 1);
      ptx::fence_mbarrier_init();
    }
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect_tx(barriers(), 2 * kBytes);
      if constexpr (kRank == 3) {
        ptx::cp_async_bulk_tensor_multicast(boxes + rank * kBytes, &map, barriers(),
                                            {8 * rank, 1, 10 * rank}, 3);
      } else {
        ptx::cp_async_bulk_tensor_multicast(boxes + rank * kBytes, &map, barriers(),
                                            {8 * rank, 1, 2, 4 * rank}, 3);
      }
    }
    __syncthreads();
    wait(barriers(), 0);
    for (int i = threadIdx.x; i < 2 * kBytes / 4; i += blockDim.x)
      out[rank * 2 * kBytes / 4 + i] = shared_memory<uint32_t>()[i];
  }
}

// Warp 0 hands 32 words at a time to warp 1, through two stages.
__global__ void mbarrier_kernel(uint32_t* out, const uint32_t* in,
                                const __grid_constant__ CUtensorMap) {
  if constexpr (ptx::kIsSm90a) {
    constexpr int kRounds = 9;
    auto* words = shared_memory<uint32_t>();
    uint64_t *full = barriers(), *empty = full + 2;
    if (threadIdx.x == 0) {
      for (int i = 0; i < 4; ++i) ptx::mbarrier_init(full + i, 32);
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
    const int lane = threadIdx.x % 32;
    for (int round = 0; round < kRounds && threadIdx.x < 64; ++round) {
      const int place = round % 2, parity = round / 2 % 2;
      if (threadIdx.x < 32) {
        wait(&empty[place], parity ^ 1);
        words[place * 32 + lane] = in[round * 32 + lane];
        ptx::mbarrier_arrive(&full[place]);
      } else {
        wait(&full[place], parity);
        out[round * 32 + lane] = words[place * 32 + (lane ^ 13)];
        ptx::mbarrier_arrive(&empty[place]);
      }
    }
  }
}

// Each thread copies 16 bytes to one of two stages, in a group or not, and writes four words that
// other threads copied.
__global__ void copies_arrive_kernel(uint32_t* out, const uint32_t* in,
                                     const __grid_constant__ CUtensorMap) {
  if constexpr (ptx::kIsSm90a) {
    constexpr int kRounds = 5, kThreads = 128;
    auto* words = shared_memory<uint32_t>();
    uint64_t *full = barriers(), *empty = full + 2;
    if (threadIdx.x == 0) {
      for (int i = 0; i < 4; ++i) ptx::mbarrier_init(full + i, kThreads);
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
    for (int round = 0; round < kRounds; ++round) {
      const int place = round % 2, parity = round / 2 % 2;
      uint32_t* copied = words + place * kThreads * 4;
      const int first = round * kThreads * 4;
      wait(&empty[place], parity ^ 1);
      ptx::cp_async(copied + threadIdx.x * 4, in + first + threadIdx.x * 4);
      if (round % 3 > 0) ptx::cp_async_commit_group();
      ptx::cp_async_mbarrier_arrive_noinc(&full[place]);
      wait(&full[place], parity);
      for (int i = 0; i < 4; ++i) {
        const int j = i * kThreads + threadIdx.x;
        out[first + j] = copied[j ^ 0x155];
      }
      ptx::mbarrier_arrive(&empty[place]);
    }
  }
}

// in: the values of each lane. out: shared memory, in which the rows are in another order.
__global__ void stmatrix_kernel(uint32_t* out, const uint32_t* in,
                                const __grid_constant__ CUtensorMap) {
  if constexpr (ptx::kIsSm90a) {
    auto* words = shared_memory<uint32_t>();
    const int lane = threadIdx.x;
    uint32_t values[4];
    for (int i = 0; i < 4; ++i) values[i] = in[lane * 4 + i];
    ptx::stmatrix_x4(words + (lane ^ 13) * 4, values);
    __syncwarp();
    for (int i = 0; i < 4; ++i) out[i * 32 + lane] = words[i * 32 + lane];
  }
}

// Each of two blocks waits for arrivals from both, then writes its rank.
__global__ void cluster_kernel(uint32_t* out, const uint32_t*,
                               const __grid_constant__ CUtensorMap) {
  if constexpr (ptx::kIsSm90a) {
    const int rank = ptx::cluster_ctarank();
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(barriers(), 2 * blockDim.x);
      ptx::fence_mbarrier_init();
    }
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
    ptx::mbarrier_arrive_cluster(barriers(), rank ^ 1);
    ptx::mbarrier_arrive_cluster(barriers(), rank);
    wait(barriers(), 0);
    out[blockIdx.x * blockDim.x + threadIdx.x] = rank * 1000 + threadIdx.x;
  }
}

// out: the number of lanes elected, and whether a second election elects the same one.
__global__ void elect_kernel(uint32_t* out, const uint32_t*, const __grid_constant__ CUtensorMap) {
  if constexpr (ptx::kIsSm90a) {
    const unsigned first = __ballot_sync(0xffffffffu, ptx::elect_sync());
    const unsigned second = __ballot_sync(0xffffffffu, ptx::elect_sync());
    out[threadIdx.x] = __popc(first) * 2 + (first == second ? 1 : 0);
  }
}

__global__ void __launch_bounds__(384, 1)
    registers_kernel(uint32_t* out, const uint32_t* in, const __grid_constant__ CUtensorMap) {
  if constexpr (ptx::kIsSm90a) {
    if (threadIdx.x < 128) {
      ptx::setmaxnreg_dec<40>();
      out[threadIdx.x] = in[threadIdx.x] + 1;
    } else {
      ptx::setmaxnreg_inc<232>();
      out[threadIdx.x] = in[threadIdx.x] + 2;
    }
  }
}

// out [64, 256], by lanes = c + a b in four steps, in 16-bit elements: a [64, 64] or, transposed,
// [k, m]; b [256, 64] or [k, n]. c is a b again, so that the first product does not accumulate.
template <typename T, bool kTransA, bool kTransB>
__global__ void wgmma_kernel(uint32_t* out, const uint32_t* in,
                             const __grid_constant__ CUtensorMap) {
  if constexpr (ptx::kIsSm90a) {
    constexpr int kN = 256, kK = 64;
    auto* a = shared_memory<uint32_t>();
    uint32_t* b = a + 64 * kK / 2;
    // Rows of 128 bytes; a transposed b is in four pieces [k, 64].
    for (int i = threadIdx.x; i < (64 + kN) * kK / 2; i += 128) {
      int row = i / 32, word = i % 32;
      if (kTransB && row >= 64) {
        const int j = i - 64 * 32;
        row = 64 + j % (kN / 2) / 32 * kK + j / (kN / 2);
        word = j % 32;
      }
      a[row * 32 + (word / 4 ^ row % 8) * 4 + word % 4] = in[i];
    }
    ptx::fence_proxy_async();
    __syncthreads();
    const uint64_t a_at = ptx::swizzled_128b_descriptor(a, 1024, kTransA ? 64 * kK * 2 : 16);
    const uint64_t b_at = ptx::swizzled_128b_descriptor(b, 1024, kTransB ? 64 * kK * 2 : 16);
    constexpr int kStepA = kTransA ? 16 * 128 / 16 : 2, kStepB = kTransB ? 16 * 128 / 16 : 2;
    float sum[kN / 2];
    ptx::wgmma_fence();
#pragma unroll
    for (int times = 0; times < 2; ++times) {
#pragma unroll
      for (int k = 0; k < kK / 16; ++k) {
        ptx::wgmma_m64k16<T, kN, kTransA, kTransB>(sum, a_at + k * kStepA, b_at + k * kStepB,
                                                   times > 0 || k > 0);
      }
      ptx::wgmma_commit_group();
    }
    ptx::wgmma_wait_group<0>();
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) out[threadIdx.x * (kN / 2) + i] = __float_as_uint(sum[i]);
  }
}

struct Case {
  const char* name;
  void (*kernel)(uint32_t*, const uint32_t*, CUtensorMap);
  int threads = 128;
  unsigned cluster_size = 1;
  int rank = 3;  // of the map
};

const Case kCases[] = {
    {"copy", copy_kernel, 128, 1, 4},
    {"multicast", multicast_kernel<3>, 128, 2},
    {"multicast_4d", multicast_kernel<4>, 128, 2, 4},
    {"mbarrier", mbarrier_kernel},
    {"copies_arrive", copies_arrive_kernel},
    {"stmatrix", stmatrix_kernel, 32},
    {"cluster", cluster_kernel, 128, 2},
    {"elect", elect_kernel, 32},
    {"registers", registers_kernel, 384},
    {"wgmma_f16", wgmma_kernel<__half, false, false>},
    {"wgmma_bf16", wgmma_kernel<__nv_bfloat16, false, false>},
    {"wgmma_bf16_trans_a", wgmma_kernel<__nv_bfloat16, true, false>},
    {"wgmma_f16_trans_b", wgmma_kernel<__half, false, true>},
    {"wgmma_bf16_trans_ab", wgmma_kernel<__nv_bfloat16, true, true>},
};

}  // namespace

// out and in are on the device. Returns the error message, or null.
extern "C" const char* run_instruction(const char* name, uint32_t* out, const uint32_t* in) {
  using deeplab_fast::cuda::encode_tensor_map;
  CUtensorMap map;
  for (const Case& c : kCases) {
    if (strcmp(c.name, name) != 0) continue;
    const Status status =
        c.rank == 3 ? encode_tensor_map<3>(&map, in, {72, 3, 20}, {72 * 2, 3 * 72 * 2}, {64, 2, 8})
                    : encode_tensor_map<4>(&map, in, {72, 3, 4, 5},
                                           {72 * 2, 3 * 72 * 2, 4 * 3 * 72 * 2}, {64, 2, 4, 2});
    if (!status.ok()) return status.message;
    return launch_with({c.cluster_size}, name, c.kernel, c.cluster_size, c.threads, kSmem, nullptr,
                       out, in, map)
        .message;
  }
  return "no such kernel";
}

#ifndef __CUDACC__
extern "C" void set_seed(uint64_t seed) { deeplab_fast::emulator::options = {seed, 227 * 1024}; }
#endif
