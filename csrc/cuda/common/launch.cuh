// Kernel launches: the only <<<>>> of the project; without nvcc the emulator runs the kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "api.h"

namespace deeplab_fast::cuda {

// Launch attributes of compute capability 9.0. A kernel launched with `overlaps` may start before
// the previous kernel of the stream has ended, and waits for it in ptx::griddepcontrol_wait; CUDA
// Programming Guide, "Programmatic Dependent Launch". Pointers to the previous kernel's results
// must not be __restrict__, or the compiler may load them early, as constants. A captured graph
// keeps the overlap.
struct LaunchOptions {
  unsigned cluster_size = 1;  // CTAs along x
  bool overlaps = false;
};

#ifdef __CUDACC__

// Dynamic shared memory of the CTA; no kernel uses static shared memory.
template <typename T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

// Status of a failed call. Clears CUDA's last error, or the next launch would report it.
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

// Launches `kernel`, whose name is `name`, with `smem` bytes of shared memory on a cudaStream_t.
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

// Launches `kernel` with the attributes in `options`.
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
