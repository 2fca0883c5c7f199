// How does a product multiply x by W? Elements in float32; or, on newer processors, groups of neighbours with one instruction.
//
// x is packed and W is read in lanes of 32 bits. A lane is a group of kGroup neighbours along K: one float32 (Elements), two
// bfloat16 (Pairs) or four int8 (Quads). nn.Linear stores a row's K together, so such a group of W is one word of memory. W is
// never packed, and these two need not widen it.
//
// A machine that builds this may lack the two instructions. So PYFUSED_EMULATED_DOT gives their documented arithmetic in plain C++,
// and the tests run the same products with it.
#pragma once

#include "simd.h"

#if defined(__AVX512BF16__) || defined(PYFUSED_EMULATED_DOT)
#define PYFUSED_DOT_BF16
#endif
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(PYFUSED_EMULATED_DOT)
#define PYFUSED_DOT_INT8
#endif

namespace pyfused::PYFUSED_ISA {

typedef uint32_t lane32 __attribute__((aligned(1), may_alias));  // two bfloat16 or four int8, anywhere in memory

// ---- two vectors at once --------------------------------------------------------------------------------------------

struct Pair { vfloat a, b; };
constexpr int64_t kPairStep = 2 * kWidth;

// 2 kWidth consecutive elements as float32. bfloat16 gives the even ones, then the odd ones: one load, shift and mask.
// x is stored in the order of the weights' pairs, so a dot product is right in either order.
template <class T> PYFUSED_INLINE Pair load_pair(const T* p) { return {load(p), load(p + kWidth)}; }
PYFUSED_INLINE Pair load_pair(const bf16* p) {
  vuint u;
  std::memcpy(&u, p, sizeof(u));
  return {bits_as<vfloat>(u << 16), bits_as<vfloat>(u & 0xffff0000u)};
}
template <class T> PYFUSED_INLINE Pair load_pair_partial(const T* p, int64_t n) {
  T lanes[2 * kWidth] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load_pair(lanes);
}

// 2 kWidth elements of x in the order of load_pair(W*).
template <class W, class X> PYFUSED_INLINE Pair pair_for(const X* p) { return {load(p), load(p + kWidth)}; }
template <int... I> PYFUSED_INLINE Pair even_and_odd(Pair p, Lanes<I...>) {
  return {shuffled(p.a, p.b, Lanes<(2 * I)...>{}), shuffled(p.a, p.b, Lanes<(2 * I + 1)...>{})};
}
template <> PYFUSED_INLINE Pair pair_for<bf16>(const bf16* p) { return load_pair(p); }
template <> PYFUSED_INLINE Pair pair_for<bf16>(const float* p) { return even_and_odd({load(p), load(p + kWidth)}, AllLanes{}); }

// Values in the order of load_pair(W*) in their own order again.
template <int... I> PYFUSED_INLINE Pair zipped(Pair p, Lanes<I...>) {
  return {shuffled(p.a, p.b, Lanes<(I / 2 + I % 2 * kWidth)...>{}),
          shuffled(p.a, p.b, Lanes<(kWidth / 2 + I / 2 + I % 2 * kWidth)...>{})};
}
template <class W> PYFUSED_INLINE Pair in_order(Pair p) { return p; }
template <> PYFUSED_INLINE Pair in_order<bf16>(Pair p) { return zipped(p, AllLanes{}); }

// ---- elements in float32 --------------------------------------------------------------------------------------------

struct Elements {
  static constexpr int kGroup = 1;
  static constexpr int64_t kDepth = 384;  // of K at a time: a panel of 384 x 16 floats is 24 KB
  // Most products summed in one register: longer chains lose bits. With 256 a sum still has 0.8 of the error of MKL's for AVX-512,
  // and a product takes 1% less time.
  static constexpr int64_t kChain = kWidth == 16 ? 256 : 128;
  using Lane = float;
  using Sum = vfloat;

  static PYFUSED_INLINE vfloat add(vfloat sum, float w, vfloat x) { return sum + splat(w) * x; }

  // The next 2 kWidth elements of a row of W for a gemv, or the last ones.
  template <class W> static PYFUSED_INLINE Pair some(const W* from) { return load_pair(from); }
  template <class W> static PYFUSED_INLINE Pair some(const W* from, int64_t rest) { return load_pair_partial(from, rest); }

