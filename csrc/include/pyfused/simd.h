// What is a vector here? GCC/Clang vector extensions of one width per instruction set, with loads, stores and maths.
//
// The file is compiled once per instruction set, each time in a namespace of that name. So the linker cannot use an inline
// function built for AVX-512 in the baseline.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef PYFUSED_ISA
#define PYFUSED_ISA baseline
#endif

namespace pyfused::PYFUSED_ISA {

#if defined(PYFUSED_WIDTH)
constexpr int kWidth = PYFUSED_WIDTH;  // the tests' vectors, wider than the processor's
#elif defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float vfloat __attribute__((vector_size(kWidth * 4)));
typedef int32_t vint __attribute__((vector_size(kWidth * 4)));
typedef uint32_t vuint __attribute__((vector_size(kWidth * 4)));
typedef int8_t vbyte __attribute__((vector_size(kWidth)));
typedef uint16_t vhalf __attribute__((vector_size(kWidth * 2)));

struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };

// Codes that Python passes for a dtype.
enum Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Runs `call` with T naming the element type.
#define PYFUSED_BY_DTYPE(dtype, ...)                        \
  switch (dtype) {                                   \
    case kFloat32: { using T = float; __VA_ARGS__; } break; \
    case kFloat16: { using T = f16; __VA_ARGS__; } break; \
    case kBFloat16: { using T = bf16; __VA_ARGS__; } break; \
  }

#define PYFUSED_INLINE inline __attribute__((always_inline))

PYFUSED_INLINE vfloat splat(float x) { return x - vfloat{}; }
template <class To, class From> PYFUSED_INLINE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

// ---- half precision <-> float32 -------------------------------------------------------------------------------------

// The high 16 bits of each lane. GCC's own conversion takes each lane through memory on AVX2, and three instructions for one on
// AVX-512.
PYFUSED_INLINE vhalf high_halves(vuint u) {
#if defined(__AVX512F__)
  const __m512i high = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 31, 29, 27, 25, 23, 21, 19, 17,
                                        15, 13, 11, 9, 7, 5, 3, 1);
  return (vhalf)_mm512_castsi512_si256(_mm512_permutexvar_epi16(high, (__m512i)u));
#elif defined(__AVX2__)
  const __m256i low = _mm256_srli_epi32((__m256i)u, 16);
  const __m256i pairs = _mm256_packus_epi32(low, low);  // within each half of the register
  return (vhalf)_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
#else
  return __builtin_convertvector(u >> 16, vhalf);
#endif
}

PYFUSED_INLINE vfloat widen_bf16(vhalf h) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#elif defined(__AVX2__)
  return (vfloat)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
#elif defined(__aarch64__)
  return (vfloat)vshll_n_u16((uint16x4_t)h, 16);  // GCC 12 takes each lane through a general register, in 12 instructions
#else
  return bits_as<vfloat>(__builtin_convertvector(h, vuint) << 16);
#endif
}

PYFUSED_INLINE vhalf narrow_bf16(vfloat x) {
  vuint u = bits_as<vuint>(x);
  vuint rounded = u + 0x7fffu + ((u >> 16) & 1u);  // to nearest, ties to even
#if defined(__AVX512F__)
  const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
  rounded = (vuint)_mm512_mask_or_epi32((__m512i)rounded, is_nan, (__m512i)u, _mm512_set1_epi32(0x400000));
#else
  vuint is_nan = (u & 0x7fffffffu) > 0x7f800000u;
  rounded = is_nan ? (u | 0x400000u) : rounded;
#endif
  return high_halves(rounded);
}

PYFUSED_INLINE vfloat widen_f16(vhalf h) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (vfloat)_mm256_cvtph_ps((__m128i)h);
#elif defined(__aarch64__)
  return (vfloat)vcvt_f32_f16((float16x4_t)h);
#else
  vuint u = __builtin_convertvector(h, vuint);
  vuint magnitude = (u & 0x7fffu) << 13;
  // Multiplying by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals on the way.
  vfloat scaled = bits_as<vfloat>(magnitude) * bits_as<vfloat>(vuint{} + 0x77800000u);
  vuint special = (u & 0x7c00u) == 0x7c00u;
  vuint y = special ? (magnitude | 0x7f800000u) : bits_as<vuint>(scaled);
  return bits_as<vfloat>(y | ((u & 0x8000u) << 16));
#endif
}

