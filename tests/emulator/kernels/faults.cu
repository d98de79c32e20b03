// Kernels that are wrong on purpose, each with a correct version: with kFault a synchronisation is
// missing or misplaced, or an index is wrong. All but refill compute out[i] = in[kThreads - 1 - i].

#include <cuda_runtime.h>

#include <cstring>

#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"

namespace {

using deeplab_fast::Status;
using deeplab_fast::cuda::launch;
using deeplab_fast::cuda::shared_memory;
namespace ptx = deeplab_fast::ptx;

constexpr int kThreads = 64;
constexpr int kSteps = 6;

// Starts the copy of kThreads floats, four by each of the first threads.
__device__ void copy_floats(float* dst, const float* src) {
  const int i = 4 * threadIdx.x;
  if (i < kThreads) ptx::cp_async(dst + i, src + i);
}

template <bool kFault>
__global__ void barrier_kernel(float* out, const float* in) {
  float* tile = shared_memory<float>();
  tile[threadIdx.x] = in[threadIdx.x];
  if (!kFault) __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

template <bool kFault>
__global__ void wait_kernel(float* out, const float* in) {
  float* tile = shared_memory<float>();
  copy_floats(tile, in);
  ptx::cp_async_commit_group();
  if (!kFault) ptx::cp_async_wait_group<0>();
  __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
  ptx::cp_async_wait_all();
}

// out[i] = sum over s of in[s][kThreads - 1 - i], with two stages. The fault lets the next copy
// into a stage start while other threads may still read it.
template <bool kFault>
__global__ void refill_kernel(float* out, const float* in) {
  float* stages = shared_memory<float>();
  const auto fetch = [&](int step) {
    if (step < kSteps) copy_floats(stages + step % 2 * kThreads, in + step * kThreads);
    ptx::cp_async_commit_group();
  };
  fetch(0);
  fetch(1);
  float sum = 0.0f;
  for (int step = 0; step < kSteps; ++step) {
    ptx::cp_async_wait_group<1>();
    __syncthreads();
    sum += stages[step % 2 * kThreads + kThreads - 1 - threadIdx.x];
    if (!kFault) __syncthreads();
    fetch(step + 2);
  }
  out[threadIdx.x] = sum;
}

template <bool kFault>
__global__ void out_of_bounds_write_kernel(float* out, const float* in) {
  float* tile = shared_memory<float>();
  tile[threadIdx.x + (kFault ? 1 : 0)] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

template <bool kFault>
__global__ void out_of_bounds_read_kernel(float* out, const float* in) {
  float* tile = shared_memory<float>();
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[kThreads - (kFault ? 0 : 1) - threadIdx.x];
}

template <bool kFault>
__global__ void out_of_bounds_global_kernel(float* out, const float* in) {
  out[threadIdx.x] = in[kThreads - 1 - threadIdx.x];
  if (kFault && threadIdx.x == 0) out[kThreads] = 0.0f;
}

template <bool kFault>
__global__ void out_of_bounds_copy_kernel(float* out, const float* in) {
  float* tile = shared_memory<float>();
  copy_floats(tile + (kFault ? 4 : 0), in);
  ptx::cp_async_wait_all();
  __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

// The fault: two blocks write the same elements, instead of half of them each. A value goes through
// the stack, whose memory the emulator gives to one block after another.
template <bool kFault>
__global__ void overlapping_blocks_kernel(float* out, const float* in) {
  const int i = kFault ? threadIdx.x : threadIdx.x / 2 + blockIdx.x * kThreads / 2;
  float value;
  float* volatile on_stack = &value;
  *on_stack = in[kThreads - 1 - i];
  if (kFault || threadIdx.x % 2 == 0) out[i] = *on_stack;
}

// Outputs are stored in vectors of two. The fault: the vectors start at odd elements.
template <bool kFault>
__global__ void misaligned_kernel(float* out, const float* in) {
  if (kFault && threadIdx.x == kThreads - 1) {
    out[0] = in[kThreads - 1];
    out[kThreads - 1] = in[0];
  }
  const int i = 2 * threadIdx.x + (kFault ? 1 : 0);
  if (i + 1 >= kThreads) return;
  const float2 pair = make_float2(in[kThreads - 1 - i], in[kThreads - 2 - i]);
  *reinterpret_cast<float2*>(out + i) = pair;
}

template <bool kFault>
__global__ void divergent_barrier_kernel(float* out, const float* in) {
  float* tile = shared_memory<float>();
  tile[threadIdx.x] = in[threadIdx.x];
  if (!kFault) {
    __syncthreads();
  } else if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

// The fault: threads leave before a barrier that the others wait at.
template <bool kFault>
__global__ void early_exit_kernel(float* out, const float* in) {
  float* tile = shared_memory<float>();
  tile[threadIdx.x] = in[threadIdx.x];
  if (kFault && threadIdx.x >= 40) return;
  __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

// The fault: each warp waits for the other at another named barrier.
template <bool kFault>
__global__ void deadlock_kernel(float* out, const float* in) {
  float* tile = shared_memory<float>();
  tile[threadIdx.x] = in[threadIdx.x];
  const int first = kFault && threadIdx.x >= 32 ? 2 : 1;
  ptx::bar_sync(first, kThreads);
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
  ptx::bar_sync(3 - first, kThreads);
}

// A warp produces for the other; the fault is that it does not come to the barrier.
template <bool kFault>
__global__ void producer_kernel(float* out, const float* in) {
  float* tile = shared_memory<float>();
  if (threadIdx.x < 32) {
    tile[threadIdx.x] = in[kThreads - 1 - threadIdx.x];
    tile[threadIdx.x + 32] = in[31 - threadIdx.x];
    if (!kFault) ptx::bar_sync(1, kThreads);
  } else {
    ptx::bar_sync(1, kThreads);
    out[threadIdx.x] = tile[threadIdx.x];
    out[threadIdx.x - 32] = tile[threadIdx.x - 32];
  }
}

template <bool kFault>
__global__ void never_waited_kernel(float* out, const float* in) {
  float* tile = shared_memory<float>();
  copy_floats(tile, in);
  ptx::cp_async_wait_all();
  __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
  __syncthreads();
  copy_floats(tile, in);
  ptx::cp_async_commit_group();
  if (!kFault) ptx::cp_async_wait_group<0>();
}

// The fault: half a warp shuffles at another line than the rest.
template <bool kFault>
__global__ void divergent_shuffle_kernel(float* out, const float* in) {
  float value = in[kThreads - 1 - threadIdx.x];
  if (kFault && threadIdx.x % 32 < 16) {
    value = __shfl_xor_sync(0xffffffffu, value, 1);
  } else {
    value = __shfl_xor_sync(0xffffffffu, value, 1);
  }
  out[threadIdx.x ^ 1] = value;
}

// Lanes exchange values through shared memory. The fault: without __syncwarp.
template <bool kFault>
__global__ void warp_sync_kernel(float* out, const float* in) {
  float* tile = shared_memory<float>();
  tile[threadIdx.x] = in[kThreads - 1 - threadIdx.x];
  if (!kFault) __syncwarp();
  out[threadIdx.x ^ 1] = tile[threadIdx.x ^ 1];
}

// A thread waits for a flag. The fault: no thread sets it.
template <bool kFault>
__global__ void spin_kernel(float* out, const float* in) {
  int* flag = shared_memory<int>();
  if (threadIdx.x == 0) *flag = 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    while (atomicAdd(flag, 0) == 0) {
    }
  } else if (!kFault) {
    atomicMax(flag, 1);
  }
  out[threadIdx.x] = in[kThreads - 1 - threadIdx.x];
}

struct Case {
  const char* name;
  void (*correct)(float*, const float*);
  void (*faulty)(float*, const float*);
  int blocks = 1;
  int tiles = 1;  // shared memory, in units of kThreads floats
};

const Case kCases[] = {
    {"barrier", barrier_kernel<false>, barrier_kernel<true>},
    {"wait", wait_kernel<false>, wait_kernel<true>},
    {"refill", refill_kernel<false>, refill_kernel<true>, 1, 2},
    {"warp_sync", warp_sync_kernel<false>, warp_sync_kernel<true>},
    {"out_of_bounds_write", out_of_bounds_write_kernel<false>, out_of_bounds_write_kernel<true>},
    {"out_of_bounds_read", out_of_bounds_read_kernel<false>, out_of_bounds_read_kernel<true>},
    {"out_of_bounds_copy", out_of_bounds_copy_kernel<false>, out_of_bounds_copy_kernel<true>},
    {"out_of_bounds_global", out_of_bounds_global_kernel<false>, out_of_bounds_global_kernel<true>},
    {"overlapping_blocks", overlapping_blocks_kernel<false>, overlapping_blocks_kernel<true>, 2},
    {"misaligned", misaligned_kernel<false>, misaligned_kernel<true>},
    {"divergent_barrier", divergent_barrier_kernel<false>, divergent_barrier_kernel<true>},
    {"divergent_shuffle", divergent_shuffle_kernel<false>, divergent_shuffle_kernel<true>},
    {"early_exit", early_exit_kernel<false>, early_exit_kernel<true>},
    {"deadlock", deadlock_kernel<false>, deadlock_kernel<true>},
    {"producer", producer_kernel<false>, producer_kernel<true>},
    {"never_waited", never_waited_kernel<false>, never_waited_kernel<true>},
    {"spin", spin_kernel<false>, spin_kernel<true>},
};

}  // namespace

// Returns the error message, or null.
extern "C" const char* run_fault(const char* name, bool fault, float* out, const float* in) {
  for (const Case& c : kCases) {
    if (strcmp(c.name, name) != 0) continue;
    const size_t smem = c.tiles * kThreads * sizeof(float);
    return launch(name, fault ? c.faulty : c.correct, c.blocks, kThreads, smem, nullptr, out, in)
        .message;
  }
  return "no such kernel";
}

extern "C" const char* run_with_shared_memory(size_t bytes, float* out, const float* in) {
  return launch("barrier", barrier_kernel<false>, 1, kThreads, bytes, nullptr, out, in).message;
}

extern "C" void set_machine(uint64_t seed, size_t shared_memory_limit) {
  deeplab_fast::emulator::options = {seed, shared_memory_limit};
}
