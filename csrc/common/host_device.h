// HOST_DEVICE marks functions shared by CPU and CUDA kernels. They are always inlined, so that on
// the CPU they are compiled for the instruction set of the target_clones function that calls them.
#pragma once

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline __attribute__((always_inline))
#endif
