// Stands in for CUDA's header of this name: tensor maps, in an encoding of our own.
// cuTensorMapEncodeTiled fails for the arguments that the CUDA driver API documents as invalid.
#pragma once

#include <cstdint>
#include <cstring>

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1, CUDA_ERROR_INVALID_CONTEXT = 201 };

struct alignas(64) CUtensorMap {
  cuuint64_t opaque[16];
};

enum CUtensorMapDataType {
  CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6,
  CU_TENSOR_MAP_DATA_TYPE_FLOAT32 = 7,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9
};
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle {
  CU_TENSOR_MAP_SWIZZLE_NONE = 0,
  CU_TENSOR_MAP_SWIZZLE_32B,
  CU_TENSOR_MAP_SWIZZLE_64B,
  CU_TENSOR_MAP_SWIZZLE_128B
};
enum CUtensorMapL2promotion {
  CU_TENSOR_MAP_L2_PROMOTION_NONE = 0,
  CU_TENSOR_MAP_L2_PROMOTION_L2_64B,
  CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
  CU_TENSOR_MAP_L2_PROMOTION_L2_256B
};
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

namespace deeplab_fast::emulator {

// The contents of a CUtensorMap. Dimensions are innermost first; strides[0] is the size of an
// element.
struct TensorMap {
  static constexpr uint32_t kMagic = 0x7e2507a9;
  uint32_t magic;
  uint32_t rank, element_bytes, swizzle;
  uint64_t address;
  uint64_t dims[5], strides[5];
  uint16_t box[5];
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

// Threads start without a current context; cudaSetDevice gives them one.
inline thread_local bool has_context = false;

inline CUresult encode_tiled(CUtensorMap* encoded, CUtensorMapDataType type, cuuint32_t rank,
                             void* address, const cuuint64_t* dims, const cuuint64_t* strides,
                             const cuuint32_t* box, const cuuint32_t* element_strides,
                             CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                             CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (!has_context) return CUDA_ERROR_INVALID_CONTEXT;
  constexpr CUresult kInvalid = CUDA_ERROR_INVALID_VALUE;
  if (reinterpret_cast<uintptr_t>(encoded) % 64 != 0 || rank < 1 || rank > 5) return kInvalid;
  TensorMap map{};
  map.magic = TensorMap::kMagic;
  map.rank = rank;
  map.element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
  map.swizzle = swizzle;
  map.address = reinterpret_cast<uintptr_t>(address);
  map.strides[0] = map.element_bytes;
  if (map.address == 0 || map.address % 16 != 0) return kInvalid;
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (dims[i] < 1 || dims[i] > uint64_t{1} << 32) return kInvalid;
    if (box[i] < 1 || box[i] > 256 || element_strides[i] != 1) return kInvalid;
    map.dims[i] = dims[i];
    map.box[i] = static_cast<uint16_t>(box[i]);
    if (i == 0) continue;
    if (strides[i - 1] % 16 != 0 || strides[i - 1] >= uint64_t{1} << 40) return kInvalid;
    map.strides[i] = strides[i - 1];
  }
  const cuuint32_t row_bytes = box[0] * map.element_bytes;
  if (row_bytes % 16 != 0) return kInvalid;
  if (swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && row_bytes > 16u << swizzle) return kInvalid;
  memset(encoded, 0, sizeof(*encoded));
  memcpy(encoded, &map, sizeof(map));
  return CUDA_SUCCESS;
}

}  // namespace deeplab_fast::emulator
