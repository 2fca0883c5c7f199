// How is activation(x w_gate^T) * (x w_up^T) computed on the CPU? As two products of gemm.h in one.
//
// x is packed once. A block of gate and the same block of up are summed one after the other, so the activation and the
// product find both in L1. Only `hidden` (rows, F) is stored, of many rows a block's. It has x's dtype, but float32 for
// float16, where the product does not fit. For a few rows the weights are moved once, 2 N F + F M elements, and nothing else of that size.
#pragma once

#include "pyfused/gemm.h"

namespace pyfused::PYFUSED_ISA {
namespace {

template <class T> struct HiddenType { using type = T; };
template <> struct HiddenType<f16> { using type = float; };
template <class T> using Hidden = typename HiddenType<T>::type;

// hidden = activation(x w_gate^T) * (x w_up^T): two products that share the packed x, with the interface of one.
template <class T> struct GatedProduct {
  Product<T> gate, up;  // each one's `pre` is kept for the backward, or null; the activation is gate's
  Hidden<T>* hidden = nullptr;
  static constexpr int64_t kBlockM = Product<T>::kBlockM, kShareM = Product<T>::kShareM;
  static constexpr bool kOfElements = Product<T>::kOfElements;
  float* scratch = nullptr;

  int64_t packed_size() const { return gate.packed_size(); }
  int64_t scratch_size() const { return gate.scratch_size() + second_size() + kWidth * kGemmBlock; }
  int64_t second_size() const { return gate.by_gemv() ? gate.m * kGemvBlock : kGemmBlock * gate.block_m(); }
  int64_t row_count() const { return gate.m; }
  int64_t pack_items() const { return gate.pack_items(); }
  int64_t run_items() const { return gate.run_items(); }
  int64_t run_work() const { return 2 * gate.run_work(); }
  void use(float* panels, float* own) {
    gate.packed = up.packed = panels, scratch = own;
    if constexpr (std::is_same_v<Hidden<T>, T>) up.y = hidden;  // so that it is fetched
  }
  GatedProduct of_rows(int64_t i, int64_t count) const {
    return {gate.of_rows(i, count), up.of_rows(i, count), hidden ? hidden + i * gate.n : nullptr};
  }
  bool keeps() const { return gate.pre; }
  void give(Hidden<T>* to) { hidden = to; }

  void pack(int64_t begin, int64_t end) const { gate.pack(begin, end); }
  void run(int share, int64_t begin, int64_t end) const {
    float* own = scratch + share * scratch_size();
    const int64_t unit = gate.run_unit(), last = end * unit < gate.n ? end * unit : gate.n;
    gate.by_gemv() ? run_gemv(begin * unit, last, own) : run_gemm(begin * unit, last, own);
  }

  void run_gemv(int64_t first, int64_t last, float* sums) const {
    float* others = sums + second_size();
    const auto gates = gate.summed(), ups = up.summed();
    for (int64_t j = first; j < last; j += kGemvBlock) {
      const int64_t count = last - j < kGemvBlock ? last - j : kGemvBlock;
      gates.gemv(j, count, sums);
      ups.gemv(j, count, others);
      for (int64_t i = 0; i < gate.m; ++i) finish(i, j, count, sums + i * kGemvBlock, others + i * kGemvBlock);
    }
  }

  void run_gemm(int64_t first, int64_t last, float* own) const {
    [[maybe_unused]] const TilesInUse tiles;
    float *other = own + second_size(), *widened = other + second_size();
    float *sums = widened + kWeightRows * gate.kWidened, *others = sums + kWidth * kGemmBlock;
    const int64_t block = gate.block_m();
    const auto gates = gate.summed(), ups = up.summed();
    for (int64_t i0 = 0; i0 < gate.m; i0 += block) {
      const int64_t rows = gate.m - i0 < block ? gate.m - i0 : block, ld = gate.padded_m(rows);
      for (int64_t j = first; j < last; j += kGemmBlock) {
        const int64_t count = last - j < kGemmBlock ? last - j : kGemmBlock;
        gates.gemm(i0, rows, j, count, own, ld, widened);
        ups.gemm(i0, rows, j, count, other, ld, widened);
        for (int64_t i = 0; i < rows; i += kWidth) {
          gate.by_rows(own + i, ld, count, sums);
          up.by_rows(other + i, ld, count, others);
          for (int64_t q = 0; q < kWidth && i + q < rows; ++q)
            finish(i0 + i + q, j, count, sums + q * kGemmBlock, others + q * kGemmBlock);
        }
      }
    }
  }

  // As Product's.
  void run_into(float* panels) const {
    float *own = scratch, *other = own + second_size(), *widened = other + second_size();
    const int64_t ld = gate.padded_m(gate.m);
    const auto gates = gate.summed(), ups = up.summed();
    for (int64_t j = 0; j < gate.n; j += kGemmBlock) {
      const int64_t count = gate.n - j < kGemmBlock ? gate.n - j : kGemmBlock;
      gates.gemm(0, gate.m, j, count, own, ld, widened);
      ups.gemm(0, gate.m, j, count, other, ld, widened);
      PYFUSED_BY_ACTIVATION(gate.activation, gate.into_panels(panels, j, count, [&](int64_t r, int64_t i) {
        return A::value(load(own + r * ld + i)) * load(other + r * ld + i);
      });)
    }
  }

  // Row i of hidden for features [j, j + count), from the sums over k.
  template <class A> void finish_row(int64_t i, int64_t j, int64_t count, const float* gates, const float* ups) const {
    const int64_t at = i * gate.n + j;
    T *keep_gate = gate.pre ? gate.pre + at : nullptr, *keep_up = up.pre ? up.pre + at : nullptr;
    int64_t c = 0;
    for (; c + kWidth <= count; c += kWidth) {
      const vfloat g = load(gates + c), u = load(ups + c);
      if (keep_gate) store(keep_gate + c, g), store(keep_up + c, u);
      store(hidden + at + c, A::value(g) * u);
    }
    if (const int64_t rest = count - c) {
      const vfloat g = load_partial(gates + c, rest), u = load_partial(ups + c, rest);
      if (keep_gate) store_partial(keep_gate + c, g, rest), store_partial(keep_up + c, u, rest);
      store_partial(hidden + at + c, A::value(g) * u, rest);
    }
  }
  void finish(int64_t i, int64_t j, int64_t count, const float* gates, const float* ups) const {
    PYFUSED_BY_ACTIVATION(gate.activation, finish_row<A>(i, j, count, gates, ups);)
  }
};

}  // namespace
}  // namespace pyfused::PYFUSED_ISA
