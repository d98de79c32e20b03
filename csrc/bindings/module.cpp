// The extension module `_C`: structs and constants of api.h, and the submodules cpu, schedule,
// dry_run and, in a CUDA build, cuda.

#include "bindings/bindings.h"

namespace deeplab_fast::bindings {
namespace {

py::dict build_info() {
#ifdef DEEPLAB_FAST_CUDA_VERSION
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
  m.doc() =
      "Compiled kernels of deeplab_fast: submodules cpu, schedule, dry_run, and cuda if built.";
  m.def("build_info", &build_info,
        "Version of the package, C++ compiler, CUDA version or None, and GPU architectures.");
  bind_structs(m);
  bind_call_signature(m);
  bind_cpu(m.def_submodule("cpu"));
  bind_schedule(m.def_submodule("schedule"));
  bind_launchers(m.def_submodule("dry_run",
                                 "The launchers of `cuda`, which do nothing here: what "
                                 "calls cost on the host can be measured with them."),
                 dry_run_launchers());
#ifdef DEEPLAB_FAST_CUDA_VERSION
  bind_launchers(
      m.def_submodule("cuda", "CUDA kernels, launched on a stream of the current device."),
      cuda_launchers());
#endif
}

}  // namespace deeplab_fast::bindings
