// Tensor maps for bulk tensor copies, encoded by the driver and cached by their arguments.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <mutex>

#include "api.h"

namespace deeplab_fast::cuda {

// Encodes a map of 16-bit elements with kRank dimensions, innermost first, in boxes with a 128-byte
// swizzle. `strides` are in bytes, for all dimensions but the first; they and `address` are
// multiples of 16. Copies fill elements outside the tensor with zeros. The driver's function is
// looked up at run time, so that this library loads on machines without a driver.
template <int kRank>
Status encode_tensor_map(CUtensorMap* map, const void* address, const uint64_t (&dims)[kRank],
                         const uint64_t (&strides)[kRank - 1], const uint32_t (&box)[kRank]) {
  static PFN_cuTensorMapEncodeTiled_v12000 encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &result);
    const bool found = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return found ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function) : nullptr;
  }();
  if (encode == nullptr) return {"cuTensorMapEncodeTiled", "not found in the CUDA driver"};
  // The driver may need a current context. A thread has one only after its first runtime call,
  // which an autograd thread may not have made. cudaSetDevice creates it (CUDA 12 and later).
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaSetDevice(device) != cudaSuccess) {
    cudaGetLastError();  // clears it, or the next launch would report it
    return {"cuTensorMapEncodeTiled", "no CUDA device is current"};
  }
  uint32_t element_strides[kRank];
  for (uint32_t& stride : element_strides) stride = 1;
  const CUresult error = encode(
      map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kRank, const_cast<void*>(address), dims, strides, box,
      element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS) return {"cuTensorMapEncodeTiled", "cannot describe this tensor"};
  return {};
}

// Cached encode_tensor_map: a map depends on these arguments alone.
template <int kRank>
Status cached_tensor_map(CUtensorMap* map, const void* address, const uint64_t (&dims)[kRank],
                         const uint64_t (&strides)[kRank - 1], const uint32_t (&box)[kRank]) {
  constexpr size_t kMaxMaps = 1024;
  static std::mutex mutex;
  static std::map<std::array<uint64_t, 3 * kRank>, CUtensorMap> maps;
  std::array<uint64_t, 3 * kRank> key{reinterpret_cast<uintptr_t>(address)};
  std::copy_n(strides, kRank - 1, key.begin() + 1);
  std::copy_n(dims, kRank, key.begin() + kRank);
  std::copy_n(box, kRank, key.begin() + 2 * kRank);
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = maps.find(key);
  if (found == maps.end()) {
    CUtensorMap encoded;
    const Status status = encode_tensor_map(&encoded, address, dims, strides, box);
    if (!status.ok()) return status;
    if (maps.size() == kMaxMaps) maps.clear();
    found = maps.emplace(key, encoded).first;
  }
  *map = found->second;
  return {};
}

}  // namespace deeplab_fast::cuda
