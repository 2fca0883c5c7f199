// How does y = x W^T + b run on a CPU? Two kernels read W row by row, the way nn.Linear stores it. They never pack it.
//
// gemv, few rows of x: dot products of MB rows of x with R rows of W in registers, vectors along K. W is fetched from
//   memory once, however many rows x has. Its K N elements set the pace. The rows of x stay in L1/L2 as float32.
// gemm, more rows: outer products. x is packed transposed in panels of two vectors of rows, (panel, K, 2 kWidth). Each
//   step multiplies one element of each of 6 rows of W by the two vectors: 12 multiply-adds for 8 loads. It is the
//   usual 6x16 micro-kernel with the roles swapped, so the small operand is packed: 60-80 GFLOP/s of about 100. AVX-512
//   has registers for 12 rows: 147-165 GFLOP/s of 177, 3% to 7% more than with 6.
//   Half-precision rows of W are widened a tile at a time into L1, once for all panels. With a processor's dot products
//   (multiply.h) a lane of a panel is a group of elements, and W is read as it is. With AMX a step is 16 lanes (tiles.h).
//
// Both kernels work on rows of W that lie far apart, so a block is read as a few long streams. The prefetchers of one
// Zen 3 core then fetch 19-24 GB/s (17-19 in bfloat16). One stream or four neighbouring rows of 3 KB get 13-15. Software
// prefetch made every variant slower there. On an Emerald Rapids core, with AVX-512, it makes a gemv of 380 MB 1.1 times as fast
// (int8), 1.2 (bfloat16 and 4 rows of float32), and one of 154 MB of float32 1.3 times.
//
// run_in_order.h says how threads share a Product, or several.
#pragma once

#include <cstdint>
#include <type_traits>

#include "activation.h"
#include "int4.h"
#include "multiply.h"
#include "tiles.h"

