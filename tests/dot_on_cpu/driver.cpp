// How do the products of csrc/cpu run that need a processor's dot products? Here with the instructions' documented arithmetic in
// plain C++ (multiply.h). dot_emulation.py compiles this file and calls what it exports.
#include "../../csrc/cpu/dot/bfloat16.cpp"
#include "../../csrc/cpu/dot/linear_dynamic.cpp"

namespace pyfused::PYFUSED_ISA {

// One instruction: sums, x and w have kWidth lanes of 4 bytes each.
static void pairs(addr sums, addr x, addr w) {
  const vuint lanes = bits_as<vuint>(load((const float*)w));
  store((float*)sums, Pairs::add(load((const float*)sums), lanes, load((const float*)x)));
}
static void quads(addr sums, addr x, addr w) {
  const vuint lanes = bits_as<vuint>(load((const float*)w));
  const vint sum = bits_as<vint>(load((const float*)sums));
  store((float*)sums, bits_as<vfloat>(Quads::add(sum, lanes, load((const float*)x))));
}

}  // namespace pyfused::PYFUSED_ISA

#define EXPORT(name) extern const auto pyfused_##name = &pyfused::PYFUSED_ISA::name
extern "C" {
EXPORT(linear_forward);
EXPORT(linear_dynamic_forward);
EXPORT(ffn_forward);
EXPORT(gated_ffn_forward);
EXPORT(pairs);
EXPORT(quads);
}
