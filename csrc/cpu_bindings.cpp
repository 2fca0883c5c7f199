// Which CPU kernels may Python call? The list below, once per instruction set: pyfused._cpu.<isa>.<kernel>.
#include <pybind11/pybind11.h>

#include "pyfused/python_call.h"
#include "pyfused/python_same.h"

#ifdef PYFUSED_HAS_avx2
#include <cpuid.h>
#endif

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
namespace python = pyfused::python;

#ifdef PYFUSED_HAS_avx2
// clang 14 does not know has_f16c(). The check of "avx2" covers the system's part: it saves the registers.
static bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

#define KERNEL(isa, name) python::function<&pyfused::isa::name>(#name)

#define KERNELS(isa)                         \
  [](py::module_ m) {                        \
    static PyMethodDef functions[] = {       \
        KERNEL(isa, layer_norm_forward),     \
        KERNEL(isa, layer_norm_backward),    \
        KERNEL(isa, rms_norm_forward),       \
        KERNEL(isa, rms_norm_backward),      \
        KERNEL(isa, attention_forward),      \
        KERNEL(isa, attention_backward),     \
        KERNEL(isa, relative_bias_forward),  \
        KERNEL(isa, relative_bias_backward), \
        KERNEL(isa, linear_forward),         \
        KERNEL(isa, ffn_forward),            \
        KERNEL(isa, ffn_activation),         \
        KERNEL(isa, decode_forward),         \
        KERNEL(isa, fourier_mix_scratch),    \
        KERNEL(isa, fourier_mix_forward),    \
        KERNEL(isa, gated_ffn_forward),      \
        KERNEL(isa, gated_ffn_activation),   \
        KERNEL(isa, mask_structure),         \
        KERNEL(isa, all_zero),               \
        {}};                                 \
    if (PyModule_AddFunctions(m.ptr(), functions)) throw py::error_already_set();\
  }

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "pyfused's CPU kernels, one submodule per instruction set; tensors or raw pointers in, nothing out";
  static PyMethodDef functions[] = {
      {"use_tensors", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&python::use_tensors)), METH_FASTCALL,
       "use_tensors(torch.Tensor.__dlpack_c_exchange_api__, torch.Tensor, torch.nn.Parameter)"},
      {"signature", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&python::signature)), METH_FASTCALL,
       "signature(*args) -> bytes that are equal for calls that differ in values alone, or None"},
      {"prepared", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&python::prepared)), METH_FASTCALL,
       "prepared(launches, forced, levels, otherwise, count, *watchers) -> the function that calls a prepared launch"},
      {"unchanged", &python::unchanged, METH_O, "unchanged(groups) -> whether dicts and types are as before"},
      {"memory", &python::memory, METH_O, "memory(tensors) -> bytes that say where they lie and what they are, or None"},
      {"same_memory", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&python::same_memory)), METH_FASTCALL,
       "same_memory(tensors, known) -> memory(tensors) == known"},
      {}};
  if (PyModule_AddFunctions(m.ptr(), functions)) throw py::error_already_set();
  py::list supported;
  KERNELS(baseline)(m.def_submodule("baseline"));
  supported.append("baseline");
#ifdef PYFUSED_HAS_avx2
  KERNELS(avx2)(m.def_submodule("avx2"));
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())
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
