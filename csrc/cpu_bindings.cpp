// Which CPU kernels may Python call? The list below, once per instruction set: pyfused._cpu.<isa>.<kernel>.
#include <pybind11/pybind11.h>

#define PYFUSED_ISA baseline
#include "kernels.h"
#undef PYFUSED_ISA
#ifdef PYFUSED_HAS_avx2
#define PYFUSED_ISA avx2
#include "kernels.h"
#undef PYFUSED_ISA
#endif
#ifdef PYFUSED_HAS_avx512
#define PYFUSED_ISA avx512
#include "kernels.h"
#undef PYFUSED_ISA
#endif

namespace py = pybind11;

// Every kernel runs without the interpreter's lock: it touches no Python object.
#define KERNEL(isa, name) m.def(#name, &pyfused::isa::name, py::call_guard<py::gil_scoped_release>())

#define KERNELS(isa)                                  \
  [](py::module_ m) {                                 \
    KERNEL(isa, layer_norm_forward);                  \
    KERNEL(isa, layer_norm_backward);                 \
    KERNEL(isa, rms_norm_forward);                    \
    KERNEL(isa, rms_norm_backward);                   \
    KERNEL(isa, attention_forward);                   \
    KERNEL(isa, attention_backward);                  \
    KERNEL(isa, relative_bias_forward);               \
    KERNEL(isa, relative_bias_backward);              \
    KERNEL(isa, linear_forward);                      \
    KERNEL(isa, ffn_forward);                         \
    KERNEL(isa, ffn_activation);                      \
    KERNEL(isa, fourier_mix_scratch);                 \
    KERNEL(isa, fourier_mix_forward);                 \
    KERNEL(isa, gated_ffn_forward);                   \
    KERNEL(isa, gated_ffn_activation);                \
  }

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "pyfused's CPU kernels, one submodule per instruction set; raw pointers in, nothing out";
  py::list supported;
  KERNELS(baseline)(m.def_submodule("baseline"));
  supported.append("baseline");
#ifdef PYFUSED_HAS_avx2
  KERNELS(avx2)(m.def_submodule("avx2"));
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    supported.append("avx2");
#endif
#ifdef PYFUSED_HAS_avx512
  KERNELS(avx512)(m.def_submodule("avx512"));
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    supported.append("avx512");
#endif
  m.attr("supported") = supported;  // what this processor can run, weakest first
}