namespace pyfused::PYFUSED_ISA {

constexpr int kGemvBlock = 96;      // outputs of a gemv finished together
constexpr int kGemvUnit = 12;       // shares hold whole units of so many outputs
constexpr bool kManyRegisters = kWidth == 16;        // AVX-512 has 32 vector registers
constexpr int kWeightRows = kTiles ? 32 : kManyRegisters ? 12 : 6;  // rows of W in the gemm's micro-kernel
constexpr int kGemmBlock = kTiles ? 64 : 48;  // outputs of a gemm finished together: 8 groups, or 4, or 2
constexpr int kPanel = 2 * kWidth;  // rows of x in its micro-kernel
constexpr int64_t kMostPadding = kGroupsAtOnce * kScaleGroup > kPairStep ? kGroupsAtOnce * kScaleGroup : kPairStep;

struct Nothing {
  PYFUSED_INLINE void operator()() {}
};

// ---- one product ----------------------------------------------------------------------------------------------------

// y (m, n) = activation(x (m, k) weight (n, k)^T + bias) + residual. `pre` receives the activation's argument.
// Strides count elements between rows; bias, residual and pre may be null; y and pre are contiguous.
// X is float for T = f16 if x does not fit into f16, as gated_ffn's product of two float16 factors. W is int8_t for weights
// that are scale[j] times an integer in row j. It is int4x2 for weights (n, k / 2) whose groups have scales (n, k / kScaleGroup).
// M says how x and W are multiplied; with Quads rows of x are rounded to int8.
template <class T, class X = T, class W = T, class M = typename Multiplied<X, W>::type> struct Product {
  const X* x;
  const W* weight;
  const T *bias, *residual;
  T *y, *pre;
  int64_t m, n, k, x_stride, weight_stride, residual_stride;
  int activation;
  const typename ScaleOf<W>::type* scale = nullptr;  // for integers
  float* packed = nullptr;   // packed_size() floats
  float* scratch = nullptr;  // scratch_size() floats for each share

  static constexpr bool kGrouped = std::is_same_v<W, int4x2>, kScaled = sizeof(W) == 1 && !kGrouped;
  static constexpr bool kOfIntegers = M::kGroup == 4, kOfElements = M::kGroup == 1;
  static constexpr bool kInTiles = kTiles && !kOfElements;
  static_assert(kInTiles == kTiles, "the constants above are for one of the two");
  using Input = X;
  using Lane = typename M::Lane;
  // Of K, how much a gemm's tile sums at a time. Rows of W that are widened have to stay in L1. Others read a panel from L2 in
  // either case; with AVX-512 fewer, longer tiles are 1% to 2% faster.
  static constexpr int64_t kDepth = sizeof(W) == 4 && kManyRegisters ? 1024 : M::kDepth;
  static constexpr int64_t kWidened = kDepth / M::kGroup + kWidth;  // floats for a row of W as lanes

  // A gemm widens rows of W into L1 and reads them again, so half precision stays with gemv longer: 1.4 times faster at
  // 16 rows. float32 is as fast either way from 9 rows on. AVX-512's gemv has larger tiles. AMX's tiles wait for memory, of few rows
  // too; a gemv of 8 rows still does.
  static constexpr int64_t kGemvRows = kOfIntegers      ? -1
                                       : kInTiles       ? 8
                                       : kManyRegisters ? (sizeof(W) == 2 ? 24 : 12)
                                                        : (sizeof(W) == 4 ? 8 : 16);

  // Most rows of x in a block of a gemm, and fewest that a thread takes for its own. A block's panels, 288 KB for K = 768, stay in
  // L2 (K = 3072: 7% faster than with 128 rows). W is widened for each block. AMX is done with 128 rows before W is there.
  static constexpr int64_t kBlockM = kInTiles ? 256 : sizeof(W) == 4 ? 96 : 128, kShareM = sizeof(W) == 4 ? 64 : 128;

  // Of K, how much a gemv sums in one register's lanes. With four lanes the chains of longer sums lose bits that a library with
  // wider vectors keeps.
  static constexpr int64_t kGemvDepth = kWidth == 4 ? 384 : INT64_MAX / 2;

  // Bytes of W that a gemv's first tile fetches ahead; 0 leaves it to the hardware.
  static constexpr size_t kAhead = kManyRegisters ? 512 : 0;

  bool by_gemv() const { return m <= kGemvRows; }
  int64_t lanes() const {  // whole tiles with AMX: zeros follow the last
    const int64_t groups = (k + M::kGroup - 1) / M::kGroup;
    return kInTiles ? (groups + kWidth - 1) / kWidth * kWidth : groups;
  }
  int64_t padded_k() const {
    constexpr int64_t step = kGrouped ? kMostPadding : kPairStep;
    return (k + step - 1) / step * step;
  }
  static int64_t padded_m(int64_t rows) { return (rows + kWidth - 1) / kWidth * kWidth; }
  int64_t block_m() const {  // whole panels, as even as they come
    const int64_t panels = (m + kPanel - 1) / kPanel, blocks = (m + kBlockM - 1) / kBlockM;
    return blocks > 1 ? (panels + blocks - 1) / blocks * kPanel : padded_m(m);
  }
  int64_t packed_size() const {
    return by_gemv() ? m * padded_k() / M::kGroup : padded_m(m) * (lanes() + kOfIntegers);
  }
  float* steps() const { return packed + padded_m(m) * lanes(); }  // of the rows of x, for kOfIntegers
  int64_t scratch_size() const {
    return by_gemv() ? m * kGemvBlock : kGemmBlock * block_m() + kWeightRows * kWidened + kWidth * kGemmBlock;
  }

  int64_t row_count() const { return m; }
  bool keeps() const { return pre; }
  void give(T* to) { y = to; }
  int64_t pack_items() const { return by_gemv() ? m : (m + kPanel - 1) / kPanel; }
  int64_t run_unit() const { return by_gemv() ? kGemvUnit : kGemmBlock; }
  int64_t run_items() const { return (n + run_unit() - 1) / run_unit(); }
  int64_t run_work() const { return run_unit() * k * m; }
  void use(float* panels, float* own) { packed = panels, scratch = own; }

  // The product of rows [i, i + count) alone.
  Product of_rows(int64_t i, int64_t count) const {
    Product part = *this;
    part.m = count;
    if (x) part.x += i * x_stride;
    if (residual) part.residual += i * residual_stride;
    if (y) part.y += i * n;
    if (pre) part.pre += i * n;
    return part;
  }

  void pack(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) by_gemv() ? pack_row(i) : pack_panel(i * kPanel);
  }
  void run(int share, int64_t begin, int64_t end) const {
    float* own = scratch + share * scratch_size();
    const int64_t first = begin * run_unit(), last = end * run_unit() < n ? end * run_unit() : n;
    by_gemv() ? run_gemv(first, last, own) : run_gemm(first, last, own);
  }

