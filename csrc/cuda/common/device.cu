// CUDA versions and devices of this machine; all zeros if there is no driver.

#include <cuda_runtime.h>

#include "api.h"

namespace deeplab_fast::cuda {

DeviceInfo device_info() {
  DeviceInfo info;
  cudaDriverGetVersion(&info.driver_version);
  cudaRuntimeGetVersion(&info.runtime_version);
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // clears it, or the next launch would report it
    return info;
  }
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties{};
    cudaGetDeviceProperties(&properties, i);
    info.devices.push_back({properties.name, properties.major, properties.minor});
  }
  return info;
}

}  // namespace deeplab_fast::cuda