PYFUSED_INLINE vhalf narrow_f16(vfloat x) {
#if defined(__AVX512F__)
  return (vhalf)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (vhalf)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  return (vhalf)vcvt_f16_f32((float32x4_t)x);
#else
  vuint u = bits_as<vuint>(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  // Normal range: rebias by subtracting 112 exponents, rounding to nearest even in the 13 dropped bits.
  vuint normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // Subnormal range: adding 0.5 aligns the float's mantissa with the half's, and the adder rounds.
  vuint tiny = bits_as<vuint>(bits_as<vfloat>(a) + splat(0.5f)) - 0x3f000000u;
  vuint y = a < 0x38800000u ? tiny : normal;
  y = a >= 0x477ff000u ? vuint{} + 0x7c00u : y;
  y = a > 0x7f800000u ? vuint{} + 0x7e00u : y;
  return __builtin_convertvector(y | sign, vhalf);
#endif
}

// ---- loads and stores, any alignment --------------------------------------------------------------------------------

PYFUSED_INLINE vfloat load(const float* p) { vfloat v; std::memcpy(&v, p, sizeof(v)); return v; }
PYFUSED_INLINE vfloat load(const f16* p) { vhalf v; std::memcpy(&v, p, sizeof(v)); return widen_f16(v); }
PYFUSED_INLINE vfloat load(const bf16* p) { vhalf v; std::memcpy(&v, p, sizeof(v)); return widen_bf16(v); }
// kWidth signed bytes as integers.
PYFUSED_INLINE vint load_bytes(const int8_t* p) {
#if defined(__AVX512F__)
  return (vint)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (vint)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#elif defined(__aarch64__)
  uint32_t four;
  std::memcpy(&four, p, sizeof(four));
  return (vint)vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four))));
#else
  vbyte v;
  std::memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, vint);
#endif
}
PYFUSED_INLINE vfloat to_float(vint v) { return __builtin_convertvector(v, vfloat); }
PYFUSED_INLINE vfloat load(const int8_t* p) { return to_float(load_bytes(p)); }
PYFUSED_INLINE void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof(v)); }
PYFUSED_INLINE void store(f16* p, vfloat v) { vhalf h = narrow_f16(v); std::memcpy(p, &h, sizeof(h)); }
PYFUSED_INLINE void store(bf16* p, vfloat v) { vhalf h = narrow_bf16(v); std::memcpy(p, &h, sizeof(h)); }

