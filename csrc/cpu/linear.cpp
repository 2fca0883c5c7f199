// linear on the CPU: y = x W^T + b (+ residual), with the kernels of gemm.h.
#include "kernels.h"

#include "pyfused/gemm.h"

namespace pyfused::PYFUSED_ISA {

void linear_forward(addr x, addr weight, addr bias, addr residual, addr y, int64_t rows, int64_t n, int64_t k,
                    int64_t x_stride, int64_t weight_stride, int64_t residual_stride, int dtype) {
  PYFUSED_BY_DTYPE(dtype, {
    Product<T> p{(const T*)x, (const T*)weight, (const T*)bias, (const T*)residual, (T*)y, nullptr,
                 rows, n, k, x_stride, weight_stride, residual_stride, kIdentity};
    run_in_order(p);
  })
}

}  // namespace pyfused::PYFUSED_ISA