  // The next kWidth lanes of a row of x with `rest` elements left. The last argument is for Quads.
  template <class X> static PYFUSED_INLINE vfloat lanes(const X* from, int64_t rest, float) {
    return rest >= kWidth ? load(from) : load_partial(from, rest);
  }

  // `count` elements of a row of W as lanes, in `to` if they have to be converted.
  static const float* row(const float* from, int64_t, float*) { return from; }
  template <class H> static const float* row(const H* from, int64_t count, float* to) {
    int64_t c = 0;
    for (; c + kWidth <= count; c += kWidth) store(to + c, load(from + c));
    for (; c < count; ++c) to[c] = load_one(from + c);
    return to;
  }
};

// ---- groups of halves or bytes --------------------------------------------------------------------------------------

// `count` elements of a row of W as lanes. A last group that is not whole is filled with zeros, in `to`.
template <int kGroup, class W> inline const lane32* whole_groups(const W* from, int64_t count, float* to) {
  if (count % kGroup == 0) return (const lane32*)from;
  std::memset(to, 0, (count + kGroup - 1) / kGroup * sizeof(float));
  std::memcpy(to, from, count * sizeof(W));
  return (const lane32*)to;
}

#if defined(PYFUSED_EMULATED_DOT)
#define PYFUSED_DOT __attribute__((noinline))  // once, not in every place of a tile: it compiles in half the time
PYFUSED_INLINE float without_denormals(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }

// The exact product added to a sum, with one rounding. Denormals are zeros, in and out.
PYFUSED_INLINE float flushing_fma(uint32_t x, uint32_t w, float sum) {
  const float a = without_denormals(bits_as<float>(x)), b = without_denormals(bits_as<float>(w));
  return without_denormals(__builtin_fmaf(a, b, without_denormals(sum)));
}
#else
#define PYFUSED_DOT PYFUSED_INLINE
#endif

#if defined(PYFUSED_DOT_BF16)
// Two bfloat16 of each lane of x times those of w, added to float32 sums: vdpbf16ps. It rounds to nearest even after each of the
// two, whatever MXCSR says, and takes denormal numbers for zero.
struct Pairs {
  static constexpr int kGroup = 2;
  static constexpr int64_t kDepth = 384;
  static constexpr int64_t kChain = kDepth;  // sums are rounded to bfloat16
  using Lane = lane32;
  using Sum = vfloat;

  static PYFUSED_DOT vfloat add(vfloat sum, vuint w, vfloat x) {
#if defined(PYFUSED_EMULATED_DOT)
    const vuint u = bits_as<vuint>(x);
    for (int i = 0; i < kWidth; ++i) {
      const float odd = flushing_fma(u[i] & 0xffff0000u, w[i] & 0xffff0000u, sum[i]);
      sum[i] = flushing_fma(u[i] << 16, w[i] << 16, odd);
    }
    return sum;
#else
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
#endif
  }
  static PYFUSED_INLINE vfloat add(vfloat sum, lane32 w, vfloat x) { return add(sum, vuint{} + w, x); }

  static PYFUSED_INLINE vfloat lanes(const bf16* from, int64_t rest, float = 0) {
    vfloat v{};
    if (rest >= kGroup * kWidth) std::memcpy(&v, from, sizeof(v));
    else std::memcpy(&v, from, rest * sizeof(bf16));
    return v;
  }
  static PYFUSED_INLINE vuint some(const bf16* from) { return some(from, kGroup * kWidth); }
  static PYFUSED_INLINE vuint some(const bf16* from, int64_t rest) { return bits_as<vuint>(lanes(from, rest)); }
  static const lane32* row(const bf16* from, int64_t count, float* to) { return whole_groups<kGroup>(from, count, to); }
};
#endif

#if defined(PYFUSED_DOT_INT8)
// Four bytes of each lane of x, without sign, times four of w, with a sign, added to int32 sums: vpdpbusd. x is a row of int8 plus
// 128 each; Product takes 128 times the sum of a row of W away again.
struct Quads {
  typedef uint8_t vubyte __attribute__((vector_size(kWidth)));
  static constexpr int kGroup = 4;
  static constexpr int64_t kDepth = 768;
  static constexpr int64_t kChain = kDepth;
  using Lane = lane32;
  using Sum = vint;

