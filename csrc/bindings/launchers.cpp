// Submodules of launchers: `cuda`, whose launchers launch kernels, and `dry_run`, whose launchers
// do nothing. The emulator's module compiles this file too.

#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "bindings/bindings.h"

namespace deeplab_fast::bindings {
namespace {

// Returns zeros: a successful Status. It can stand for every launcher.
template <typename Result, typename... Args>
Result do_nothing(Args...) {
  return Result{};
}

}  // namespace

CudaLaunchers dry_run_launchers() {
  return {do_nothing, do_nothing, do_nothing, do_nothing, do_nothing, do_nothing,
          do_nothing, do_nothing, do_nothing, do_nothing, do_nothing, do_nothing,
          do_nothing, do_nothing, do_nothing, do_nothing};
}

void bind_launchers(py::module_ m, const CudaLaunchers& launchers) {
  m.def(
      "device_info",
      [device_info = launchers.device_info] {
        const cuda::DeviceInfo info = device_info();
        py::list devices;
        for (const auto& device : info.devices) {
          devices.append(
              py::dict("name"_a = device.name, "major"_a = device.major, "minor"_a = device.minor));
        }
        return py::dict("driver_version"_a = info.driver_version,
                        "runtime_version"_a = info.runtime_version, "devices"_a = devices);
      },
      "Versions of driver and runtime (13.0 is 13000; 0 without a driver), and the devices.");
  m.def("upsample_argmax_fwd", [launch = launchers.upsample_argmax_fwd](
                                   uintptr_t labels, uintptr_t logits, const UpsampleShape& shape,
                                   DType label_dtype, DType logit_dtype, uintptr_t stream) {
    check(
        launch(pointer(labels), pointer(logits), shape, label_dtype, logit_dtype, pointer(stream)));
  });
  m.def("upsample_cross_entropy_workspace", launchers.upsample_cross_entropy_workspace);
  m.def("upsample_cross_entropy_fwd",
        [launch = launchers.upsample_cross_entropy_fwd](
            uintptr_t loss, uintptr_t pixel_losses, uintptr_t log_sum_exp, uintptr_t total_weight,
            uintptr_t workspace, uintptr_t logits, uintptr_t target, bool mean,
            const UpsampleShape& shape, const CrossEntropyParams& params, DType dtype,
            uintptr_t stream) {
          check(launch(pointer<float>(loss), pointer<float>(pixel_losses),
                       pointer<float>(log_sum_exp), pointer<float>(total_weight),
                       pointer(workspace), pointer(logits), pointer<int64_t>(target), mean, shape,
                       params, dtype, pointer(stream)));
        });
  m.def("upsample_cross_entropy_bwd",
        [launch = launchers.upsample_cross_entropy_bwd](
            uintptr_t grad_logits, uintptr_t workspace, uintptr_t grad_loss,
            std::array<int64_t, 3> grad_loss_strides, uintptr_t total_weight, uintptr_t log_sum_exp,
            uintptr_t logits, uintptr_t target, bool channels_last, const UpsampleShape& shape,
            const CrossEntropyParams& params, DType dtype, uintptr_t stream) {
          check(launch(pointer(grad_logits), pointer(workspace), pointer<float>(grad_loss),
                       grad_loss_strides, pointer<float>(total_weight), pointer<float>(log_sum_exp),
                       pointer(logits), pointer<int64_t>(target), channels_last, shape, params,
                       dtype, pointer(stream)));
        });
  const auto def_convolution = [&](const char* name, auto launcher) {
    m.def(
        name,
        [launcher](uintptr_t output, uintptr_t partial_sums, uintptr_t input, uintptr_t residual,
                   uintptr_t image_bias, uintptr_t pixel_sums, const ConvArguments& arguments,
                   uintptr_t stream) {
          std::vector<ConvOutput> outputs = arguments.outputs;
          if (image_bias != 0) outputs.at(0).image_bias = pointer<float>(image_bias);
          if (pixel_sums != 0)
            outputs.at(arguments.summing_branch).pixel_sums = pointer<float>(pixel_sums);
          const ConvEpilogue epilogue{pointer(residual), arguments.range[0], arguments.range[1]};
          check(launcher(pointer(output), pointer<float>(partial_sums), pointer(input), outputs,
                         arguments.sources, arguments.work, epilogue, arguments.shape,
                         arguments.dtype, pointer(stream)));
        },
        "image_bias: of the only output.");
  };
  def_convolution("dilated_conv2d_fwd", launchers.dilated_conv2d_fwd);
  def_convolution("dilated_conv2d_fwd_sm90", launchers.dilated_conv2d_fwd_sm90);
  m.def("set_copies_arrive", launchers.set_copies_arrive);
  const auto def_wgrad = [&](const char* name, auto launcher) {
    m.def(
        name,
        [launcher](uintptr_t partial_sums, uintptr_t grad_output, uintptr_t input,
                   const std::vector<std::tuple<uintptr_t, int32_t, int32_t>>& rows,
                   const ConvWgradWork& work, const ConvWgradShape& shape, DType dtype,
                   uintptr_t stream) {
          std::vector<ConvWgradBranch> branches;
          int32_t first_channel = 0;
          for (const auto& [grad_weight, K, num_taps] : rows) {
            branches.push_back({pointer(grad_weight), K, num_taps, first_channel});
            first_channel += K;
          }
          check(launcher(pointer<float>(partial_sums), pointer(grad_output), pointer(input),
                         branches, work, shape, dtype, pointer(stream)));
        },
        "branches: [(gradient of the weight, K, number of taps)].");
  };
  def_wgrad("dilated_conv2d_wgrad", launchers.dilated_conv2d_wgrad);
  def_wgrad("dilated_conv2d_wgrad_sm90", launchers.dilated_conv2d_wgrad_sm90);
  m.def("dilated_conv2d_bias_grad",
        [launch = launchers.dilated_conv2d_bias_grad](
            uintptr_t grad_bias, uintptr_t partial_sums, uintptr_t grad_output, int64_t num_pixels,
            int32_t K, int32_t num_parts, DType dtype, uintptr_t stream) {
          check(launch(pointer(grad_bias), pointer<float>(partial_sums), pointer(grad_output),
                       num_pixels, K, num_parts, dtype, pointer(stream)));
        });
  m.def("pixel_sums_fwd",
        [launch = launchers.pixel_sums_fwd](uintptr_t sums, uintptr_t input, const PixelRuns& runs,
                                            DType dtype, uintptr_t stream) {
          check(launch(pointer<float>(sums), pointer(input), runs, dtype, pointer(stream)));
        });
  m.def("pixel_means_fwd", [launch = launchers.pixel_means_fwd](uintptr_t means, uintptr_t sums,
                                                                const PixelRuns& runs,
                                                                bool overlaps, uintptr_t stream) {
    check(launch(pointer<float>(means), pointer<float>(sums), runs, overlaps, pointer(stream)));
  });
  m.def("aspp_image_bias_fwd",
        [launch = launchers.aspp_image_bias_fwd](
            uintptr_t image_bias, uintptr_t pooled, uintptr_t means, const AsppWeights& weights,
            const AsppShape& shape, DType dtype, bool overlaps, uintptr_t stream) {
          check(launch(pointer<float>(image_bias), pointer<float>(pooled), pointer<float>(means),
                       weights, shape, dtype, overlaps, pointer(stream)));
        });
  m.def("depthwise_conv2d_fwd", [launch = launchers.depthwise_conv2d_fwd](
                                    uintptr_t output, uintptr_t input, uintptr_t weight,
                                    uintptr_t bias, uintptr_t residual, std::array<float, 2> range,
                                    const DepthwiseShape& shape, DType dtype, uintptr_t stream) {
    const ConvEpilogue epilogue{pointer(residual), range[0], range[1]};
    check(launch(pointer(output), pointer(input), pointer(weight), pointer(bias), epilogue, shape,
                 dtype, pointer(stream)));
  });
  m.def("depthwise_conv2d_wgrad", [launch = launchers.depthwise_conv2d_wgrad](
                                      uintptr_t grad_weight, uintptr_t grad_bias,
                                      uintptr_t partial_sums, uintptr_t grad_output,
                                      uintptr_t input, const DepthwiseShape& shape, int num_parts,
                                      DType dtype, uintptr_t stream) {
    check(launch(pointer(grad_weight), pointer(grad_bias), pointer<float>(partial_sums),
                 pointer(grad_output), pointer(input), shape, num_parts, dtype, pointer(stream)));
  });
}

}  // namespace deeplab_fast::bindings
