// Dispatch from a runtime DType to the element type of a kernel template.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "api.h"

namespace deeplab_fast::cuda {

// Calls run(T{}) with the element type T of `dtype`. `launcher` is the name in the error.
template <typename Run>
Status with_elements(DType dtype, const char* launcher, Run run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kFloat16:
      return run(__half{});
    case DType::kBFloat16:
      return run(__nv_bfloat16{});
    default:
      return {launcher, "expected float32, float16 or bfloat16"};
  }
}

}  // namespace deeplab_fast::cuda
