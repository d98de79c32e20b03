// Launches a kernel; the only <<<>>> of the project. Without a CUDA compiler the emulator runs it.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "../api.h"

namespace deeplab_fast::cuda {

#ifdef __CUDACC__

// The dynamic shared memory of the block; kernels use no other.
template <typename T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

// name: the kernel's, for the Status. stream: a cudaStream_t. smem: bytes of dynamic shared memory.
template <typename... Params, typename... Args>
Status launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem,
              void* stream, const Args&... args) {
  constexpr size_t kSmemWithoutOptIn = 48 * 1024;
  if (smem > kSmemWithoutOptIn) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem));
    if (error != cudaSuccess) return {name, cudaGetErrorString(error)};
  }
  kernel<<<grid, block, smem, static_cast<cudaStream_t>(stream)>>>(args...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return {name, cudaGetErrorString(error)};
  return {};
}

#else

template <typename T>
T* shared_memory() {
  return static_cast<T*>(emulator::shared_memory());
}

template <typename... Params, typename... Args>
Status launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem,
              void*, const Args&... args) {
  return emulator::launch(name, kernel, grid, block, smem, args...);
}

#endif

}  // namespace deeplab_fast::cuda
