// linear on the CPU with int8 weights and rows of x rounded to int8: y = (integers of x) (integers of W)^T * steps * scale + b
// (+ residual), a gemm of int32 sums. 127 steps of a row are its largest value.
#include "kernels.h"

#include "pyfused/run_in_order.h"

namespace pyfused::PYFUSED_ISA {

void linear_dynamic_forward(addr x, addr weight, addr scale, addr bias, addr residual, addr y, int64_t rows, int64_t n,
                            int64_t k, int64_t x_stride, int64_t weight_stride, int64_t residual_stride, int dtype) {
  PYFUSED_BY_DTYPE(dtype, {
    Product<T, T, int8_t, Quads> p{(const T*)x, (const int8_t*)weight, (const T*)bias, (const T*)residual, (T*)y, nullptr,
                                   rows, n, k, x_stride, weight_stride, residual_stride, kIdentity, (const float*)scale};
    run_in_order(p);
  })
}

}  // namespace pyfused::PYFUSED_ISA
