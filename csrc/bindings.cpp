// pybind11 module `_C`. Tensors arrive as raw addresses; deeplab_fast/cpu.py and cuda.py validate
// them before. A failed Status becomes a RuntimeError that names the kernel.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "api.h"

namespace py = pybind11;
using namespace py::literals;
using namespace deeplab_fast;

namespace {

void check(const Status& status) {
  if (!status.ok()) throw std::runtime_error(std::string(status.kernel) + ": " + status.message);
}

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

void bind_shapes(py::module_& m) {
  py::enum_<DType>(m, "DType")
      .value("float32", DType::kFloat32)
      .value("float16", DType::kFloat16)
      .value("bfloat16", DType::kBFloat16)
      .value("int64", DType::kInt64)
      .value("int32", DType::kInt32)
      .value("uint8", DType::kUInt8);
  py::class_<UpsampleShape>(m, "UpsampleShape")
      .def(py::init([](std::array<int64_t, 4> shape, std::array<int64_t, 4> strides,
                       std::array<int64_t, 2> size, std::array<float, 2> scales,
                       bool align_corners) {
             return UpsampleShape{shape[0],   shape[1],   shape[2],   shape[3], strides[0],
                                  strides[1], strides[2], strides[3], size[0],  size[1],
                                  scales[0],  scales[1],  align_corners};
           }),
           py::arg("shape"), py::arg("strides"), py::arg("size"), py::arg("scales"),
           py::arg("align_corners"));
}

void bind_cpu(py::module_ m) {
  m.def("upsample_argmax_fwd",
        [](uintptr_t labels, uintptr_t logits, const UpsampleShape& shape, DType label_dtype,
           DType logit_dtype, int num_threads) {
          py::gil_scoped_release release;
          check(cpu::upsample_argmax_fwd(pointer(labels), pointer(logits), shape, label_dtype,
                                         logit_dtype, num_threads));
        });
}

#ifdef DEEPLAB_FAST_WITH_CUDA
void bind_cuda(py::module_ m) {
  m.def(
      "device_info",
      [] {
        const cuda::DeviceInfo info = cuda::device_info();
        py::list devices;
        for (const auto& device : info.devices) {
          devices.append(py::dict("name"_a = device.name, "major"_a = device.major,
                                  "minor"_a = device.minor));
        }
        return py::dict("driver_version"_a = info.driver_version,
                        "runtime_version"_a = info.runtime_version, "devices"_a = devices);
      },
      "Driver and runtime version (13.0 is 13000, no driver 0) and the devices they see.");
  m.def("upsample_argmax_fwd",
        [](uintptr_t labels, uintptr_t logits, const UpsampleShape& shape, DType label_dtype,
           DType logit_dtype, uintptr_t stream) {
          check(cuda::upsample_argmax_fwd(pointer(labels), pointer(logits), shape, label_dtype,
                                          logit_dtype, pointer(stream)));
        });
}
#endif

py::dict build_info() {
#ifdef DEEPLAB_FAST_WITH_CUDA
  const py::object cuda = py::str(DEEPLAB_FAST_CUDA_VERSION);
  const py::object architectures = py::str(DEEPLAB_FAST_CUDA_ARCHITECTURES).attr("split")();
#else
  const py::object cuda = py::none();
  const py::object architectures = py::list();
#endif
  return py::dict("version"_a = DEEPLAB_FAST_VERSION, "compiler"_a = DEEPLAB_FAST_CXX_COMPILER,
                  "cuda"_a = cuda, "architectures"_a = architectures);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of deeplab_fast: submodule cpu, and cuda where it was built.";
  m.def("build_info", &build_info, "Package version, C++ compiler, CUDA version or None.");
  bind_shapes(m);
  bind_cpu(m.def_submodule("cpu"));
#ifdef DEEPLAB_FAST_WITH_CUDA
  bind_cuda(m.def_submodule("cuda"));
#endif
}
