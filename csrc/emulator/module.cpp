// Extension module `_emulated`: the CUDA kernels compiled for the CPU in submodule cuda, and the
// emulator's options. Its launchers take the structs of `_C`.

#include <pybind11/stl.h>

#include <map>
#include <string>
#include <utility>

#include "bindings/bindings.h"
#include "emulator/simt.h"

namespace deeplab_fast::bindings {

PYBIND11_MODULE(_emulated, m) {
  m.doc() = "CUDA kernels of deeplab_fast, compiled for the CPU.";
  py::module_::import("deeplab_fast._C");  // registers the structs
  bind_launchers(m.def_submodule("cuda"), cuda_launchers());
  m.def(
      "set_seed", [](uint64_t seed) { return std::exchange(emulator::options.seed, seed); },
      "Sets the seed that orders threads and asynchronous copies; returns the previous one.");
  m.def(
      "set_shared_memory_limit",
      [](size_t bytes) { return std::exchange(emulator::options.shared_memory_limit, bytes); },
      "Sets the bytes of shared memory that a block can have; returns the previous limit.");
  m.def(
      "set_clusters",
      [](std::map<std::string, std::pair<int64_t, int64_t>> clusters) {
        return std::exchange(emulator::options.clusters, std::move(clusters));
      },
      "Runs only the clusters (begin, end) of the kernels named; returns the previous ranges. A "
      "negative begin counts from the end.");
  m.def("launch_counts", &emulator::launch_counts, "Number of launches of each kernel.");
}

}  // namespace deeplab_fast::bindings
