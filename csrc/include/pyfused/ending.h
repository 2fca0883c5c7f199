// How does a product of a CPU end? Bias, activation and residual are applied to sums in L1, and y is written.
//
// As the kernels of sums.h, each is compiled once for an instruction set, in csrc/cpu/sums.cpp.
#pragma once

#include "activation.h"
#include "simd.h"

namespace pyfused::PYFUSED_ISA {

// y (m, n) = activation(sums + bias) + residual. The members are gemm.h's.
template <class T> struct Ending {
  const T *bias, *residual;
  T *y, *pre;
  int64_t n, residual_stride;
  int activation;

  // Rows [i, i + rows) of y for outputs [j, j + count), from the sums over k, rows ld apart.
  void rows(int64_t i, int64_t rows, int64_t j, int64_t count, const float* sums, int64_t ld) const;

  // A loop inside one function for each activation: a call for each row takes up to 1% of a product.
  template <class A> void rows_of(int64_t i, int64_t rows, int64_t j, int64_t count, const float* sums, int64_t ld) const {
    const T* b = bias ? bias + j : nullptr;
    for (const int64_t end = i + rows; i < end; ++i, sums += ld) {
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
};

template <class T>
void Ending<T>::rows(int64_t i, int64_t rows, int64_t j, int64_t count, const float* sums, int64_t ld) const {
  PYFUSED_BY_ACTIVATION(activation, rows_of<A>(i, rows, j, count, sums, ld);)
}

extern template struct Ending<float>;
extern template struct Ending<f16>;
extern template struct Ending<bf16>;

}  // namespace pyfused::PYFUSED_ISA
