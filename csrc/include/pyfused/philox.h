// Which probabilities does dropout keep? Philox4x32-10 for a vector of queries, as in kernels/reference/_philox.py.
#pragma once

#include "pyfused/simd.h"

namespace pyfused::PYFUSED_ISA {
namespace {

// High and low halves of the 64-bit products of unsigned lanes with one factor.
PYFUSED_INLINE void multiply(vuint a, uint32_t factor, vuint& high, vuint& low) {
  typedef uint64_t vwide __attribute__((vector_size(kWidth * 4)));
  const vwide keep_low = vwide{} + 0xffffffffull;
  vwide even, odd, wide = bits_as<vwide>(a);
#if defined(__AVX512F__)
  const __m512i f = _mm512_set1_epi64(factor);
  even = (vwide)_mm512_mul_epu32((__m512i)wide, f), odd = (vwide)_mm512_mul_epu32((__m512i)(wide >> 32), f);
#elif defined(__AVX2__)
  const __m256i f = _mm256_set1_epi64x(factor);
  even = (vwide)_mm256_mul_epu32((__m256i)wide, f), odd = (vwide)_mm256_mul_epu32((__m256i)(wide >> 32), f);
#else
  even = (wide & keep_low) * factor, odd = (wide >> 32) * factor;
#endif
  high = bits_as<vuint>((even >> 32) | (odd & ~keep_low));
  low = bits_as<vuint>((even & keep_low) | (odd << 32));
}

// Philox4x32-10 (Salmon et al. 2011) with counter (quad, query in the lanes, flat head, 0): words for four keys.
struct Philox {
  uint32_t k0, k1;
  PYFUSED_INLINE void operator()(uint32_t quad, vuint query, uint32_t head, vuint (&w)[4]) const {
    vuint c0 = vuint{} + quad, c1 = query, c2 = vuint{} + head, c3 = vuint{}, h0, l0, h1, l1;
    uint32_t a = k0, b = k1;
    for (int round = 0; round < 10; ++round, a += 0x9E3779B9u, b += 0xBB67AE85u) {
      multiply(c0, 0xD2511F53u, h0, l0);
      multiply(c2, 0xCD9E8D57u, h1, l1);
      c0 = h1 ^ c1 ^ a, c1 = l1, c2 = h0 ^ c3 ^ b, c3 = l0;
    }
    w[0] = c0, w[1] = c1, w[2] = c2, w[3] = c3;
  }
};

}  // namespace
}  // namespace pyfused::PYFUSED_ISA
