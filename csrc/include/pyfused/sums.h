// What do the CPU's products sum? x W^T. Two kernels read W row by row, the way nn.Linear stores it. They never pack it.
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
// The kernels depend on how W is stored and multiplied, and on no dtype of x or y. So each is compiled once for an instruction set,
// in csrc/cpu/sums.cpp, where gemv_tiles.h and gemm_tiles.h define it. They are two thirds of the products' machine code.
#pragma once

#include <cstdint>
#include <type_traits>

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

// The sums over k of x (m, k), packed, times weight (n, k). M says how they are multiplied.
template <class W, class M> struct Sums {
  const float* packed;  // rows of x for the gemv, panels for the gemm, as gemm.h packs them
  const W* weight;
  const typename ScaleOf<W>::type* scale;
  int64_t m, n, k, weight_stride;
  char* y;         // (m, n), or null: the gemm fetches what will be written after the last sums
  int64_t y_size;  // bytes of an element

  static constexpr bool kGrouped = std::is_same_v<W, int4x2>, kScaled = sizeof(W) == 1 && !kGrouped;
  static constexpr bool kOfIntegers = M::kGroup == 4, kOfElements = M::kGroup == 1;
  static constexpr bool kInTiles = kTiles && !kOfElements;
  using Lane = typename M::Lane;
  // Of K, how much a gemm's tile sums at a time. Rows of W that are widened have to stay in L1. Others read a panel from L2 in
  // either case; with AVX-512 fewer, longer tiles are 1% to 2% faster.
  static constexpr int64_t kDepth = sizeof(W) == 4 && kManyRegisters ? 1024 : M::kDepth;
  static constexpr int64_t kWidened = kDepth / M::kGroup + kWidth;  // floats for a row of W as lanes

  // A gemm widens rows of W into L1 and reads them again, so half precision stays with gemv longer: 1.4 times faster at
  // 16 rows. float32 is as fast either way from 9 rows on. AVX-512's gemv has larger tiles. AMX's tiles wait for memory, of few
  // rows too; a gemv of 8 rows still does.
  static constexpr int64_t kGemvRows = kOfIntegers      ? -1
                                       : kInTiles       ? 8
                                       : kManyRegisters ? (sizeof(W) == 2 ? 24 : 12)
                                                        : (sizeof(W) == 4 ? 8 : 16);

  // Of K, how much a gemv sums in one register's lanes. With four lanes the chains of longer sums lose bits that a library with
  // wider vectors keeps.
  static constexpr int64_t kGemvDepth = kWidth == 4 ? 384 : INT64_MAX / 2;

  // Bytes of W that a gemv's first tile fetches ahead; 0 leaves it to the hardware.
  static constexpr size_t kAhead = kManyRegisters ? 512 : 0;

  // ---- how x is packed: rows of padded_k() for the gemv, or panels of (lanes(), width_of()) -----------------------------

  static int64_t padded_k(int64_t k) {
    constexpr int64_t step = kGrouped ? kMostPadding : kPairStep;
    return (k + step - 1) / step * step;
  }
  static int64_t lanes(int64_t k) {  // whole tiles with AMX: zeros follow the last
    const int64_t groups = (k + M::kGroup - 1) / M::kGroup;
    return kInTiles ? (groups + kWidth - 1) / kWidth * kWidth : groups;
  }
  static int width_of(int64_t rows) { return rows > kWidth ? kPanel : kWidth; }  // the last panel may be one vector wide

  // ---- the two kernels ------------------------------------------------------------------------------------------------

  // sums[i][r], rows kGemvBlock apart: the sum for row i and output j + r.
  void gemv(int64_t j, int64_t count, float* sums) const;

  // own[r][i], outputs ld apart: the sum for output j + r and row i0 + i, without the scales of int8.
  void gemm(int64_t i0, int64_t rows, int64_t j, int64_t count, float* own, int64_t ld, float* widened) const;

  static constexpr int tile_rows(int mb);
  template <int MB> void dots(int64_t j, int64_t count, float* sums) const;
  template <int MB, int R> void every_row(int64_t j, int64_t apart, float* sums) const;
  template <int MB, int R> void dot_tile(int64_t i, int64_t j, int64_t apart, float* sums) const;

  void block(int64_t i0, int64_t rows, int64_t j, int64_t count, int64_t c, int64_t depth, float* own, int64_t ld,
             float* widened) const;
  const Lane* rows_for_tiles(int64_t row, int64_t count, int64_t c, int64_t depth, float* to, const Lane*& second) const;
  const Lane* row_of(int64_t row, int64_t c, int64_t depth, float* to) const;
};

extern template struct Sums<float, Elements>;
extern template struct Sums<f16, Elements>;
extern template struct Sums<bf16, Elements>;
extern template struct Sums<int8_t, Elements>;
extern template struct Sums<int4x2, Elements>;
#if defined(PYFUSED_DOT_BF16)
extern template struct Sums<bf16, Pairs>;
#endif
#if defined(PYFUSED_DOT_INT8)
extern template struct Sums<int8_t, Quads>;
#endif

}  // namespace pyfused::PYFUSED_ISA
