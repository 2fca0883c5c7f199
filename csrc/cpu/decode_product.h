// How does decode read a matrix of its plan? As a product of few rows in pieces of kChunk outputs, one class for each way in which
// the weights are stored.
#pragma once

#include "pyfused/decode_plan.h"
#include "pyfused/gemv_columns.h"

namespace pyfused::PYFUSED_ISA {
namespace {

// Weights stored by rows, as W. Nothing here ends a product, so y's dtype is any.
template <class W> struct ByRows : Product<float, float, W> {
  static constexpr int64_t kChunk = kGemvBlock, kUnit = kGemvUnit;
  ByRows(const DecodeMatrix& w, const float* x, int64_t rows, float* packed)
      : Product<float, float, W>{x, (const W*)w.weight, nullptr, nullptr, nullptr, nullptr, rows, w.n, w.k, w.k, w.stride, 0,
                             kIdentity, (const typename ScaleOf<W>::type*)w.scale} {
    this->packed = packed;
  }
  void pack_rows() const {
    for (int64_t i = 0; i < this->m; ++i) this->pack_row(i);
  }
  void block(int64_t j, int64_t count, float* sums) const { this->summed().gemv(j, count, sums); }
};

// Weights stored by columns.
template <class T> struct ByColumns : ColumnsProduct<T, float> {
  static constexpr int64_t kChunk = ColumnsProduct<T, float>::kChunk, kUnit = ColumnsProduct<T, float>::kUnit;
  ByColumns(const DecodeMatrix& w, const float* x, int64_t rows, float* packed)
      : ColumnsProduct<T, float>{{x, (const T*)w.weight, nullptr, nullptr, nullptr, nullptr, rows, w.n, w.k, w.k, w.stride, 0,
                                  kIdentity}} {
    this->packed = packed;
  }
  void pack_rows() const { this->pack(0, this->m); }
  void block(int64_t j, int64_t count, float* sums) const { this->summed().run(j, count, sums, sums + this->m * kChunk); }
};

template <class P> struct Kind { using type = P; };
template <class T, class Body> void by_kind(const DecodeMatrix& w, const Body& body) {
  if (w.kind == kInt4) body(Kind<ByRows<int4x2>>{});
  else if (w.kind == kInt8) body(Kind<ByRows<int8_t>>{});
  else if (w.kind == kByColumns) body(Kind<ByColumns<T>>{});
  else body(Kind<ByRows<T>>{});
}

// to[c] = value(c's vector) for `count` elements.
template <class O, class Value> PYFUSED_INLINE void each(O* to, int64_t count, const Value& value) {
  int64_t c = 0;
  for (; c + kWidth <= count; c += kWidth) store(to + c, value(c, [](const auto* p) { return load(p); }));
  if (const int64_t rest = count - c) store_partial(to + c, value(c, [rest](const auto* p) { return load_partial(p, rest); }), rest);
}

}  // namespace
}  // namespace pyfused::PYFUSED_ISA
