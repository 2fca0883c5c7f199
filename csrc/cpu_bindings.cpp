// Which CPU kernels may Python call? The list below, once per instruction set: pyfused._cpu.<isa>.<kernel>.
#include <pybind11/pybind11.h>

#include "pyfused/python_call.h"
#include "pyfused/python_same.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#ifdef PYFUSED_HAS_baseline
#define PYFUSED_ISA baseline
#include "kernels.h"
#undef PYFUSED_ISA
#endif
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
#ifdef PYFUSED_HAS_avx2_vnni
#define PYFUSED_ISA avx2_vnni
#include "dot/kernels.h"
#undef PYFUSED_ISA
#endif
#ifdef PYFUSED_HAS_avx512_vnni
#define PYFUSED_ISA avx512_vnni
#include "dot/kernels.h"
#undef PYFUSED_ISA
#endif
#ifdef PYFUSED_HAS_avx512_bf16
#define PYFUSED_ISA avx512_bf16
#include "dot/kernels.h"
#undef PYFUSED_ISA
#endif
#ifdef PYFUSED_HAS_avx512_amx
#define PYFUSED_ISA avx512_amx
#include "dot/kernels.h"
#undef PYFUSED_ISA
#endif

namespace py = pybind11;
namespace python = pyfused::python;

#ifndef PYFUSED_INTERFACE
#define PYFUSED_INTERFACE ""
#endif

#if defined(__x86_64__)
// What the processor says of itself, where compilers differ in what __builtin_cpu_supports knows. Whether the system saves the
// registers is covered by its answers for "avx2" and "avx512f".
static bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
static bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
// Bits of eax in leaf 7, part 1.
static bool has_of_part_one(int bit) {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || eax < 1) return false;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> bit & 1);
}
static bool has_avx2_vnni() { return has_avx2() && has_of_part_one(4); }
static bool has_avx512_vnni() {
  unsigned eax, ebx, ecx, edx;
  return has_avx512() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (ecx >> 11 & 1);
}
static bool has_avx512_bf16() { return has_avx512_vnni() && has_of_part_one(5); }
// Linux keeps AMX's registers for a process that asks, once and for all threads; its signals then need more stack. So only a forced
// set asks (extensions.py). torch's library asks at its first product.
constexpr long kSupportedRegisters = 0x1021, kAskForRegisters = 0x1023, kTileData = 18;  // ARCH_GET_XCOMP_SUPP, ARCH_REQ_XCOMP_PERM
static bool has_avx512_amx() {
#if defined(__linux__)
  constexpr unsigned of_bf16 = 1u << 22, of_tiles = 1u << 24, of_int8 = 1u << 25, all = of_bf16 | of_tiles | of_int8;
  unsigned eax, ebx, ecx, edx;
  unsigned long supported = 0;
  return has_avx512_bf16() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & all) == all &&
         syscall(SYS_arch_prctl, kSupportedRegisters, &supported) == 0 && (supported >> kTileData & 1);
#else
  return false;
#endif
}
static bool ask_for_tiles() {
#if defined(__linux__)
  return has_avx512_amx() && syscall(SYS_arch_prctl, kAskForRegisters, kTileData) == 0;
#else
  return false;
#endif
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
        KERNEL(isa, decode_copies),          \
        KERNEL(isa, fourier_mix_scratch),    \
        KERNEL(isa, fourier_mix_forward),    \
        KERNEL(isa, gated_ffn_forward),      \
        KERNEL(isa, gated_ffn_activation),   \
        KERNEL(isa, mask_structure),         \
        KERNEL(isa, all_zero),               \
        {}};                                 \
    if (PyModule_AddFunctions(m.ptr(), functions)) throw py::error_already_set();\
  }

#define OF_INTEGERS(isa) KERNEL(isa, linear_dynamic_forward)
#define OF_BFLOAT16(isa) KERNEL(isa, linear_forward), KERNEL(isa, ffn_forward), KERNEL(isa, gated_ffn_forward)
#define DOT_PRODUCTS(...)                                                          \
  [](py::module_ m) {                                                              \
    static PyMethodDef functions[] = {__VA_ARGS__, {}};                            \
    if (PyModule_AddFunctions(m.ptr(), functions)) throw py::error_already_set();  \
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
  m.attr("interface") = PYFUSED_INTERFACE;  // pyfused/interface.py's digest when this was built
  py::list supported;
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
#ifdef PYFUSED_HAS_baseline
  KERNELS(baseline)(m.def_submodule("baseline"));
  supported.append("baseline");
#endif
#ifdef PYFUSED_HAS_avx2
  KERNELS(avx2)(m.def_submodule("avx2"));
  if (has_avx2()) supported.append("avx2");
#endif
#ifdef PYFUSED_HAS_avx2_vnni
  DOT_PRODUCTS(OF_INTEGERS(avx2_vnni))(m.def_submodule("avx2_vnni"));
  if (has_avx2_vnni()) supported.append("avx2_vnni");
#endif
#ifdef PYFUSED_HAS_avx512
  KERNELS(avx512)(m.def_submodule("avx512"));
  if (has_avx512()) supported.append("avx512");
#endif
#ifdef PYFUSED_HAS_avx512_vnni
  DOT_PRODUCTS(OF_INTEGERS(avx512_vnni))(m.def_submodule("avx512_vnni"));
  if (has_avx512_vnni()) supported.append("avx512_vnni");
#endif
#ifdef PYFUSED_HAS_avx512_bf16
  DOT_PRODUCTS(OF_INTEGERS(avx512_bf16), OF_BFLOAT16(avx512_bf16))(m.def_submodule("avx512_bf16"));
  if (has_avx512_bf16()) supported.append("avx512_bf16");
#endif
#ifdef PYFUSED_HAS_avx512_amx
  DOT_PRODUCTS(OF_INTEGERS(avx512_amx), OF_BFLOAT16(avx512_amx))(m.def_submodule("avx512_amx"));
  if (has_avx512_amx()) supported.append("avx512_amx");
  m.def("ask_for_tiles", &ask_for_tiles);
#endif
  m.attr("supported") = supported;  // what this processor can run, weakest first
}
