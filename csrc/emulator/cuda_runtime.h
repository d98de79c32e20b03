// Stands in for CUDA's header of this name: the keywords and built-in functions that the kernels
// use, with the meaning that the CUDA C++ Programming Guide gives them. It is stricter than
// hardware: a mask that names lanes that have exited, or one function that a warp calls from two
// lines, is an error. There is no __shared__: shared memory is deeplab_fast::cuda::shared_memory().
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda.h"
#include "simt.h"

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

using std::max;
using std::min;

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <typename T>
T __ldg(const T* p) {
  return *p;
}

template <typename T>
void __stcs(T* p, T value) {
  *p = value;
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

namespace deeplab_fast::emulator {

// The larger of a and b; NaN if either is NaN. 0 is greater than -0.
inline float max_nan(float a, float b) {
  if (a != a || b != b) return NAN;
  return a > b || (a == b && std::signbit(b)) ? a : b;
}
inline float min_nan(float a, float b) { return -max_nan(-a, -b); }

}  // namespace deeplab_fast::emulator

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }

// Barriers.

inline void __syncthreads(
    deeplab_fast::emulator::Site site = deeplab_fast::emulator::Site::here()) {
  deeplab_fast::emulator::block_barrier("__syncthreads", site);
}

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       deeplab_fast::emulator::Site site = deeplab_fast::emulator::Site::here()) {
  deeplab_fast::emulator::warp_collective(
      "__syncwarp", mask, nullptr, [](void* const*) {}, true, site);
}

// One OS thread runs all threads, so only the compiler could reorder accesses.
inline void __threadfence() { asm volatile("" ::: "memory"); }

// Shuffles and votes.

namespace deeplab_fast::emulator {

template <typename T>
struct Shuffle {
  T value;
  int source;  // the lane to read; poison comes from one that is not in the mask
  T result;
};

template <typename T>
T shuffle(const char* function, unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  Shuffle<T> operands{value, source, value};
  warp_collective(
      function, mask, &operands,
      [](void* const* lanes) {
        for (int i = 0; i < 32; ++i) {
          auto* mine = static_cast<Shuffle<T>*>(lanes[i]);
          if (!mine) continue;
          const auto* theirs = static_cast<const Shuffle<T>*>(lanes[mine->source]);
          if (theirs) {
            mine->result = theirs->value;
          } else {
            memset(static_cast<void*>(&mine->result), 0xff, sizeof(T));
          }
        }
      },
      false, site);
  return operands.result;
}

// The lane that lies `source` lanes into this lane's segment of `width`, or this lane if outside.
inline int in_segment(int source, int width) {
  const int segment = lane() & ~(width - 1);
  return source >= 0 && source < width ? segment + source : lane();
}

struct Vote {
  bool predicate;
  uint32_t ballot;
};

inline uint32_t ballot(const char* function, unsigned mask, bool predicate, Site site) {
  Vote operands{predicate, 0};
  warp_collective(
      function, mask, &operands,
      [](void* const* lanes) {
        uint32_t ballot = 0;
        for (int i = 0; i < 32; ++i)
          if (lanes[i] && static_cast<Vote*>(lanes[i])->predicate) ballot |= uint32_t{1} << i;
        for (int i = 0; i < 32; ++i)
          if (lanes[i]) static_cast<Vote*>(lanes[i])->ballot = ballot;
      },
      false, site);
  return operands.ballot;
}

}  // namespace deeplab_fast::emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              deeplab_fast::emulator::Site site = deeplab_fast::emulator::Site::here()) {
  using namespace deeplab_fast::emulator;
  return shuffle("__shfl_sync", mask, value, in_segment(source & (width - 1), width), site);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 deeplab_fast::emulator::Site site = deeplab_fast::emulator::Site::here()) {
  using namespace deeplab_fast::emulator;
  const int source = (lane() & (width - 1)) - static_cast<int>(delta);
  return shuffle("__shfl_up_sync", mask, value, in_segment(source, width), site);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   deeplab_fast::emulator::Site site = deeplab_fast::emulator::Site::here()) {
  using namespace deeplab_fast::emulator;
  const int source = (lane() & (width - 1)) + static_cast<int>(delta);
  return shuffle("__shfl_down_sync", mask, value, in_segment(source, width), site);
}