// To an aligned address, past the caches where a processor can: memory is written without being read first. Other threads see it
// after streams_end().
PYFUSED_INLINE void stream(float* p, vfloat v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}
PYFUSED_INLINE void streams_end() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// The first n lanes, 0 <= n < kWidth; the others read as zero and are not written.
template <class T> PYFUSED_INLINE vfloat load_partial(const T* p, int64_t n) {
  T lanes[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class T> PYFUSED_INLINE void store_partial(T* p, vfloat v, int64_t n) {
  T lanes[kWidth];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}
template <class T> PYFUSED_INLINE float load_one(const T* p) { return load_partial(p, 1)[0]; }
template <> PYFUSED_INLINE float load_one(const float* p) { return *p; }
template <class T> PYFUSED_INLINE void store_one(T* p, float x) { store_partial(p, splat(x), 1); }
template <> PYFUSED_INLINE void store_one(float* p, float x) { *p = x; }

// ---- arithmetic -----------------------------------------------------------------------------------------------------

PYFUSED_INLINE vfloat max(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
PYFUSED_INLINE vfloat min(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vfloat)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

PYFUSED_INLINE float sum_lanes(vfloat v) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#else
  __m256 h = (__m256)v;
#endif
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
#else
  float s = 0;
  for (int i = 0; i < kWidth; ++i) s += v[i];
  return s;
#endif
}
PYFUSED_INLINE float max_lanes(vfloat v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float m = v[0];
  for (int i = 1; i < kWidth; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

// v itself. The compiler cannot contract it into a fused multiply-add with a later operation.
PYFUSED_INLINE vfloat rounded(vfloat v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// e^x within 1 ulp for x in [-87.7, 88.3], exactly 0 below (and for -inf), inf above (exp alone). NaN stays NaN.
// x = n ln2 + r, where ln2 has two parts (Cody and Waite), then a polynomial in r with a relative error of 3e-9. Adding
// `shift` rounds to an integer n, and leaves n + 127, the exponent of 2^n, in the low bits of the mantissa. They are 0 for
// n = -127, and 255, the exponent of infinity, for n = 128.
PYFUSED_INLINE vfloat exp_below_88(vfloat x) {
  const vfloat shift = splat(12582912.0f + 127.0f);  // 1.5 * 2^23, where neighbours are 1 apart
  x = max(splat(-127 * 0.6931472f), x);
  const vfloat z = x * splat(1.44269504088896341f) + shift, n = z - shift;
  const vfloat r = (x - n * splat(0.693359375f)) + n * splat(2.12194440e-4f);
  vfloat p = splat(1.3815027196e-03f);
  p = p * r + splat(8.3687249571e-03f);
  p = p * r + splat(4.1668377817e-02f);
  p = p * r + splat(1.6666521132e-01f);
  p = p * r + splat(4.9999994040e-01f);
  p = p * r + splat(1.0f);
  p = p * r + splat(1.0f);
  return p * bits_as<vfloat>(bits_as<vint>(z) << 23);
}
PYFUSED_INLINE vfloat exp(vfloat x) { return exp_below_88(min(splat(89.0f), x)); }

// ---- transposition --------------------------------------------------------------------------------------------------

template <int... I> using Lanes = std::integer_sequence<int, I...>;
using AllLanes = std::make_integer_sequence<int, kWidth>;

// Lane i is lane I[i] of a and b together. GCC has __builtin_shufflevector from version 12 on, clang no __builtin_shuffle.
template <int... I> PYFUSED_INLINE vfloat shuffled(vfloat a, vfloat b, Lanes<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, vint{I...});
#endif
}
template <int... I> PYFUSED_INLINE vfloat reversed(vfloat v, Lanes<I...>) { return shuffled(v, v, Lanes<(kWidth - 1 - I)...>{}); }
PYFUSED_INLINE vfloat reversed(vfloat v) { return reversed(v, AllLanes{}); }

// mix_low takes the lanes with bit S clear from a, and the others from b, S lanes earlier. mix_high is the other half.
template <int S, int... I> PYFUSED_INLINE vfloat mix_low(vfloat a, vfloat b, Lanes<I...>) {
  return shuffled(a, b, Lanes<(I & S ? kWidth + I - S : I)...>{});
}
template <int S, int... I> PYFUSED_INLINE vfloat mix_high(vfloat a, vfloat b, Lanes<I...>) {
  return shuffled(a, b, Lanes<(I & S ? kWidth + I : I + S)...>{});
}

// Transposes kWidth vectors of kWidth lanes in place.
template <int S = kWidth / 2> PYFUSED_INLINE void transpose(vfloat* v) {
#pragma GCC unroll 16
  for (int r = 0; r < kWidth; ++r)
    if (!(r & S)) {
      const vfloat a = v[r], b = v[r + S];
      v[r] = mix_low<S>(a, b, AllLanes{}), v[r + S] = mix_high<S>(a, b, AllLanes{});
    }
  if constexpr (S > 1) transpose<S / 2>(v);
}

// v[c] receives column c of a square of kWidth floats, its rows `step` apart. AVX-512 shuffles on one port alone. Quarters of
// rows that memory inserts where they belong halve its work.
PYFUSED_INLINE void load_transposed(const float* from, int64_t step, vfloat* v) {
#if defined(__AVX512F__) && !defined(PYFUSED_WIDTH)
#pragma GCC unroll 4
  for (int c = 0; c < kWidth; c += 4, from += 4) {
    __m512 row[4];  // of each quarter of a vector: rows r, r + 4, r + 8 and r + 12
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      row[r] = _mm512_castps128_ps512(_mm_loadu_ps(from + r * step));
      row[r] = _mm512_insertf32x4(row[r], _mm_loadu_ps(from + (r + 4) * step), 1);
      row[r] = _mm512_insertf32x4(row[r], _mm_loadu_ps(from + (r + 8) * step), 2);
      row[r] = _mm512_insertf32x4(row[r], _mm_loadu_ps(from + (r + 12) * step), 3);
    }
    const __m512d low = (__m512d)_mm512_unpacklo_ps(row[0], row[1]), high = (__m512d)_mm512_unpackhi_ps(row[0], row[1]);
    const __m512d low2 = (__m512d)_mm512_unpacklo_ps(row[2], row[3]), high2 = (__m512d)_mm512_unpackhi_ps(row[2], row[3]);
    v[c] = (vfloat)_mm512_unpacklo_pd(low, low2), v[c + 1] = (vfloat)_mm512_unpackhi_pd(low, low2);
    v[c + 2] = (vfloat)_mm512_unpacklo_pd(high, high2), v[c + 3] = (vfloat)_mm512_unpackhi_pd(high, high2);
  }
#else
#pragma GCC unroll 16
  for (int r = 0; r < kWidth; ++r) v[r] = load(from + r * step);
  transpose(v);
#endif
}

// Lane i is the sum of v[i]'s lanes. Half the instructions of kWidth times sum_lanes(). v is used up.
template <int S = kWidth / 2> PYFUSED_INLINE vfloat sums_of_lanes(vfloat* v) {
#pragma GCC unroll 16
  for (int i = 0; i < S; ++i) v[i] = mix_low<S>(v[i], v[i + S], AllLanes{}) + mix_high<S>(v[i], v[i + S], AllLanes{});
  if constexpr (S > 1) return sums_of_lanes<S / 2>(v);
  return v[0];
}

}  // namespace pyfused::PYFUSED_ISA
