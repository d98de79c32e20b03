// Launches a kernel; the only <<<>>> of the project. Without a CUDA compiler the emulator runs it.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "api.h"

namespace deeplab_fast::cuda {

// What takes compute capability 9.0. Threads of a kernel that overlaps may start while the kernel
// before it in the stream still runs, and wait for it by ptx::griddepcontrol_wait; CUDA Programming
// Guide, "Programmatic Dependent Launch". What that wrote is not __restrict__: such loads may take
// it for constant from the start. A graph that is captured from the stream keeps the overlap.
struct LaunchOptions {
  unsigned cluster_size = 1;  // blocks along x
  bool overlaps = false;
};

#ifdef __CUDACC__

// The dynamic shared memory of the block; kernels use no other.
template <typename T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

// Takes the error off the thread's record too, where the next launch would find it as its own.
inline Status failed(const char* name, cudaError_t error) {
  cudaGetLastError();
  return {name, cudaGetErrorString(error)};
}

template <typename... Params>
cudaError_t allow_shared_memory(void (*kernel)(Params...), size_t smem) {
  constexpr size_t kSmemWithoutOptIn = 48 * 1024;
  if (smem <= kSmemWithoutOptIn) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(smem));
}

// name: the kernel's, for the Status. stream: a cudaStream_t. smem: bytes of dynamic shared memory.
template <typename... Params, typename... Args>
Status launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem,
              void* stream, const Args&... args) {
  const cudaError_t allowed = allow_shared_memory(kernel, smem);
  if (allowed != cudaSuccess) return failed(name, allowed);
  kernel<<<grid, block, smem, static_cast<cudaStream_t>(stream)>>>(args...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return {name, cudaGetErrorString(error)};
  return {};
}

// The same with options, those of LaunchOptions.
template <typename... Params, typename... Args>
Status launch_with(const LaunchOptions& options, const char* name, void (*kernel)(Params...),
                   dim3 grid, dim3 block, size_t smem, void* stream, const Args&... args) {
  const cudaError_t allowed = allow_shared_memory(kernel, smem);
  if (allowed != cudaSuccess) return failed(name, allowed);
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (options.cluster_size > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {options.cluster_size, 1, 1};
  }
  if (options.overlaps) {
    cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
  return error == cudaSuccess ? Status{} : failed(name, error);
}

#else

template <typename T>
T* shared_memory() {
  return static_cast<T*>(emulator::shared_memory());
}

template <typename... Params, typename... Args>
Status launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem,
              void*, const Args&... args) {
  return emulator::launch(name, kernel, grid, block, 1, false, smem, args...);
}

template <typename... Params, typename... Args>
Status launch_with(const LaunchOptions& options, const char* name, void (*kernel)(Params...),
                   dim3 grid, dim3 block, size_t smem, void*, const Args&... args) {
  return emulator::launch(name, kernel, grid, block, options.cluster_size, options.overlaps, smem,
                          args...);
}

#endif

}  // namespace deeplab_fast::cuda