// Reads from its own or an earlier segment of `width` lanes, but not from a later one.
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  deeplab_fast::emulator::Site site = deeplab_fast::emulator::Site::here()) {
  using namespace deeplab_fast::emulator;
  const int source = lane() ^ lane_mask;
  const int segment_end = (lane() & ~(width - 1)) + width;
  return shuffle("__shfl_xor_sync", mask, value, source < segment_end ? source : lane(), site);
}

inline unsigned __ballot_sync(
    unsigned mask, int predicate,
    deeplab_fast::emulator::Site site = deeplab_fast::emulator::Site::here()) {
  return deeplab_fast::emulator::ballot("__ballot_sync", mask, predicate != 0, site);
}

inline int __any_sync(unsigned mask, int predicate,
                      deeplab_fast::emulator::Site site = deeplab_fast::emulator::Site::here()) {
  return deeplab_fast::emulator::ballot("__any_sync", mask, predicate != 0, site) != 0;
}

inline int __all_sync(unsigned mask, int predicate,
                      deeplab_fast::emulator::Site site = deeplab_fast::emulator::Site::here()) {
  return deeplab_fast::emulator::ballot("__all_sync", mask, predicate != 0, site) == mask;
}

// Atomics, on integers: sums of floats would depend on the order. An atomic lets other threads run
// first, so that the value it finds depends on the seed. It acquires and releases, because
// ThreadSanitizer knows no fences.

namespace deeplab_fast::emulator {

template <typename T, typename Update>
T atomic(const char* function, T* address, Update update, Site site) {
  static_assert(std::is_integral<T>::value, "atomics are on integers");
  yield(function, site);
  T old = __atomic_load_n(address, __ATOMIC_ACQUIRE);
  while (!__atomic_compare_exchange_n(address, &old, update(old), false, __ATOMIC_ACQ_REL,
                                      __ATOMIC_ACQUIRE)) {
  }
  return old;
}

}  // namespace deeplab_fast::emulator

template <typename T>
T atomicAdd(T* address, std::common_type_t<T> value,
            deeplab_fast::emulator::Site site = deeplab_fast::emulator::Site::here()) {
  using namespace deeplab_fast::emulator;
  return atomic("atomicAdd", address, [=](T old) { return static_cast<T>(old + value); }, site);
}

template <typename T>
T atomicMax(T* address, std::common_type_t<T> value,
            deeplab_fast::emulator::Site site = deeplab_fast::emulator::Site::here()) {
  using namespace deeplab_fast::emulator;
  return atomic("atomicMax", address, [=](T old) { return std::max(old, value); }, site);
}

template <typename T>
T atomicMin(T* address, std::common_type_t<T> value,
            deeplab_fast::emulator::Site site = deeplab_fast::emulator::Site::here()) {
  using namespace deeplab_fast::emulator;
  return atomic("atomicMin", address, [=](T old) { return std::min(old, value); }, site);
}

template <typename T>
T atomicExch(T* address, std::common_type_t<T> value,
             deeplab_fast::emulator::Site site = deeplab_fast::emulator::Site::here()) {
  using namespace deeplab_fast::emulator;
  return atomic("atomicExch", address, [=](T) { return value; }, site);
}

template <typename T>
T atomicCAS(T* address, std::common_type_t<T> compare, std::common_type_t<T> value,
            deeplab_fast::emulator::Site site = deeplab_fast::emulator::Site::here()) {
  using namespace deeplab_fast::emulator;
  return atomic("atomicCAS", address, [=](T old) { return old == compare ? value : old; }, site);
}

// The runtime API, with the answers of a machine without a driver. Tensor maps can be encoded.

enum cudaError_t { cudaSuccess = 0, cudaErrorNoDevice = 100 };

struct cudaDeviceProp {
  char name[256];
  int major, minor;
};

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int*) { return cudaErrorNoDevice; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp*, int) { return cudaErrorNoDevice; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
  deeplab_fast::emulator::has_context = true;
  return cudaSuccess;
}

enum cudaDriverEntryPointQueryResult {
  cudaDriverEntryPointSuccess = 0,
  cudaDriverEntryPointSymbolNotFound = 1
};
constexpr unsigned long long cudaEnableDefault = 0;

inline cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                                    unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  const bool found = strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *result = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  if (found) *function = reinterpret_cast<void*>(&deeplab_fast::emulator::encode_tiled);
  return cudaSuccess;
}
