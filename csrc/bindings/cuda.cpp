// Launchers of the CUDA kernels. Only builds that contain the kernels compile this file.

#include "bindings/bindings.h"

namespace deeplab_fast::bindings {

CudaLaunchers cuda_launchers() {
  return {cuda::device_info,
          cuda::upsample_argmax_fwd,
          cuda::upsample_cross_entropy_workspace,
          cuda::upsample_cross_entropy_fwd,
          cuda::upsample_cross_entropy_bwd,
          cuda::dilated_conv2d_fwd,
          cuda::dilated_conv2d_fwd_sm90,
          cuda::set_copies_arrive,
          cuda::dilated_conv2d_wgrad,
          cuda::dilated_conv2d_wgrad_sm90,
          cuda::dilated_conv2d_bias_grad,
          cuda::pixel_sums_fwd,
          cuda::pixel_means_fwd,
          cuda::aspp_image_bias_fwd,
          cuda::depthwise_conv2d_fwd,
          cuda::depthwise_conv2d_wgrad};
}

}  // namespace deeplab_fast::bindings
