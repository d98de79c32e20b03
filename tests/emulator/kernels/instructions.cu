// Each instruction of cuda/common/ptx.cuh, and each built-in function of the emulator, as a kernel
// of one block from words to words. Compiled by nvcc and for the emulator, to compare the two.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"

namespace {

using deeplab_fast::Status;
using deeplab_fast::cuda::launch;
using deeplab_fast::cuda::shared_memory;
namespace ptx = deeplab_fast::ptx;

constexpr unsigned kFull = 0xffffffffu;

// Lane l copies l % (kBytes + 1) bytes, in two groups waited for one after the other.
__global__ void cp_async_kernel(uint32_t* out, const uint32_t* in) {
  constexpr int kBytes = 16, kWords = kBytes / 4;
  uint32_t* tile = shared_memory<uint32_t>();
  const int lane = threadIdx.x;
  for (int half = 0; half < 2; ++half) {
    const int i = (half * 32 + lane) * kWords;
    ptx::cp_async(&tile[i], &in[i], half == 0 ? kBytes : lane % (kBytes + 1));
    ptx::cp_async_commit_group();
  }
  ptx::cp_async_wait_group<1>();
  for (int w = 0; w < kWords; ++w) out[lane * kWords + w] = tile[lane * kWords + w];
  ptx::cp_async_wait_all();
  for (int w = 0; w < kWords; ++w) out[(32 + lane) * kWords + w] = tile[(32 + lane) * kWords + w];
}

// in: 32 rows of 16 bytes. out: [lane][matrix].
template <bool kTrans>
__global__ void ldmatrix_kernel(uint32_t* out, const uint32_t* in) {
  uint32_t* tile = shared_memory<uint32_t>();
  const int lane = threadIdx.x;
  for (int w = 0; w < 4; ++w) tile[lane * 4 + w] = in[lane * 4 + w];
  __syncwarp();
  uint32_t r[4];
  if (kTrans) {
    ptx::ldmatrix_x4_trans(r, &tile[lane * 4]);
  } else {
    ptx::ldmatrix_x4(r, &tile[lane * 4]);
  }
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = r[i];
}

__device__ void mma(__half, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  ptx::mma_m16n8k16<__half>(d, a, b);
}
__device__ void mma(__nv_bfloat16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  ptx::mma_m16n8k16<__nv_bfloat16>(d, a, b);
}
__device__ void mma(float, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  ptx::mma_m16n8k8_tf32(d, a, b);
}

// in: [lane][a: 4, b: 2, d: 4]. out: [lane][d: 4].
template <typename T>
__global__ void mma_kernel(uint32_t* out, const uint32_t* in) {
  const uint32_t* mine = in + threadIdx.x * 10;
  const uint32_t a[4] = {mine[0], mine[1], mine[2], mine[3]};
  const uint32_t b[2] = {mine[4], mine[5]};
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(mine[6 + i]);
  mma(T{}, d, a, b);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = __float_as_uint(d[i]);
}

// a [16, 16] row-major, b [16, 8] row-major, 16-bit, through ldmatrix. out: d [16, 8] row-major.
template <typename T>
__global__ void gemm_kernel(uint32_t* out, const uint32_t* in) {
  uint32_t* tile = shared_memory<uint32_t>();
  const int lane = threadIdx.x;
  for (int i = lane; i < 128 + 64; i += 32) tile[i] = in[i];
  __syncwarp();
  uint32_t a[4], b_twice[4];
  ptx::ldmatrix_x4(a, &tile[lane % 16 * 8 + lane / 16 * 4]);
  ptx::ldmatrix_x4_trans(b_twice, &tile[128 + lane % 16 * 4]);
  const uint32_t b[2] = {b_twice[0], b_twice[1]};
  float d[4] = {};
  ptx::mma_m16n8k16<T>(d, a, b);
  for (int i = 0; i < 4; ++i)
    out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = __float_as_uint(d[i]);
}

__global__ void cvt_rna_tf32_kernel(uint32_t* out, const uint32_t* in) {
  for (int i = threadIdx.x; i < 1024; i += 32) out[i] = ptx::cvt_rna_tf32(__uint_as_float(in[i]));
}

// Each of two warps reads what the other has stored, between two named barriers.
__global__ void bar_kernel(uint32_t* out, const uint32_t* in) {
  uint32_t* tile = shared_memory<uint32_t>();
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    tile[lane] = in[lane];
    ptx::bar_sync(1, 64);
    ptx::bar_sync(2, 64);
    out[lane] = tile[32 + (lane ^ 5)];
  } else {
    ptx::bar_sync(1, 64);
    tile[32 + lane] = tile[lane ^ 3];
    ptx::bar_sync(2, 64);
  }
}