  static PYFUSED_DOT vint add(vint sum, vuint w, vfloat x) {
#if defined(PYFUSED_EMULATED_DOT)
    const vuint u = bits_as<vuint>(x);
    for (int i = 0; i < kWidth; ++i)
      for (int q = 0; q < 32; q += 8) sum[i] = (int32_t)((uint32_t)sum[i] + (u[i] >> q & 255u) * (int8_t)(w[i] >> q));
    return sum;
#elif defined(__AVX512VNNI__)
    return (vint)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#else
    return (vint)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)w);
#endif
  }
  static PYFUSED_INLINE vint add(vint sum, lane32 w, vfloat x) { return add(sum, vuint{} + w, x); }

  // What one unit of a row of x in int8 stands for: 127 of them are the row's largest value. NaN if not every value is finite.
  template <class X> static float step(const X* from, int64_t k) {
    vfloat most{}, strange{};
    for (int64_t c = 0; c < k; c += kWidth) {
      const vfloat v = k - c >= kWidth ? load(from + c) : load_partial(from + c, k - c);
      most = max(most, bits_as<vfloat>(bits_as<vuint>(v) & 0x7fffffffu));
      strange += v * vfloat{};
    }
    const float found = max_lanes(most) / 127.0f, least = 0x1p-126f;
    return (found > least ? found : least) + sum_lanes(strange);
  }

  // The low byte of each lane. GCC's own conversion takes each lane through a general register.
  static PYFUSED_INLINE vubyte low_bytes(vuint u) {
#if defined(__AVX512F__)
    return (vubyte)_mm512_cvtepi32_epi8((__m512i)u);
#else
    return __builtin_convertvector(u, vubyte);
#endif
  }

  // x / step, correctly rounded: a product with 1 / step, and what it lacks. To divide would take a tenth of a whole product.
  static PYFUSED_INLINE vfloat quotient(vfloat x, float step) {
#if defined(__FMA__) && !defined(PYFUSED_EMULATED_DOT)
    const vfloat rate = splat(1.0f / step), near = rounded(x * rate);
    return near + (x - near * splat(step)) * rate;
#else
    return x / splat(step);
#endif
  }

  template <class X> static PYFUSED_INLINE vfloat lanes(const X* from, int64_t rest, float step) {
    X own[kGroup * kWidth] = {};
    if (rest < kGroup * kWidth) {
      std::memcpy(own, from, rest * sizeof(X));
      from = own;
    }
    uint8_t bytes[kGroup * kWidth];
    for (int g = 0; g < kGroup; ++g) {
      const vfloat shift = splat(12582912.0f + 128.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
      const vuint whole = bits_as<vuint>(quotient(load(from + g * kWidth), step) + shift);
      const vubyte low = low_bytes(whole);
      std::memcpy(bytes + g * kWidth, &low, sizeof(low));
    }
    vfloat v;
    std::memcpy(&v, bytes, sizeof(v));
    return v;
  }
  static const lane32* row(const int8_t* from, int64_t count, float* to) { return whole_groups<kGroup>(from, count, to); }

  // The sum of a row of W.
  static int32_t sum_of(const int8_t* from, int64_t k) {
    const vfloat ones = bits_as<vfloat>(vuint{} + 0x01010101u);
    vint sums{};
    int64_t c = 0;
    for (; c + kGroup * kWidth <= k; c += kGroup * kWidth) {
      vuint w;
      std::memcpy(&w, from + c, sizeof(w));
      sums = add(sums, w, ones);
    }
    int32_t sum = 0;
    for (int i = 0; i < kWidth; ++i) sum += sums[i];
    for (; c < k; ++c) sum += from[c];
    return sum;
  }
};
#endif

// How a product of X and W multiplies, if nothing else is asked for.
template <class X, class W> struct Multiplied { using type = Elements; };
#if defined(PYFUSED_DOT_BF16)
template <> struct Multiplied<bf16, bf16> { using type = Pairs; };
#endif

}  // namespace pyfused::PYFUSED_ISA
