// linear on the CPU: y = x W^T + b (+ residual), with the kernels of gemm.h, gemv_columns.h and gemm_columns.h. W may be
// int8 or int4, with scales.
#include "kernels.h"

#include "pyfused/gemm_columns.h"
#include "pyfused/gemv_columns.h"
#include "pyfused/run_in_order.h"

namespace pyfused::PYFUSED_ISA {

void linear_forward(addr x, addr weight, addr scale, addr bias, addr residual, addr y, int64_t rows, int64_t n, int64_t k,
                    int64_t x_stride, int64_t weight_stride, int64_t residual_stride, bool transposed, int bits, int dtype) {
  PYFUSED_BY_DTYPE(dtype, {
    auto by_integers = [&](auto* integers, auto* scales) {
      Product<T, T, std::remove_const_t<std::remove_pointer_t<decltype(integers)>>> p{
          (const T*)x, integers, (const T*)bias, (const T*)residual, (T*)y, nullptr, rows, n, k, x_stride, weight_stride,
          residual_stride, kIdentity, scales};
      run_in_order(p);
    };
    if (bits == 4) return by_integers((const int4x2*)weight, (const bf16*)scale);
    if (bits == 8) return by_integers((const int8_t*)weight, (const float*)scale);
    Product<T> p{(const T*)x, (const T*)weight, (const T*)bias, (const T*)residual, (T*)y, nullptr,
                 rows, n, k, x_stride, weight_stride, residual_stride, kIdentity};
    if (!transposed) return run_in_order(p);
    if (rows <= ColumnsProduct<T>::kMost) {
      ColumnsProduct<T> few{p};
      run_in_order(few);
    } else {
      PackedColumnsProduct<T> many{p};
      run_in_order(many);
    }
  })
}

}  // namespace pyfused::PYFUSED_ISA
