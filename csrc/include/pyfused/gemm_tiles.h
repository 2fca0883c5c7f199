// How does sums.h's gemm run? In tiles of kWeightRows rows of W and a panel of x.
#pragma once

#include "sums.h"

namespace pyfused::PYFUSED_ISA {

struct Nothing {
  PYFUSED_INLINE void operator()() {}
};

// R rows of w times V vectors of a panel. apart: bytes from a row of w to the next. depth: in lanes. ahead() runs at each step.
template <class M, int V, int R = kWeightRows, class Ahead = Nothing>
void outer_tile(const typename M::Lane* w, int64_t apart, const float* panel, int64_t depth, float* out, int64_t ld, bool first,
                Ahead ahead = {}) {
  using Lane = typename M::Lane;
  using Sum = typename M::Sum;
  constexpr int64_t kChain = M::kChain / M::kGroup;
  const Lane* third[(R + 2) / 3];  // every third row: an address of its own for each would not fit the registers
#pragma GCC unroll 4
  for (int r = 0; r < (R + 2) / 3; ++r) third[r] = (const Lane*)((const char*)w + 3 * r * apart);
  int64_t c = 0;
  do {
    const int64_t stop = depth - c < kChain ? depth : c + kChain;
    Sum acc[R][V];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] = Sum{};
#pragma GCC unroll 8  // the loop's own instructions take slots of the multiply-adds: 8% to 15%
    for (; c < stop; ++c) {
      ahead();
      vfloat u[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) u[v] = load(panel + (c * V + v) * kWidth);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const Lane s = *(const Lane*)((const char*)(third[r / 3] + c) + r % 3 * apart);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[r][v] = M::add(acc[r][v], s, u[v]);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        float* p = out + r * ld + v * kWidth;
        store(p, bits_as<vfloat>(first ? acc[r][v] : acc[r][v] + bits_as<Sum>(load(p))));
      }
    first = false;
  } while (c < depth);
}

template <class W, class M>
void Sums<W, M>::gemm(int64_t i0, int64_t rows, int64_t j, int64_t count, float* own, int64_t ld, float* widened) const {
  static_assert(kInTiles == kTiles, "the constants of sums.h are for one of the two");
  for (int64_t c = 0; c < k || c == 0; c += kDepth)
    block(i0, rows, j, count, c, k - c < kDepth ? k - c : kDepth, own, ld, widened);
}

// Memory that will be written is on its way while the last sums are computed: up to 10% of the time if y is large.
PYFUSED_INLINE void fetch(const char* to, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(to + at, 1);
  __builtin_prefetch(to + bytes - 1, 1);
}

// own[r][i] (+)= the sum over [c, c + depth) for outputs j + r and rows i0 + i; rows past `count` are not used.
template <class W, class M>
void Sums<W, M>::block(int64_t i0, int64_t rows, int64_t j, int64_t count, int64_t c, int64_t depth, float* own, int64_t ld,
                       float* widened) const {
  const int64_t groups = (count + kWeightRows - 1) / kWeightRows, steps_of = (depth + M::kGroup - 1) / M::kGroup;
  const bool whole = groups * kWeightRows == count;
  for (int64_t g = 0; g < groups; ++g) {
    const Lane *w = nullptr, *second = nullptr;  // of the tile's rows, which lie equally far apart
    const int64_t top = kInTiles ? g * kWeightRows : g;
    if constexpr (kInTiles) {
      w = rows_for_tiles(j + top, count - top, c, depth, widened, second);
    } else {
      for (int64_t q = 0; q < kWeightRows; ++q) {
        const int64_t r = g + q * groups < count ? g + q * groups : count - 1;
        float* to = widened + q * kWidened;
        const Lane* at = row_of(j + r, c, depth, to);
        if (!whole && (const void*)at != to) at = (const Lane*)std::memcpy(to, at, steps_of * sizeof(Lane));
        if (q < 2) (q ? second : w) = at;
      }
    }
    const int64_t apart = (const char*)second - (const char*)w;
    for (int64_t i = 0; i < rows; i += kPanel) {
      if (c + depth == k && y)
        for (int64_t q = i + g * kPanel / groups; q < i + (g + 1) * kPanel / groups && q < rows; ++q)
          fetch(y + ((i0 + q) * n + j) * y_size, count * y_size);
      const int width = width_of(m - i0 - i);
      const float* panel = packed + (i0 + i) * lanes(k) + c / M::kGroup * width;
      float* out = own + top * ld + i;
      if constexpr (kInTiles) {
        const int64_t steps = (steps_of + kWidth - 1) / kWidth;
        width == kPanel ? multiply_tiles<M, 2>(w, apart, panel, steps, out, ld, c == 0)
                        : multiply_tiles<M, 1>(w, apart, panel, steps, out, ld, c == 0);
      } else {
        width == kPanel ? outer_tile<M, 2>(w, apart, panel, steps_of, out, groups * ld, c == 0)
                        : outer_tile<M, 1>(w, apart, panel, steps_of, out, groups * ld, c == 0);
      }
    }
  }
}

// kWeightRows rows of W from `row` on, of which there are `count`, and whole tiles of K: as they lie in memory, or where that
// would read past them a copy with zeros. `second` receives the second row.
template <class W, class M>
auto Sums<W, M>::rows_for_tiles(int64_t row, int64_t count, int64_t c, int64_t depth, float* to, const Lane*& second) const
    -> const Lane* {
  const W* from = weight + row * weight_stride + c;
  if (count >= kWeightRows && depth % (kWidth * M::kGroup) == 0) {
    second = (const Lane*)(from + weight_stride);
    return (const Lane*)from;
  }
  std::memset(to, 0, kWeightRows * kWidened * sizeof(float));
  for (int64_t q = 0; q < kWeightRows && q < count; ++q)
    std::memcpy(to + q * kWidened, from + q * weight_stride, depth * sizeof(W));
  second = (const Lane*)(to + kWidened);
  return (const Lane*)to;
}

// The values [c, c + depth) of a row of W as lanes. int4 is widened with its scales.
template <class W, class M> auto Sums<W, M>::row_of(int64_t row, int64_t c, int64_t depth, float* to) const -> const Lane* {
  const W* from = weight + row * weight_stride;
  if constexpr (kGrouped) return widen_groups(from + c / 2, scale + (row * k + c) / kScaleGroup, depth, to);
  else return M::row(from + c, depth, to);
}

}  // namespace pyfused::PYFUSED_ISA
