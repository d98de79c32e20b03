// Submodule `cpu`: launchers of the CPU kernels. They release the GIL.

#include <pybind11/stl.h>

#include <array>

#include "bindings/bindings.h"

namespace deeplab_fast::bindings {

void bind_cpu(py::module_ m) {
  m.doc() = "CPU kernels.";
  m.def("upsample_argmax_fwd", [](uintptr_t labels, uintptr_t logits, const UpsampleShape& shape,
                                  DType label_dtype, DType logit_dtype, int num_threads) {
    py::gil_scoped_release release;
    check(cpu::upsample_argmax_fwd(pointer(labels), pointer(logits), shape, label_dtype,
                                   logit_dtype, num_threads));
  });
  m.def(
      "upsample_cross_entropy_fwd",
      [](uintptr_t loss, uintptr_t log_sum_exp, uintptr_t logits, uintptr_t target,
         const UpsampleShape& shape, const CrossEntropyParams& params, int num_threads) {
        CrossEntropySums sums;
        {
          py::gil_scoped_release release;
          check(cpu::upsample_cross_entropy_fwd(
              pointer<float>(loss), pointer<float>(log_sum_exp), &sums, pointer<float>(logits),
              pointer<int64_t>(target), shape, params, num_threads));
        }
        return py::make_tuple(sums.loss, sums.weight, sums.bad_pixel);
      },
      "Returns the sum of losses, the sum of weights, and the first pixel whose target is not a "
      "class, or -1.");
  m.def("upsample_cross_entropy_bwd",
        [](uintptr_t grad_logits, uintptr_t grad_loss, std::array<int64_t, 3> grad_loss_strides,
           uintptr_t log_sum_exp, uintptr_t logits, uintptr_t target, const UpsampleShape& shape,
           const CrossEntropyParams& params, int num_threads) {
          py::gil_scoped_release release;
          check(cpu::upsample_cross_entropy_bwd(
              pointer<float>(grad_logits), pointer<float>(grad_loss), grad_loss_strides,
              pointer<float>(log_sum_exp), pointer<float>(logits), pointer<int64_t>(target), shape,
              params, num_threads));
        });
}

}  // namespace deeplab_fast::bindings
