// `call_signature`: the arguments of a call as bytes, which are part of the key of its launch plan.

#include <pybind11/gil_safe_call_once.h>

#include <string>

#include "bindings/bindings.h"

namespace deeplab_fast::bindings {
namespace {

// Writes arguments one after the other, each preceded by a letter for its type and, if its length
// can vary, by that length. So two signatures are equal only if all arguments are.
class SignatureWriter {
 public:
  SignatureWriter(PyObject* tensor_type, py::handle device)
      : tensor_type_(tensor_type), device_(device) {
    signature_.reserve(1024);  // enough for aspp
  }

  const std::string& signature() const { return signature_; }

  void write(PyObject* value) {
    if (value == Py_None) {
      signature_ += 'n';
    } else if (PyBool_Check(value)) {
      signature_ += value == Py_True ? 'T' : 'F';
    } else if (PyLong_Check(value)) {
      write_integer(value);
    } else if (PyFloat_Check(value)) {
      signature_ += 'f';
      write_bytes(PyFloat_AS_DOUBLE(value));
    } else if (PyUnicode_Check(value)) {
      write_string(value);
    } else if (PyList_Check(value) || PyTuple_Check(value)) {
      const Py_ssize_t size = PySequence_Fast_GET_SIZE(value);
      signature_ += 'l';
      write_bytes(size);
      for (Py_ssize_t i = 0; i < size; ++i) write(PySequence_Fast_GET_ITEM(value, i));
    } else if (is_tensor(value)) {
      write_tensor(value);
    } else {
      signature_ += 'o';  // a dtype: each is a single object that lives as long as torch
      write_bytes(value);
    }
  }

 private:
  template <typename T>
  void write_bytes(const T& value) {
    signature_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }

  bool is_tensor(PyObject* value) {
    const int result = PyObject_IsInstance(value, tensor_type_);
    if (result < 0) throw py::error_already_set();
    return result == 1;
  }

  void write_integer(PyObject* value) {
    const long long number = PyLong_AsLongLong(value);
    if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
    signature_ += 'i';
    write_bytes(number);
  }

  void write_string(PyObject* value) {
    Py_ssize_t size;
    const char* text = PyUnicode_AsUTF8AndSize(value, &size);
    if (text == nullptr) throw py::error_already_set();
    signature_ += 's';
    write_bytes(size);
    signature_.append(text, static_cast<size_t>(size));
  }

  // Shape, strides, dtype and, if it is not the device of the call, the device.
  void write_tensor(PyObject* tensor) {
    static PyObject* const shape = PyUnicode_InternFromString("shape");
    static PyObject* const stride = PyUnicode_InternFromString("stride");
    static PyObject* const dtype = PyUnicode_InternFromString("dtype");
    static PyObject* const device = PyUnicode_InternFromString("device");
    signature_ += 't';
    write(owned(PyObject_GetAttr(tensor, shape)).ptr());
    write(owned(PyObject_CallMethodNoArgs(tensor, stride)).ptr());
    write_bytes(owned(PyObject_GetAttr(tensor, dtype)).ptr());
    const py::object own = owned(PyObject_GetAttr(tensor, device));
    const int equal = PyObject_RichCompareBool(own.ptr(), device_.ptr(), Py_EQ);
    if (equal < 0) throw py::error_already_set();
    if (!equal) {
      signature_ += 'd';  // so that the device is not taken for a string that follows the tensor
      write(owned(PyObject_Str(own.ptr())).ptr());
    }
  }

  static py::object owned(PyObject* reference) {
    if (reference == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(reference);
  }

  PyObject* tensor_type_;
  py::handle device_;
  std::string signature_;
};

}  // namespace

void bind_call_signature(py::module_& m) {
  m.def(
      "call_signature",
      [](py::tuple arguments, py::object device) {
        // Not an ordinary static: its lock would deadlock with the GIL, which an import can
        // release.
        PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> tensor_type;
        tensor_type.call_once_and_store_result(
            [] { return py::object(py::module_::import("torch").attr("Tensor")); });
        SignatureWriter writer(tensor_type.get_stored().ptr(), device);
        writer.write(arguments.ptr());
        return py::bytes(writer.signature());
      },
      "arguments"_a, "device"_a,
      "Shapes, strides, dtypes and devices of all tensors, and the values of all other arguments. "
      "The device of a tensor is left out if it is `device`.");
}

}  // namespace deeplab_fast::bindings
