// How does y = x W^T + b run on a CPU? As the sums of sums.h between two steps: x is packed for them, and finished rows leave
// (ending.h). Few rows take the gemv, more the gemm.
//
// run_in_order.h says how threads share a Product, or several.
#pragma once

#include <cstdint>
#include <type_traits>

#include "activation.h"
#include "ending.h"
#include "sums.h"

namespace pyfused::PYFUSED_ISA {

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

  using S = Sums<W, M>;
  static constexpr bool kGrouped = S::kGrouped, kScaled = S::kScaled, kOfIntegers = S::kOfIntegers, kOfElements = S::kOfElements;
  static constexpr int64_t kWidened = S::kWidened;
  using Input = X;

  // Most rows of x in a block of a gemm, and fewest that a thread takes for its own. A block's panels, 288 KB for K = 768, stay in
  // L2 (K = 3072: 7% faster than with 128 rows). W is widened for each block. AMX is done with 128 rows before W is there.
  static constexpr int64_t kBlockM = S::kInTiles ? 256 : sizeof(W) == 4 ? 96 : 128, kShareM = sizeof(W) == 4 ? 64 : 128;

  bool by_gemv() const { return m <= S::kGemvRows; }
  int64_t lanes() const { return S::lanes(k); }
  int64_t padded_k() const { return S::padded_k(k); }
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

  Sums<W, M> summed() const { return {packed, weight, scale, m, n, k, weight_stride, (char*)y, sizeof(T)}; }
  Ending<T> ending() const { return {bias, residual, y, pre, n, residual_stride, activation}; }

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
    const auto product = summed();
    const auto end = ending();
    for (int64_t j = first; j < last; j += kGemvBlock) {
      const int64_t count = last - j < kGemvBlock ? last - j : kGemvBlock;
      product.gemv(j, count, sums);
      end.rows(0, m, j, count, sums, kGemvBlock);
    }
  }

  // ---- gemm ---------------------------------------------------------------------------------------------------------

  // A panel holds (lanes of K, width). Rows past m are zero.
  void pack_panel(int64_t i) const {
    const int width = S::width_of(m - i);
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
    const auto product = summed();
    const auto end = ending();
    for (int64_t i0 = 0; i0 < m; i0 += block_m()) {
      const int64_t rows = m - i0 < block_m() ? m - i0 : block_m(), ld = padded_m(rows);
      for (int64_t j = first; j < last; j += kGemmBlock) {
        const int64_t count = last - j < kGemmBlock ? last - j : kGemmBlock;
        product.gemm(i0, rows, j, count, own, ld, widened);
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
          end.rows(i0 + i, rows - i < kWidth ? rows - i : kWidth, j, count, sums, kGemmBlock);
        }
      }
    }
  }

  // Instead of run(): activation(x weight^T + bias) goes into the panels of a product that multiplies it. What a gemm sums lies in
  // the order of a panel, so nothing is transposed, rounded to T or moved through memory. Of one block of rows.
  void run_into(float* panels) const {
    const int64_t ld = padded_m(m);
    const auto product = summed();
    for (int64_t j = 0; j < n; j += kGemmBlock) {
      const int64_t count = n - j < kGemmBlock ? n - j : kGemmBlock;
      product.gemm(0, m, j, count, scratch, ld, scratch + kGemmBlock * block_m());
      PYFUSED_BY_ACTIVATION(activation, into_panels(panels, j, count, [&](int64_t r, int64_t i) __attribute__((always_inline)) {
        return A::value(load(scratch + r * ld + i) + splat(bias ? load_one(bias + j + r) : 0.0f));
      });)
    }
  }

  // panels get value(output, row of x) for outputs [j, j + count), kWidth rows at a time; n outputs are the next product's k.
  template <class Value> PYFUSED_INLINE void into_panels(float* panels, int64_t j, int64_t count, const Value& value) const {
    for (int64_t i = 0; i < m; i += kPanel) {
      const int width = S::width_of(m - i);
      float* to = panels + i * n + j * width;
      for (int64_t r = 0; r < count; ++r)
        for (int half = 0; half < width; half += kWidth) store(to + r * width + half, value(r, i + half));
    }
  }

  // kWidth rows of value(a gemm's sums, output) as rows, kGemmBlock apart.
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
};

}  // namespace pyfused::PYFUSED_ISA
