// ffn on the CPU: y = activation(x w_in^T + b_in) w_out^T + b_out (+ residual), two products of gemm.h, or of gemv_columns.h and
// gemm_columns.h for weights by columns, in one region.
//
// For a few rows it moves the weights once, N F + F M elements, and nothing else of that size. The activation, the
// biases and the residual are applied while the sums are in L1. What lies between the products, (rows, F), is stored in x's
// dtype, as in plain PyTorch; of many rows only a block's exists at a time, in float32 (run_in_order.h).
#include "kernels.h"

#include "pyfused/gemm_columns.h"
#include "pyfused/gemv_columns.h"
#include "pyfused/run_in_order.h"

namespace pyfused::PYFUSED_ISA {

void ffn_forward(addr x, addr w_in, addr b_in, addr w_out, addr b_out, addr residual, addr pre, addr y,
                 int64_t rows, int64_t n, int64_t f, int64_t m, int64_t x_stride, int64_t w_in_stride,
                 int64_t w_out_stride, int64_t residual_stride, bool transposed, int activation, int dtype) {
  PYFUSED_BY_DTYPE(dtype, {
    Product<T> in{(const T*)x, (const T*)w_in, (const T*)b_in, nullptr, nullptr, (T*)pre,
                  rows, f, n, x_stride, w_in_stride, 0, activation};
    Product<T> out{nullptr, (const T*)w_out, (const T*)b_out, (const T*)residual, (T*)y, nullptr,
                   rows, m, f, f, w_out_stride, residual_stride, kIdentity};
    if (!transposed) return run_network(in, out);
    if (rows <= ColumnsProduct<T>::kMost) {
      ColumnsProduct<T> few_in{in}, few_out{out};
      run_network(few_in, few_out);
    } else {
      PackedColumnsProduct<T> many_in{in}, many_out{out};
      run_network(many_in, many_out);
    }
  })
}

// inner = activation(pre). If grad_inner and grad_pre are given, grad_pre = grad_inner times the derivative. All have
// `count` elements. An output may be its own input.
void ffn_activation(addr pre, addr grad_inner, addr inner, addr grad_pre, int64_t count, int activation, int dtype) {
  PYFUSED_BY_DTYPE(dtype, {
    const T *p = (const T*)pre, *g = (const T*)grad_inner;
    T *y = (T*)inner, *d = (T*)grad_pre;
    const int64_t blocks = (count + 255) / 256;
    PYFUSED_BY_ACTIVATION(activation, {
      auto one = [&](int64_t i, auto get, auto put) __attribute__((always_inline)) {
        const vfloat v = get(p + i);
        if (g) put(d + i, A::gradient(v, get(g + i)));
        if (y) put(y + i, A::value(v));
      };
      parallel_chunks(threads_for(blocks, 256 * 16), blocks, [&](int, int64_t begin, int64_t end) {
        int64_t i = begin * 256, last = end * 256 < count ? end * 256 : count;
        for (; i + kWidth <= last; i += kWidth)
          one(i, [](const T* q) { return load(q); }, [](T* q, vfloat v) { store(q, v); });
        if (const int64_t rest = last - i)
          one(i, [rest](const T* q) { return load_partial(q, rest); },
              [rest](T* q, vfloat v) { store_partial(q, v, rest); });
      });
    })
  })
}

}  // namespace pyfused::PYFUSED_ISA
