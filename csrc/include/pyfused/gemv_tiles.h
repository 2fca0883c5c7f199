// How does sums.h's gemv run? In tiles of MB rows of x and R rows of W.
#pragma once

#include "sums.h"

namespace pyfused::PYFUSED_ISA {

template <class W, class M> void Sums<W, M>::gemv(int64_t j, int64_t count, float* sums) const {
  if constexpr (!kOfIntegers) switch (m) {
      case 1: dots<1>(j, count, sums); break;
      case 2: dots<2>(j, count, sums); break;
      case 3: dots<3>(j, count, sums); break;
      case 5: dots<kGrouped && !kManyRegisters ? 4 : 5>(j, count, sums); break;
      case 6: dots<kGrouped && !kManyRegisters ? 4 : 6>(j, count, sums); break;
      default: dots<4>(j, count, sums);
    }
}

// Rows of W in a tile with MB rows of x. It fills the registers; a group's sum and values take some too. On AVX-512 the numbers
// divide kGemvBlock, for what remains is computed row by row.
template <class W, class M> constexpr int Sums<W, M>::tile_rows(int mb) {
  if (kManyRegisters) return mb == 1 ? 8 : mb < 4 ? 6 : 4;
  if (mb == 1) return sizeof(W) == 1 ? 6 : 4;
  return mb == 2 ? 4 : mb == 3 ? (kGrouped ? 3 : 4) : mb == 4 ? (kGrouped ? 2 : 3) : 2;
}

template <class W, class M>
template <int MB>
void Sums<W, M>::dots(int64_t j, int64_t count, float* sums) const {
  constexpr int R = tile_rows(MB);
  const int64_t apart = count / R;
  for (int64_t c = 0; c < apart; ++c) every_row<MB, R>(j + c, apart, sums + c);
  for (int64_t c = apart * R; c < count; ++c) every_row<MB, 1>(j + c, 0, sums + c);
}

// R rows of W, `apart` rows from each other, times all rows of x, MB at a time. Only the first MB wait for memory.
template <class W, class M>
template <int MB, int R>
PYFUSED_INLINE void Sums<W, M>::every_row(int64_t j, int64_t apart, float* sums) const {
  int64_t i = 0;
  for (; i + MB <= m; i += MB) dot_tile<MB, R>(i, j, apart, sums);
  if constexpr (MB == 4) switch (m - i) {
      case 1: dot_tile<1, R>(i, j, apart, sums); break;
      case 2: dot_tile<2, R>(i, j, apart, sums); break;
      case 3: dot_tile<3, R>(i, j, apart, sums); break;
    }
}

template <class W, class M>
template <int MB, int R>
void Sums<W, M>::dot_tile(int64_t i, int64_t j, int64_t apart, float* sums) const {
  const int64_t ldx = padded_k(k) / M::kGroup, stream = apart * weight_stride;
  const float* px = packed + i * ldx;
  const W* w = weight + j * weight_stride;
  vfloat acc[MB][R];
#pragma GCC unroll 8
  for (int a = 0; a < MB; ++a)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[a][r] = vfloat{};
  [[maybe_unused]] auto step = [&](int64_t c, auto get) __attribute__((always_inline)) {
    if (kAhead && i == 0)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (size_t at = kAhead; at < kAhead + kPairStep * sizeof(W); at += 64)
          __builtin_prefetch((const char*)(w + r * stream + c) + at);
    if constexpr (M::kGroup == 2) {
      vuint v[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) v[r] = get(w + r * stream + c);
#pragma GCC unroll 8
      for (int a = 0; a < MB; ++a) {
        const vfloat u = load(px + a * ldx + c / 2);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[a][r] = M::add(acc[a][r], v[r], u);
      }
    } else if constexpr (kScaled) {  // widened bytes take registers: with all rows of W at once some sums would be in memory
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Pair v = get(w + r * stream + c);
#pragma GCC unroll 8
        for (int a = 0; a < MB; ++a) acc[a][r] += load(px + a * ldx + c) * v.a;
#pragma GCC unroll 8
        for (int a = 0; a < MB; ++a) acc[a][r] += load(px + a * ldx + c + kWidth) * v.b;
      }
    } else {
      Pair v[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) v[r] = get(w + r * stream + c);
#pragma GCC unroll 8
      for (int a = 0; a < MB; ++a) {
        vfloat u = load(px + a * ldx + c);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[a][r] += u * v[r].a;
      }
#pragma GCC unroll 8
      for (int a = 0; a < MB; ++a) {
        vfloat u = load(px + a * ldx + c + kWidth);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[a][r] += u * v[r].b;
      }
    }
  };
  auto finish = [&](bool first) __attribute__((always_inline)) {
    constexpr int kVectors = (MB * R + kWidth - 1) / kWidth;
    vfloat all[kVectors * kWidth] = {};
    float found[kVectors * kWidth];
#pragma GCC unroll 32
    for (int t = 0; t < MB * R; ++t) all[t] = acc[t / R][t % R], acc[t / R][t % R] = vfloat{};
#pragma GCC unroll 8
    for (int t = 0; t < kVectors; ++t) store(found + t * kWidth, sums_of_lanes(all + t * kWidth));
#pragma GCC unroll 32
    for (int t = 0; t < MB * R; ++t) {
      float *to = sums + (i + t / R) * kGemvBlock + t % R * apart, sum = found[t];
      if constexpr (kScaled) sum *= scale[j + t % R * apart];
      *to = first ? sum : *to + sum;
    }
  };
  if constexpr (kGrouped) {
    const int64_t groups = k / kScaleGroup;
    add_groups(px, ldx, w, stream, scale + j * groups, apart * groups, groups, acc);
    finish(true);
  } else {
    int64_t c = 0;
    do {
      const int64_t stop = k - c < kGemvDepth ? k : c + kGemvDepth;
      const bool first = c == 0;
      for (; c + kPairStep <= stop; c += kPairStep) step(c, [](const W* p) { return M::some(p); });
      if (c < stop) step(c, [rest = k - c](const W* p) { return M::some(p, rest); }), c = k;
      finish(first);
    } while (c < k);
  }
}

}  // namespace pyfused::PYFUSED_ISA
