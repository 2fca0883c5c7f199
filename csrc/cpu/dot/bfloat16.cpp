// linear, ffn and gated_ffn of bfloat16 on the CPU, with the processor's dot products: the kernels of gemm.h with Pairs of
// multiply.h. The arguments are those of ../kernels.h; there is no int8 weight here, and none stored by columns.
#include "kernels.h"

#include "../gated_product.h"
#include "pyfused/run_in_order.h"

namespace pyfused::PYFUSED_ISA {
namespace {

const bf16* in(addr p) { return (const bf16*)p; }
bf16* out(addr p) { return (bf16*)p; }

}  // namespace

void linear_forward(addr x, addr weight, addr, addr bias, addr residual, addr y, int64_t rows, int64_t n, int64_t k,
                    int64_t x_stride, int64_t weight_stride, int64_t residual_stride, bool, int, int) {
  Product<bf16> p{in(x), in(weight), in(bias), in(residual), out(y), nullptr,
                  rows, n, k, x_stride, weight_stride, residual_stride, kIdentity};
  run_in_order(p);
}

void ffn_forward(addr x, addr w_in, addr b_in, addr w_out, addr b_out, addr residual, addr pre, addr y,
                 int64_t rows, int64_t n, int64_t f, int64_t m, int64_t x_stride, int64_t w_in_stride,
                 int64_t w_out_stride, int64_t residual_stride, bool, int activation, int) {
  Product<bf16> first{in(x), in(w_in), in(b_in), nullptr, nullptr, out(pre),
                      rows, f, n, x_stride, w_in_stride, 0, activation};
  Product<bf16> second{nullptr, in(w_out), in(b_out), in(residual), out(y), nullptr,
                       rows, m, f, f, w_out_stride, residual_stride, kIdentity};
  run_network(first, second);
}

void gated_ffn_forward(addr x, addr w_gate, addr w_up, addr w_out, addr residual, addr keep_gate,
                       addr keep_up, addr y, int64_t rows, int64_t n, int64_t f, int64_t m, int64_t x_stride,
                       int64_t w_gate_stride, int64_t w_up_stride, int64_t w_out_stride, int64_t residual_stride,
                       int activation, int) {
  GatedProduct<bf16> first{{in(x), in(w_gate), nullptr, nullptr, nullptr, out(keep_gate),
                            rows, f, n, x_stride, w_gate_stride, 0, activation},
                           {in(x), in(w_up), nullptr, nullptr, nullptr, out(keep_up),
                            rows, f, n, x_stride, w_up_stride, 0, kIdentity}};
  Product<bf16> second{nullptr, in(w_out), nullptr, in(residual), out(y), nullptr,
                       rows, m, f, f, w_out_stride, residual_stride, kIdentity};
  run_network(first, second);
}

}  // namespace pyfused::PYFUSED_ISA
