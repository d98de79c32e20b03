// Helpers of the bindings. Tensors are passed as raw addresses, which Python has validated.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "api.h"

namespace deeplab_fast::bindings {

namespace py = pybind11;
using namespace py::literals;

// The arguments of a convolution that are the same at every launch. The pointers image_bias and
// pixel_sums of an output are null here: each launch sets those of outputs[0] and, if it is not
// negative, outputs[summing_branch].
struct ConvArguments {
  std::vector<ConvOutput> outputs;
  std::vector<ConvSource> sources;
  ConvWork work;
  std::array<float, 2> range;
  ConvShape shape;
  DType dtype;
  int summing_branch;
};

// The functions of api.h's namespace cuda.
struct CudaLaunchers {
  decltype(&cuda::device_info) device_info;
  decltype(&cuda::upsample_argmax_fwd) upsample_argmax_fwd;
  decltype(&cuda::upsample_cross_entropy_workspace) upsample_cross_entropy_workspace;
  decltype(&cuda::upsample_cross_entropy_fwd) upsample_cross_entropy_fwd;
  decltype(&cuda::upsample_cross_entropy_bwd) upsample_cross_entropy_bwd;
  decltype(&cuda::dilated_conv2d_fwd) dilated_conv2d_fwd;
  decltype(&cuda::dilated_conv2d_fwd_sm90) dilated_conv2d_fwd_sm90;
  decltype(&cuda::set_copies_arrive) set_copies_arrive;
  decltype(&cuda::dilated_conv2d_wgrad) dilated_conv2d_wgrad;
  decltype(&cuda::dilated_conv2d_wgrad_sm90) dilated_conv2d_wgrad_sm90;
  decltype(&cuda::dilated_conv2d_bias_grad) dilated_conv2d_bias_grad;
  decltype(&cuda::pixel_sums_fwd) pixel_sums_fwd;
  decltype(&cuda::pixel_means_fwd) pixel_means_fwd;
  decltype(&cuda::aspp_image_bias_fwd) aspp_image_bias_fwd;
  decltype(&cuda::depthwise_conv2d_fwd) depthwise_conv2d_fwd;
  decltype(&cuda::depthwise_conv2d_wgrad) depthwise_conv2d_wgrad;
};

CudaLaunchers cuda_launchers();
CudaLaunchers dry_run_launchers();  // functions that do nothing

// Each function fills a module or submodule.
void bind_structs(py::module_& m);
void bind_call_signature(py::module_& m);
void bind_cpu(py::module_ m);
void bind_schedule(py::module_ m);
void bind_launchers(py::module_ m, const CudaLaunchers& launchers);

template <typename T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Turns a failed Status into a RuntimeError that names the kernel.
inline void check(const Status& status) {
  if (!status.ok()) throw std::runtime_error(std::string(status.kernel) + ": " + status.message);
}

}  // namespace deeplab_fast::bindings
