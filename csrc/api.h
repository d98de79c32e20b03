// What the bindings see of the kernels: dtypes, shapes, status, launcher prototypes.
// Launchers take outputs, inputs, shape, dtype, then stream (CUDA) or num_threads (CPU).
// Strides are in elements. No framework header may be included anywhere under csrc/.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace deeplab_fast {

enum class DType : int { kFloat32, kFloat16, kBFloat16, kInt64, kInt32, kUInt8 };

// Bilinear upsampling of [N, C, H, W] logits (any strides) to [N, out_H, out_W] pixels.
// scale_*: source pixels per output pixel, as PyTorch computes them (see bilinear.h).
struct UpsampleShape {
  int64_t N, C, H, W;
  int64_t stride_N, stride_C, stride_H, stride_W;
  int64_t out_H, out_W;
  float scale_H, scale_W;
  bool align_corners;
};

// kernel: the name of the kernel or step that failed; nullptr on success.
struct Status {
  const char* kernel = nullptr;
  const char* message = nullptr;
  bool ok() const { return kernel == nullptr; }
};

namespace cpu {

// labels [N, out_H, out_W] contiguous, kInt64 | kInt32 | kUInt8.
Status upsample_argmax_fwd(void* labels, const void* logits, const UpsampleShape& shape,
                           DType label_dtype, DType logit_dtype, int num_threads);

}  // namespace cpu

#ifdef DEEPLAB_FAST_WITH_CUDA
namespace cuda {

// Versions as CUDA writes them (13.0 is 13000), 0 where there is no driver.
struct DeviceInfo {
  struct Device {
    std::string name;
    int major, minor;  // compute capability
  };
  int driver_version = 0, runtime_version = 0;
  std::vector<Device> devices;
};

DeviceInfo device_info();

// stream: a cudaStream_t of the current device.
Status upsample_argmax_fwd(void* labels, const void* logits, const UpsampleShape& shape,
                           DType label_dtype, DType logit_dtype, void* stream);

}  // namespace cuda
#endif

}  // namespace deeplab_fast
