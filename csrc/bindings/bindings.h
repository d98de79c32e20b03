// Helpers of the bindings. Tensors are passed as raw addresses, which Python has validated.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "api.h"

namespace deeplab_fast::bindings {

namespace py = pybind11;
using namespace py::literals;

// Each function fills a module or submodule.
void bind_structs(py::module_& m);
void bind_call_signature(py::module_& m);
void bind_cpu(py::module_ m);
void bind_cuda(py::module_ m);
void bind_schedule(py::module_ m);

template <typename T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Turns a failed Status into a RuntimeError that names the kernel.
inline void check(const Status& status) {
  if (!status.ok()) throw std::runtime_error(std::string(status.kernel) + ": " + status.message);
}

}  // namespace deeplab_fast::bindings
