// linear on the CPU: y = x W^T + b (+ residual), with the kernels of gemm.h and gemv_columns.h. With a scale W is int8, and row
// j of it stands for scale[j] times its integers.
#include "kernels.h"

#include "pyfused/gemv_columns.h"

namespace pyfused::PYFUSED_ISA {

void linear_forward(addr x, addr weight, addr scale, addr bias, addr residual, addr y, int64_t rows, int64_t n, int64_t k,
                    int64_t x_stride, int64_t weight_stride, int64_t residual_stride, bool transposed, int dtype) {
  PYFUSED_BY_DTYPE(dtype, {
    if (scale) {
      Product<T, T, int8_t> p{(const T*)x, (const int8_t*)weight, (const T*)bias, (const T*)residual, (T*)y, nullptr,
                              rows, n, k, x_stride, weight_stride, residual_stride, kIdentity, (const float*)scale};
      return run_in_order(p);
    }
    Product<T> p{(const T*)x, (const T*)weight, (const T*)bias, (const T*)residual, (T*)y, nullptr,
                 rows, n, k, x_stride, weight_stride, residual_stride, kIdentity};
    if (transposed) {
      ColumnsProduct<T> columns{p};
      run_in_order(columns);
    } else {
      run_in_order(p);
    }
  })
}

}  // namespace pyfused::PYFUSED_ISA
