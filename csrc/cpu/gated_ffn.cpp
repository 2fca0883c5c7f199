// gated_ffn on the CPU: y = (activation(x w_gate^T) * (x w_up^T)) w_out^T (+ residual), with the kernels of gemm.h.
#include "kernels.h"

#include "gated_product.h"
#include "pyfused/run_in_order.h"

namespace pyfused::PYFUSED_ISA {

void gated_ffn_forward(addr x, addr w_gate, addr w_up, addr w_out, addr residual, addr keep_gate,
                       addr keep_up, addr y, int64_t rows, int64_t n, int64_t f, int64_t m, int64_t x_stride,
                       int64_t w_gate_stride, int64_t w_up_stride, int64_t w_out_stride, int64_t residual_stride,
                       int activation, int dtype) {
  PYFUSED_BY_DTYPE(dtype, {
    GatedProduct<T> in{{(const T*)x, (const T*)w_gate, nullptr, nullptr, nullptr, (T*)keep_gate,
                        rows, f, n, x_stride, w_gate_stride, 0, activation},
                       {(const T*)x, (const T*)w_up, nullptr, nullptr, nullptr, (T*)keep_up,
                        rows, f, n, x_stride, w_up_stride, 0, kIdentity}};
    Product<T, Hidden<T>> out{nullptr, (const T*)w_out, nullptr, (const T*)residual, (T*)y, nullptr,
                              rows, m, f, f, w_out_stride, residual_stride, kIdentity};
    run_network(in, out);
  })
}

// hidden = activation(gate) * up. If grad_hidden is given, grad_gate and grad_up too. All have `count` elements. An output
// may be an input of the same type. hidden and grad_hidden are float32 if dtype is float16.
void gated_ffn_activation(addr gate, addr up, addr grad_hidden, addr hidden, addr grad_gate, addr grad_up,
                          int64_t count, int activation, int dtype) {
  PYFUSED_BY_DTYPE(dtype, {
    const T *g = (const T*)gate, *u = (const T*)up;
    const Hidden<T>* grad = (const Hidden<T>*)grad_hidden;
    Hidden<T>* out = (Hidden<T>*)hidden;
    T *to_gate = (T*)grad_gate, *to_up = (T*)grad_up;
    const int64_t blocks = (count + 255) / 256;
    PYFUSED_BY_ACTIVATION(activation, {
      auto one = [&](int64_t i, auto get, auto put) __attribute__((always_inline)) {
        const vfloat a = get(g + i), b = get(u + i), active = A::value(a);
        if (grad) {
          const vfloat d = get(grad + i);
          put(to_gate + i, A::gradient(a, d * b));
          put(to_up + i, d * active);
        }
        put(out + i, active * b);
      };
      parallel_chunks(threads_for(blocks, 256 * 24), blocks, [&](int, int64_t begin, int64_t end) {
        int64_t i = begin * 256, last = end * 256 < count ? end * 256 : count;
        for (; i + kWidth <= last; i += kWidth)
          one(i, [](const auto* p) { return load(p); }, [](auto* p, vfloat v) { store(p, v); });
        if (const int64_t rest = last - i)
          one(i, [rest](const auto* p) { return load_partial(p, rest); },
              [rest](auto* p, vfloat v) { store_partial(p, v, rest); });
      });
    })
  })
}

}  // namespace pyfused::PYFUSED_ISA
