// From the dtype of a call to the element type of a kernel.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "api.h"

namespace deeplab_fast::cuda {

// run(T{}), where T are the elements of tensors of `dtype`. launcher is named in the refusal.
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
