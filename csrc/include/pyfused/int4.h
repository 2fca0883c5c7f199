// How does a product read rows of W in int4? In groups of values that share a scale, in float32.
#pragma once

#include "multiply.h"

namespace pyfused::PYFUSED_ISA {

// Two values. A group of kScaleGroup values that share a scale lies in kHalfGroup of them: byte i has value i in its low four bits
// and value i + kHalfGroup in its high four, both in two's complement.
struct int4x2 { int8_t bits; };
constexpr int64_t kScaleGroup = 32, kHalfGroup = kScaleGroup / 2;

// What the scale of weights W is stored as. Rows of int8 have one; each group of int4 has one.
template <class W> struct ScaleOf { using type = float; };
template <> struct ScaleOf<int4x2> { using type = bf16; };

// kWidth low values of a group are these times 2^28: one shift, and x is multiplied by 2^-28 when it is packed. To mask four bits
// and subtract 8 would take two instructions more.
constexpr float kLowStep = 1.0f / (1 << 28);
PYFUSED_INLINE vfloat low_values(vint bytes) { return to_float(bits_as<vint>(bits_as<vuint>(bytes) << 28)); }
PYFUSED_INLINE vfloat high_values(vint bytes) { return to_float(bytes >> 4); }

// Two consecutive scales, each in all lanes: one load for both. The compiler would broadcast them one by one.
PYFUSED_INLINE Pair load_scales(const bf16* p) {
  uint32_t two;
  std::memcpy(&two, p, sizeof(two));
  const vuint u = bits_as<vuint>(rounded(bits_as<vfloat>(two - vuint{})));
  return {bits_as<vfloat>(u << 16), bits_as<vfloat>(u & 0xffff0000u)};
}

// to[i] = the values of a row times their scales, for whole groups.
inline const float* widen_groups(const int4x2* from, const bf16* scale, int64_t count, float* to) {
  for (int64_t c = 0; c < count; c += kScaleGroup) {
    const vfloat step = splat(load_one(scale + c / kScaleGroup));
    for (int64_t q = 0; q < kHalfGroup; q += kWidth) {
      const vint bytes = load_bytes(&from[c / 2 + q].bits);
      store(to + c + q, low_values(bytes) * splat(kLowStep) * step);
      store(to + c + kHalfGroup + q, high_values(bytes) * step);
    }
  }
  return to;
}

// acc[a][r] += the dot product of row a of x, which lie ldx apart, and row r of W, which lie `stream` apart, their scales `steps`.
// Each group is summed, then multiplied by its scale. Two groups of a row go together, for load_scales().
template <int MB, int R>
PYFUSED_INLINE void add_groups(const float* px, int64_t ldx, const int4x2* w, int64_t stream, const bf16* scale, int64_t steps,
                               int64_t groups, vfloat (&acc)[MB][R]) {
  auto add = [&](int64_t g, int r, vfloat by) __attribute__((always_inline)) {
    const int4x2* from = w + r * stream + g * kHalfGroup;
    const float* p = px + g * kScaleGroup;
    vfloat part[MB];
#pragma GCC unroll 4
    for (int64_t q = 0; q < kHalfGroup; q += kWidth) {
      const vint bytes = load_bytes(&from[q].bits);
      const vfloat low = low_values(bytes), high = high_values(bytes);
#pragma GCC unroll 8
      for (int a = 0; a < MB; ++a) {
        const vfloat first = load(p + a * ldx + q) * low;
        part[a] = (q ? part[a] + first : first) + load(p + a * ldx + kHalfGroup + q) * high;
      }
    }
#pragma GCC unroll 8
    for (int a = 0; a < MB; ++a) acc[a][r] += part[a] * by;
  };
  int64_t g = 0;
  for (; g + 2 <= groups; g += 2)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Pair by = load_scales(scale + r * steps + g);
      add(g, r, by.a);
      add(g + 1, r, by.b);
    }
  if (g < groups)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) add(g, r, splat(load_one(scale + r * steps + g)));
}

}  // namespace pyfused::PYFUSED_ISA
