// What do AMX's instructions do? Their documented arithmetic in plain C++, under the names that the compiler has for them.
//
// As the processor, it does nothing for a thread without a configuration: there it ends the process. It counts configurations.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>  // first: it may define the names as macros
#endif

namespace tiles_on_cpu {

struct Registers {
  unsigned char data[8][16][64];
  int rows[8], bytes[8];  // of each register
  bool configured = false;
};
inline thread_local Registers registers;
inline std::atomic<int64_t> configured{0}, released{0};

inline void need(bool holds) {
  if (!holds) std::abort();  // #UD or #GP
}

inline void load_config(const void* from) {
  const auto* bytes = static_cast<const unsigned char*>(from);
  need(bytes[0] == 1);
  for (int i = 1; i < 16; ++i) need(bytes[i] == 0);
  for (int t = 0; t < 8; ++t) {
    registers.bytes[t] = bytes[16 + 2 * t] + 256 * bytes[17 + 2 * t], registers.rows[t] = bytes[48 + t];
    need(registers.bytes[t] > 0 && registers.bytes[t] <= 64 && registers.rows[t] > 0 && registers.rows[t] <= 16);
  }
  for (int i = 32; i < 48; ++i) need(bytes[i] == 0);
  for (int i = 56; i < 64; ++i) need(bytes[i] == 0);
  std::memset(registers.data, 0, sizeof(registers.data));
  registers.configured = true;
  ++configured;
}
inline void release() {
  released += registers.configured;
  registers.configured = false;
}

inline void zero(int t) {
  need(registers.configured);
  std::memset(registers.data[t], 0, sizeof(registers.data[t]));
}
inline void load(int t, const void* from, int64_t stride) {
  zero(t);
  for (int r = 0; r < registers.rows[t]; ++r)
    std::memcpy(registers.data[t][r], static_cast<const char*>(from) + r * stride, registers.bytes[t]);
}
inline void store(int t, void* to, int64_t stride) {
  need(registers.configured);
  for (int r = 0; r < registers.rows[t]; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, registers.data[t][r], registers.bytes[t]);
}

template <class T> T& at(int t, int row, int i) { return reinterpret_cast<T(*)[64 / sizeof(T)]>(registers.data[t])[row][i]; }

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float widened(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof(y));
  return flushed(y);
}

inline void need_shapes(int sum, int a, int b) {
  const Registers& r = registers;
  need(r.configured && sum != a && sum != b && a != b);
  need(r.rows[sum] == r.rows[a] && r.bytes[sum] == r.bytes[b] && r.bytes[a] == 4 * r.rows[b]);
}

// tdpbf16ps: the even elements along K in one chain of fused multiply-adds, the odd ones in another, both from zero. Then their
// sum is added. Each step rounds to nearest even, and denormal numbers are zero.
inline void pairs(int sum, int a, int b) {
  need_shapes(sum, a, b);
  for (int m = 0; m < registers.rows[sum]; ++m)
    for (int n = 0; n < registers.bytes[sum] / 4; ++n) {
      float chain[2] = {};
      for (int k = 0; k < registers.rows[b]; ++k)
        for (int q = 0; q < 2; ++q)
          chain[q] = flushed(std::fmaf(widened(at<uint16_t>(a, m, 2 * k + q)), widened(at<uint16_t>(b, k, 2 * n + q)), chain[q]));
      float& to = at<float>(sum, m, n);
      to = flushed(flushed(to) + flushed(chain[0] + chain[1]));
    }
}

// tdpbsud: a with signs times b without; sums wrap around at 32 bits.
inline void quads(int sum, int a, int b) {
  need_shapes(sum, a, b);
  for (int m = 0; m < registers.rows[sum]; ++m)
    for (int n = 0; n < registers.bytes[sum] / 4; ++n) {
      uint32_t total = at<uint32_t>(sum, m, n);
      for (int k = 0; k < registers.rows[b]; ++k)
        for (int q = 0; q < 4; ++q) total += at<int8_t>(a, m, 4 * k + q) * at<uint8_t>(b, k, 4 * n + q);
      at<uint32_t>(sum, m, n) = total;
    }
}

}  // namespace tiles_on_cpu

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_loadconfig tiles_on_cpu::load_config
#define _tile_release tiles_on_cpu::release
#define _tile_zero tiles_on_cpu::zero
#define _tile_loadd tiles_on_cpu::load
#define _tile_stored tiles_on_cpu::store
#define _tile_dpbf16ps tiles_on_cpu::pairs
#define _tile_dpbsud tiles_on_cpu::quads