  // `rows` rows of y from i on for outputs [j, j + count), from the sums over k, `apart` from row to row.
  template <class A> void finish_rows(int64_t i, int64_t rows, int64_t j, int64_t count, const float* sums, int64_t apart) const {
    const T* b = bias ? bias + j : nullptr;
    for (const int64_t end = i + rows; i < end; ++i, sums += apart) {
      const T* r = residual ? residual + i * residual_stride + j : nullptr;
      T *out = y + i * n + j, *keep = pre ? pre + i * n + j : nullptr;
      int64_t c = 0;
      for (; c + kWidth <= count; c += kWidth) {
        vfloat v = load(sums + c);
        if (b) v += load(b + c);
        if (keep) store(keep + c, v);
        v = A::value(v);
        store(out + c, r ? v + load(r + c) : v);
      }
      if (const int64_t rest = count - c) {
        vfloat v = load_partial(sums + c, rest);
        if (b) v += load_partial(b + c, rest);
        if (keep) store_partial(keep + c, v, rest);
        v = A::value(v);
        store_partial(out + c, r ? v + load_partial(r + c, rest) : v, rest);
      }
    }
  }
  // Only ffn has activations. Its weights have x's dtype.
  void finish(int64_t i, int64_t rows, int64_t j, int64_t count, const float* sums, int64_t apart) const {
    if constexpr (!std::is_same_v<X, T> || !std::is_same_v<W, T>) finish_rows<Identity>(i, rows, j, count, sums, apart);
    else PYFUSED_BY_ACTIVATION(activation, finish_rows<A>(i, rows, j, count, sums, apart);)
  }

  // ---- gemv ---------------------------------------------------------------------------------------------------------

  void pack_row(int64_t i) const {
    const X* from = x + i * x_stride;
    float* to = packed + i * padded_k() / M::kGroup;
    if constexpr (M::kGroup == 2) {
      for (int64_t c = 0; c < k; c += kPairStep) store(to + c / 2, M::lanes(from + c, k - c));
      return;
    }
    if constexpr (kGrouped && kGroupsAtOnce > 1) {
      for (int64_t c = 0; c < k; c += kGroupsAtOnce * kScaleGroup) pack_groups(from + c, k - c, to + c);
      return;
    }
    for (int64_t c = 0; c < k; c += kPairStep) {
      X lanes[2 * kWidth] = {};
      if (c + kPairStep > k)
        for (int64_t q = c; q < k; ++q) lanes[q - c] = from[q];
      Pair p = pair_for<W>(c + kPairStep <= k ? from + c : lanes);
      if constexpr (kGrouped) {
        if (!(c & kHalfGroup)) p.a *= splat(kLowStep);
        if (!((c + kWidth) & kHalfGroup)) p.b *= splat(kLowStep);
      }
      store(to + c, p.a);
      store(to + c + kWidth, p.b);
    }
  }

  void run_gemv(int64_t first, int64_t last, float* sums) const {
    for (int64_t j = first; j < last; j += kGemvBlock) {
      const int64_t count = last - j < kGemvBlock ? last - j : kGemvBlock;
      gemv_sums(j, count, sums);
      finish(0, m, j, count, sums, kGemvBlock);
    }
  }