// griddepcontrol returns at once in a launch that overlaps no other.
__global__ void griddepcontrol_kernel(uint32_t* out, const uint32_t* in) {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void shuffle_kernel(uint32_t* out, const uint32_t* in) {
  const int lane = threadIdx.x;
  const uint32_t value = in[lane];
  int n = 0;
  const auto store = [&](uint32_t word) { out[n++ * 32 + lane] = word; };
  for (int width = 1; width <= 32; width *= 2) {
    for (int i = 0; i < 5; ++i) {
      store(__shfl_sync(kFull, value, lane * 7 + i, width));
      store(__shfl_up_sync(kFull, value, i, width));
      store(__shfl_down_sync(kFull, value, i, width));
      store(__shfl_xor_sync(kFull, value, 1 << i, width));
    }
  }
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  store(__shfl_sync(half, value, lane ^ 9));
  const double wide = __shfl_sync(kFull, 1.0 / (1 + lane), lane ^ 17);
  store(static_cast<uint32_t>(wide * 1e9));
}

__global__ void vote_kernel(uint32_t* out, const uint32_t* in) {
  const int lane = threadIdx.x;
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  int n = 0;
  const auto store = [&](uint32_t word) { out[n++ * 32 + lane] = word; };
  for (int bit = 0; bit < 8; ++bit) {
    const int predicate = static_cast<int>(in[lane] >> bit & 1u);
    store(__ballot_sync(kFull, predicate));
    store(__ballot_sync(half, predicate));
    store(__any_sync(half, predicate && lane % 16 == bit));
    store(__all_sync(half, predicate || lane % 16 != bit));
  }
}

// The updates commute, so that the result does not depend on their order.
__global__ void atomic_kernel(uint32_t* out, const uint32_t* in) {
  uint32_t* cells = shared_memory<uint32_t>();
  const int lane = threadIdx.x;
  if (lane == 0)
    for (int i = 0; i < 5; ++i) cells[i] = in[32 + i];
  __syncwarp();
  atomicAdd(&cells[0], in[lane]);
  atomicMax(&cells[1], in[lane]);
  atomicMin(reinterpret_cast<int*>(&cells[2]), static_cast<int>(in[lane]));
  uint32_t seen = cells[3];
  if (lane == 7) seen = atomicExch(&cells[3], in[lane]);
  if (lane == 9) atomicCAS(&cells[4], in[36], 12345u);
  __syncwarp();
  if (lane < 5) out[lane] = cells[lane];
  if (lane == 7) out[5] = seen;
}

// in: 1024 floats. out: as fp16, as bf16, and 1024 fp16 and bf16 patterns as floats.
__global__ void half_kernel(uint32_t* out, const uint32_t* in) {
  for (int i = threadIdx.x; i < 1024; i += 32) {
    const float x = __uint_as_float(in[i]);
    const __half half = __float2half_rn(x);
    const __nv_bfloat16 bfloat16 = __float2bfloat16_rn(x);
    const __half2 halves = __floats2half2_rn(x, -x);
    const __nv_bfloat162 bfloat16s = __floats2bfloat162_rn(x, -x);
    out[i] = __float_as_uint(__half2float(half));
    out[1024 + i] = __float_as_uint(__bfloat162float(bfloat16));
    memcpy(&out[2048 + i], &halves, 4);
    memcpy(&out[3072 + i], &bfloat16s, 4);
    out[4096 + i] = __float_as_uint(__half22float2(halves).y);
    out[5120 + i] = __float_as_uint(__bfloat1622float2(bfloat16s).y);
  }
}

// in: 1024 pairs of fp16 or bf16 and 1024 more. out: the greater of each, then the smaller.
template <typename Pair>
__global__ void min_max_kernel(uint32_t* out, const uint32_t* in) {
  for (int i = threadIdx.x; i < 1024; i += 32) {
    Pair a, b;
    memcpy(&a, &in[i], 4);
    memcpy(&b, &in[1024 + i], 4);
    const Pair greater = __hmax2_nan(a, b), smaller = __hmin2_nan(a, b);
    memcpy(&out[i], &greater, 4);
    memcpy(&out[1024 + i], &smaller, 4);
  }
}

// in: 1024 floats.
__global__ void rcp_kernel(uint32_t* out, const uint32_t* in) {
  for (int i = threadIdx.x; i < 1024; i += 32) {
    out[i] = __float_as_uint(ptx::rcp_approx(__uint_as_float(in[i])));
  }
}

// in: 1024 floats.
__global__ void ex2_kernel(uint32_t* out, const uint32_t* in) {
  for (int i = threadIdx.x; i < 1024; i += 32) {
    out[i] = __float_as_uint(ptx::ex2_approx(__uint_as_float(in[i])));
  }
}

struct Case {
  const char* name;
  void (*kernel)(uint32_t*, const uint32_t*);
  int threads = 32;
};

const Case kCases[] = {
    {"cp_async", cp_async_kernel},
    {"ldmatrix_x4", ldmatrix_kernel<false>},
    {"ldmatrix_x4_trans", ldmatrix_kernel<true>},
    {"mma_f16", mma_kernel<__half>},
    {"mma_bf16", mma_kernel<__nv_bfloat16>},
    {"mma_tf32", mma_kernel<float>},
    {"gemm_f16", gemm_kernel<__half>},
    {"gemm_bf16", gemm_kernel<__nv_bfloat16>},
    {"cvt_rna_tf32", cvt_rna_tf32_kernel},
    {"bar", bar_kernel, 64},
    {"griddepcontrol", griddepcontrol_kernel},
    {"shuffle", shuffle_kernel},
    {"vote", vote_kernel},
    {"atomic", atomic_kernel},
    {"half", half_kernel},
    {"min_max_f16", min_max_kernel<__half2>},
    {"min_max_bf16", min_max_kernel<__nv_bfloat162>},
    {"ex2", ex2_kernel},
    {"rcp", rcp_kernel},
};

}  // namespace

// out and in are on the device. Returns the error message, or null.
extern "C" const char* run_instruction(const char* name, uint32_t* out, const uint32_t* in) {
  for (const Case& c : kCases)
    if (strcmp(c.name, name) == 0)
      return launch(name, c.kernel, 1, c.threads, 4096, nullptr, out, in).message;
  return "no such kernel";
}
