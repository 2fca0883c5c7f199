// How do the products of csrc/cpu run that need a processor's dot products? Here with the instructions' documented arithmetic in
// plain C++ (multiply.h, and tiles.h beside this file). dot_emulation.py compiles this file and calls what it exports.
#if defined(PYFUSED_EMULATED_TILES)
#include "tiles.h"
#endif

#include "../../csrc/cpu/dot/bfloat16.cpp"
#include "../../csrc/cpu/dot/linear_dynamic.cpp"
#include "../../csrc/cpu/dot/sums.cpp"

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

#if defined(PYFUSED_EMULATED_TILES)
template <class Product> static void one_tile(addr sums, addr w, addr x, const Product& product) {
  const TilesInUse tiles;
  _tile_loadd(0, (const void*)sums, 64);
  _tile_loadd(1, (const void*)w, 64);
  _tile_loadd(2, (const void*)x, 64);
  product();
  _tile_stored(0, (void*)sums, 64);
}

// One instruction: sums, w and x have 16 rows of 64 bytes each.
static void tile_pairs(addr sums, addr w, addr x) { one_tile(sums, w, x, [] { _tile_dpbf16ps(0, 1, 2); }); }
static void tile_quads(addr sums, addr w, addr x) { one_tile(sums, w, x, [] { _tile_dpbsud(0, 1, 2); }); }

// How often threads began to use tiles, and how often they ended.
static void tiles_used(addr counts, addr, addr) {
  ((int64_t*)counts)[0] = tiles_on_cpu::configured;
  ((int64_t*)counts)[1] = tiles_on_cpu::released;
}
#endif

}  // namespace pyfused::PYFUSED_ISA

#define EXPORT(name) extern const auto pyfused_##name = &pyfused::PYFUSED_ISA::name
extern "C" {
EXPORT(linear_forward);
EXPORT(linear_dynamic_forward);
EXPORT(ffn_forward);
EXPORT(gated_ffn_forward);
EXPORT(pairs);
EXPORT(quads);
#if defined(PYFUSED_EMULATED_TILES)
EXPORT(tile_pairs);
EXPORT(tile_quads);
EXPORT(tiles_used);
#endif
}