  // sums[i][r], rows kGemvBlock apart: the sum over k for row i and output j + r.
  void gemv_sums(int64_t j, int64_t count, float* sums) const {
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
  static constexpr int tile_rows(int mb) {
    if (kManyRegisters) return mb == 1 ? 8 : mb < 4 ? 6 : 4;
    if (mb == 1) return sizeof(W) == 1 ? 6 : 4;
    return mb == 2 ? 4 : mb == 3 ? (kGrouped ? 3 : 4) : mb == 4 ? (kGrouped ? 2 : 3) : 2;
  }

  template <int MB> void dots(int64_t j, int64_t count, float* sums) const {
    constexpr int R = tile_rows(MB);
    const int64_t apart = count / R;
    for (int64_t c = 0; c < apart; ++c) every_row<MB, R>(j + c, apart, sums + c);
    for (int64_t c = apart * R; c < count; ++c) every_row<MB, 1>(j + c, 0, sums + c);
  }

  // R rows of W, `apart` rows from each other, times all rows of x, MB at a time. Only the first MB wait for memory.
  template <int MB, int R> PYFUSED_INLINE void every_row(int64_t j, int64_t apart, float* sums) const {
    int64_t i = 0;
    for (; i + MB <= m; i += MB) dot_tile<MB, R>(i, j, apart, sums);
    if constexpr (MB == 4) switch (m - i) {
        case 1: dot_tile<1, R>(i, j, apart, sums); break;
        case 2: dot_tile<2, R>(i, j, apart, sums); break;
        case 3: dot_tile<3, R>(i, j, apart, sums); break;
      }
  }

  template <int MB, int R> void dot_tile(int64_t i, int64_t j, int64_t apart, float* sums) const {
    const int64_t ldx = padded_k() / M::kGroup, stream = apart * weight_stride;
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

  // ---- gemm ---------------------------------------------------------------------------------------------------------

  // A panel holds (lanes of K, width). The last panel is one vector wide if its rows fit. Rows past m are zero.
  static int width_of(int64_t rows) { return rows > kWidth ? kPanel : kWidth; }

  void pack_panel(int64_t i) const {
    const int width = width_of(m - i);
    float* to = packed + i * lanes();
    for (int half = 0; half < width; half += kWidth) {
      const int64_t rows = m - i - half < kWidth ? m - i - half : kWidth;
      const X* from = x + (i + half) * x_stride;
      float step[kWidth] = {};
      if constexpr (kOfIntegers) {
        for (int r = 0; r < rows; ++r) step[r] = M::step(from + r * x_stride, k);
        std::memcpy(steps() + i + half, step, sizeof(step));
      }
      for (int64_t c = 0; c < lanes(); c += kWidth) {
        const int64_t rest = lanes() - c, at = c * M::kGroup;
        vfloat v[kWidth];
        if constexpr (std::is_same_v<X, float> && kOfElements) {
          if (rows == kWidth && rest >= kWidth) {
            load_transposed(from + c, x_stride, v);
#pragma GCC unroll 16
            for (int r = 0; r < kWidth; ++r) store(to + (c + r) * width + half, v[r]);
            continue;
          }
        }
        for (int r = 0; r < kWidth; ++r)
          v[r] = r < rows ? M::lanes(from + r * x_stride + at, k - at, step[r]) : vfloat{};
        transpose(v);
        for (int r = 0; r < kWidth && r < rest; ++r) store(to + (c + r) * width + half, v[r]);
      }
    }
  }

  void run_gemm(int64_t first, int64_t last, float* own) const {
    [[maybe_unused]] const TilesInUse tiles;
    float* widened = own + kGemmBlock * block_m();
    float* sums = widened + kWeightRows * kWidened;
    for (int64_t i0 = 0; i0 < m; i0 += block_m()) {
      const int64_t rows = m - i0 < block_m() ? m - i0 : block_m(), ld = padded_m(rows);
      for (int64_t j = first; j < last; j += kGemmBlock) {
        const int64_t count = last - j < kGemmBlock ? last - j : kGemmBlock;
        gemm_sums(i0, rows, j, count, own, ld, widened);
        float factor[kGemmBlock] = {};
        uint32_t offset[kGemmBlock] = {};
        if constexpr (kScaled) std::memcpy(factor, scale + j, count * sizeof(float));
        if constexpr (kOfIntegers)
          for (int64_t r = 0; r < count; ++r) offset[r] = 128u * M::sum_of(weight + (j + r) * weight_stride, k);
        for (int64_t i = 0; i < rows; i += kWidth) {
          if constexpr (!kScaled && !kOfIntegers) by_rows(own + i, ld, count, sums);
          else by_rows(own + i, ld, count, sums, [&](vfloat v, int64_t r) __attribute__((always_inline)) {
            if constexpr (kOfIntegers) {  // the sums may have wrapped around
              const vint whole = bits_as<vint>(bits_as<vuint>(v) - offset[r]);
              return to_float(whole) * load(steps() + i0 + i) * factor[r];
            } else {
              return v * factor[r];
            }
          });
          finish(i0 + i, rows - i < kWidth ? rows - i : kWidth, j, count, sums, kGemmBlock);
        }
      }
    }
  }

  // Instead of run(): activation(x weight^T + bias) goes into the panels of a product that multiplies it. What a gemm sums lies in
  // the order of a panel, so nothing is transposed, rounded to T or moved through memory. Of one block of rows.
  void run_into(float* panels) const {
    const int64_t ld = padded_m(m);
    for (int64_t j = 0; j < n; j += kGemmBlock) {
      const int64_t count = n - j < kGemmBlock ? n - j : kGemmBlock;
      gemm_sums(0, m, j, count, scratch, ld, scratch + kGemmBlock * block_m());
      PYFUSED_BY_ACTIVATION(activation, into_panels(panels, j, count, [&](int64_t r, int64_t i) __attribute__((always_inline)) {
        return A::value(load(scratch + r * ld + i) + splat(bias ? load_one(bias + j + r) : 0.0f));
      });)
    }
  }

  // panels get value(output, row of x) for outputs [j, j + count), kWidth rows at a time; n outputs are the next product's k.
  template <class Value> PYFUSED_INLINE void into_panels(float* panels, int64_t j, int64_t count, const Value& value) const {
    for (int64_t i = 0; i < m; i += kPanel) {
      const int width = width_of(m - i);
      float* to = panels + i * n + j * width;
      for (int64_t r = 0; r < count; ++r)
        for (int half = 0; half < width; half += kWidth) store(to + r * width + half, value(r, i + half));
    }
  }

  // own[r][i], outputs ld apart: the sum over k for output j + r and row i0 + i, without scales.
  void gemm_sums(int64_t i0, int64_t rows, int64_t j, int64_t count, float* own, int64_t ld, float* widened) const {
    for (int64_t c = 0; c < k || c == 0; c += kDepth)
      block(i0, rows, j, count, c, k - c < kDepth ? k - c : kDepth, own, ld, widened);
  }

  // kWidth rows of value(those sums, output) as rows, kGemmBlock apart.
  template <class Value>
  static PYFUSED_INLINE void by_rows(const float* own, int64_t ld, int64_t count, float* sums, const Value& value) {
    for (int64_t r = 0; r < count; r += kWidth) {
      vfloat v[kWidth];
      for (int q = 0; q < kWidth; ++q) v[q] = value(load(own + (r + q) * ld), r + q);
      transpose(v);
      for (int q = 0; q < kWidth; ++q) store(sums + q * kGemmBlock + r, v[q]);
    }
  }
  static PYFUSED_INLINE void by_rows(const float* own, int64_t ld, int64_t count, float* sums) {
    for (int64_t r = 0; r < count; r += kWidth) {
      vfloat v[kWidth];
      load_transposed(own + r * ld, ld, v);
#pragma GCC unroll 16
      for (int q = 0; q < kWidth; ++q) store(sums + q * kGemmBlock + r, v[q]);
    }
  }

  // Memory that will be written is on its way while the last sums are computed: up to 10% of the time if y is large.
  static PYFUSED_INLINE void fetch(const T* to, int64_t count) {
    for (int64_t at = 0; at < count; at += 64 / sizeof(T)) __builtin_prefetch(to + at, 1);
    __builtin_prefetch(to + count - 1, 1);
  }

  // own[r][i] (+)= the sum over [c, c + depth) for outputs j + r and rows i0 + i; rows past `count` are not used.
  void block(int64_t i0, int64_t rows, int64_t j, int64_t count, int64_t c, int64_t depth, float* own, int64_t ld,
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
            fetch(y + (i0 + q) * n + j, count);
        const int width = width_of(m - i0 - i);
        const float* panel = packed + (i0 + i) * lanes() + c / M::kGroup * width;
        float* out = own + top * ld + i;
        if constexpr (kInTiles) {
          const int64_t steps = (steps_of + kWidth - 1) / kWidth;
          width == kPanel ? multiply_tiles<M, 2>(w, apart, panel, steps, out, ld, c == 0)
                          : multiply_tiles<M, 1>(w, apart, panel, steps, out, ld, c == 0);
        } else {
          width == kPanel ? outer_tile<2>(w, apart, panel, steps_of, out, groups * ld, c == 0)
                          : outer_tile<1>(w, apart, panel, steps_of, out, groups * ld, c == 0);
        }
      }
    }
  }

  // kWeightRows rows of W from `row` on, of which there are `count`, and whole tiles of K: as they lie in memory, or where that
  // would read past them a copy with zeros. `second` receives the second row.
  const Lane* rows_for_tiles(int64_t row, int64_t count, int64_t c, int64_t depth, float* to, const Lane*& second) const {
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
  const Lane* row_of(int64_t row, int64_t c, int64_t depth, float* to) const {
    const W* from = weight + row * weight_stride;
    if constexpr (kGrouped) return widen_groups(from + c / 2, scale + (row * k + c) / kScaleGroup, depth, to);
    else return M::row(from + c, depth, to);
  }

  // R rows of w times V vectors of a panel. apart: bytes from a row of w to the next. depth: in lanes. ahead() runs at each step.
  template <int V, int R = kWeightRows, class Ahead = Nothing>
  static void outer_tile(const Lane* w, int64_t apart, const float* panel, int64_t depth, float* out, int64_t ld, bool first,
                         Ahead ahead = {}) {
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
};

}  // namespace pyfused::PYFUSED_ISA
