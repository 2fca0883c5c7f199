// Which CUDA kernels may Python call? The list below: pyfused._cuda.<kernel>. It imports without a driver.
//
// A pointer argument is an address, a tensor or None, as for the CPU's kernels. pybind11 would take 1 us more for a call.
#include <pybind11/pybind11.h>

#include <exception>
#include <string>

#include "kernels.h"
#include "pyfused/python_call.h"

namespace py = pybind11;
namespace python = pyfused::python;

#ifndef PYFUSED_ARCHITECTURES
#define PYFUSED_ARCHITECTURES ""
#endif
#ifndef PYFUSED_INTERFACE
#define PYFUSED_INTERFACE ""
#endif

namespace {

thread_local std::string failure;  // what the last launcher of this thread threw; empty if nothing

template <auto kernel>
struct Launcher;

template <typename Result, typename... Arguments, Result (*kernel)(Arguments...)>
struct Launcher<kernel> {
  // Runs without the interpreter's lock.
  static Result run(Arguments... arguments) {
    try {
      return kernel(arguments...);
    } catch (const std::exception& error) {
      failure = error.what();
      return Result();
    }
  }

  static PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    failure.clear();
    PyObject* result = python::Function<&run>::call(self, args, count);
    if (failure.empty()) return result;
    Py_XDECREF(result);
    PyErr_SetString(PyExc_RuntimeError, failure.c_str());
    return nullptr;
  }
};

template <auto kernel>
PyMethodDef function(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Launcher<kernel>::call)), METH_FASTCALL, nullptr};
}

}  // namespace

#define KERNEL(name) function<&pyfused::cuda::name>(#name)

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "pyfused's CUDA kernels; raw pointers and a stream in, nothing out";
  m.attr("architectures") = PYFUSED_ARCHITECTURES;  // CMake's names: "80-real 90-virtual" is code for sm_80, PTX for sm_90
  m.attr("interface") = PYFUSED_INTERFACE;          // pyfused/interface.py's digest when this was built
  python::for_cpu = false;
  static PyMethodDef functions[] = {
      {"use_tensors", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&python::use_tensors)), METH_FASTCALL,
       "use_tensors(capsule, Tensor, Parameter): from now on the capsule's function table reads these two types"},
      KERNEL(layer_norm_forward),
      KERNEL(layer_norm_backward_parts),
      KERNEL(layer_norm_backward),
      KERNEL(rms_norm_forward),
      KERNEL(rms_norm_backward_parts),
      KERNEL(rms_norm_backward),
      KERNEL(linear_forward),
      KERNEL(ffn_forward),
      KERNEL(ffn_activation),
      KERNEL(fourier_mix_scratch),
      KERNEL(fourier_mix_longest),
      KERNEL(fourier_mix_forward),
      KERNEL(gated_ffn_forward),
      KERNEL(gated_ffn_activation),
      KERNEL(gated_ffn_scaled),
      KERNEL(gated_ffn_unscale),
      KERNEL(attention_forward),
      KERNEL(attention_packed_forward),
      KERNEL(attention_decode_forward),
      KERNEL(attention_combine),
      KERNEL(decode_shared),
      KERNEL(decode_blocks),
      KERNEL(decode_scratch),
      KERNEL(decode_most_addresses),
      KERNEL(decode_forward),
      {nullptr, nullptr, 0, nullptr},
  };
  if (PyModule_AddFunctions(m.ptr(), functions)) throw py::error_already_set();
}
