// Which CUDA kernels may Python call? The list below: pyfused._cuda.<kernel>. It imports without a driver.
#include <pybind11/pybind11.h>

#include "kernels.h"

namespace py = pybind11;

#ifndef PYFUSED_ARCHITECTURES
#define PYFUSED_ARCHITECTURES ""
#endif
#ifndef PYFUSED_INTERFACE
#define PYFUSED_INTERFACE ""
#endif

// Every launcher runs without the interpreter's lock: it touches no Python object.
#define KERNEL(name) m.def(#name, &pyfused::cuda::name, py::call_guard<py::gil_scoped_release>())

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "pyfused's CUDA kernels; raw pointers and a stream in, nothing out";
  m.attr("architectures") = PYFUSED_ARCHITECTURES;  // CMake's names: "80-real 90-virtual" is code for sm_80, PTX for sm_90
  m.attr("interface") = PYFUSED_INTERFACE;          // pyfused/interface.py's digest when this was built
  KERNEL(layer_norm_forward);
  KERNEL(layer_norm_backward_parts);
  KERNEL(layer_norm_backward);
  KERNEL(rms_norm_forward);
  KERNEL(rms_norm_backward_parts);
  KERNEL(rms_norm_backward);
  KERNEL(linear_forward);
  KERNEL(ffn_forward);
  KERNEL(ffn_activation);
  KERNEL(fourier_mix_scratch);
  KERNEL(fourier_mix_longest);
  KERNEL(fourier_mix_forward);
  KERNEL(gated_ffn_forward);
  KERNEL(gated_ffn_activation);
  KERNEL(gated_ffn_scaled);
  KERNEL(gated_ffn_unscale);
  KERNEL(attention_forward);
  KERNEL(attention_packed_forward);
  KERNEL(attention_decode_forward);
  KERNEL(attention_combine);
  KERNEL(decode_shared);
  KERNEL(decode_blocks);
  KERNEL(decode_scratch);
  KERNEL(decode_most_addresses);
  KERNEL(decode_forward);
}
