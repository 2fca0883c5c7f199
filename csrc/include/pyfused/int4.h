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

#if defined(__AVX512F__)
// AVX-512 reads four groups of a row at once. A permutation of a table takes the low four bits of each of 16 words for an index, so a
// shift and a permutation give 16 values in float32, and a conversion would be a third instruction. x is packed in the order in which
// they come: the value of shift 8 b + 4 h and lane 4 g + e is that of byte 4 e + b of group g, of its low bits (h = 0) or high ones.
constexpr int64_t kGroupsAtOnce = 4;

// Packs the next 128 values of a row of x, of which `rest` are left: whole groups.
template <int B> PYFUSED_INLINE vfloat every_fourth(const vfloat (&v)[4]) {
  auto of_two = [](vfloat a, vfloat b) __attribute__((always_inline)) {  // in both halves
    return shuffled(a, b, Lanes<B, B + 4, B + 8, B + 12, B + 16, B + 20, B + 24, B + 28, B, B + 4, B + 8, B + 12, B + 16,
                                B + 20, B + 24, B + 28>{});
  };
  return shuffled(of_two(v[0], v[1]), of_two(v[2], v[3]), Lanes<0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23>{});
}
template <class X> PYFUSED_INLINE void pack_groups(const X* from, int64_t rest, float* to) {
  for (int64_t h = 0; h < 2; ++h) {
    vfloat v[kGroupsAtOnce];
    for (int64_t g = 0; g < kGroupsAtOnce; ++g)
      v[g] = g * kScaleGroup < rest ? load(from + g * kScaleGroup + h * kHalfGroup) : vfloat{};
    store(to + h * kWidth, every_fourth<0>(v));
    store(to + (2 + h) * kWidth, every_fourth<1>(v));
    store(to + (4 + h) * kWidth, every_fourth<2>(v));
    store(to + (6 + h) * kWidth, every_fourth<3>(v));
  }
}

// acc[a][r] += the dot product of row a of x, which lie ldx apart, and row r of W, which lie `stream` apart, their scales `steps`.
// Each lane's eight values are summed, then multiplied by their scale.
template <int MB, int R>
PYFUSED_INLINE void add_groups(const float* px, int64_t ldx, const int4x2* w, int64_t stream, const bf16* scale, int64_t steps,
                               int64_t groups, vfloat (&acc)[MB][R]) {
  const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  // Of four bfloat16 in each quarter of a register, the quarter's own as float32 in its four lanes.
  const __m512i quarters = _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_set_m128i(_mm_set1_epi32(0x03028080), _mm_set1_epi32(0x01008080))),
      _mm256_set_m128i(_mm_set1_epi32(0x07068080), _mm_set1_epi32(0x05048080)), 1);
  auto add = [&](int64_t g, int r, __m512i words, uint64_t scales) __attribute__((always_inline)) {
    const float* p = px + g * kScaleGroup;
    const vfloat by = (vfloat)_mm512_shuffle_epi8(_mm512_set1_epi64((int64_t)scales), quarters);
    vfloat part[MB];
#pragma GCC unroll 8
    for (int q = 0; q < 8; ++q) {
      const vfloat value = (vfloat)_mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * q), table);
#pragma GCC unroll 8
      for (int a = 0; a < MB; ++a) {
        const vfloat u = load(p + a * ldx + q * kWidth);
        part[a] = q ? part[a] + u * value : u * value;
      }
    }
#pragma GCC unroll 8
    for (int a = 0; a < MB; ++a) acc[a][r] += part[a] * by;
  };
  int64_t g = 0;
  for (; g + kGroupsAtOnce <= groups; g += kGroupsAtOnce)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      uint64_t scales;
      std::memcpy(&scales, scale + r * steps + g, sizeof(scales));
      add(g, r, _mm512_loadu_si512(w + r * stream + g * kHalfGroup), scales);
    }
  if (const int64_t rest = groups - g)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      uint64_t scales = 0;
      std::memcpy(&scales, scale + r * steps + g, rest * sizeof(bf16));
      add(g, r, _mm512_maskz_loadu_epi32((__mmask16)((1u << 4 * rest) - 1), w + r * stream + g * kHalfGroup), scales);
    }
}
#else
constexpr int64_t kGroupsAtOnce = 1;

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
#endif

}  // namespace pyfused::PYFUSED_ISA
