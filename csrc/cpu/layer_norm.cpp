// layer_norm on the CPU: total = x + residual; y = (total - mean) * rstd * weight + bias, with the rows of row_norm.h.
#include "kernels.h"

#include "row_norm.h"

namespace pyfused::PYFUSED_ISA {

void layer_norm_forward(addr x, addr residual, addr weight, addr bias, addr y, addr total, addr mean, addr rstd,
                        int64_t rows, int64_t n, int64_t x_stride, int64_t residual_stride, double eps, int dtype) {
  PYFUSED_BY_DTYPE(dtype, {
    const Forward<T, true> f{(const T*)x, (const T*)residual, (const T*)weight, (const T*)bias, (T*)y, (T*)total,
                             (float*)mean, (float*)rstd, n, x_stride, residual_stride, (float)eps};
    normalise_rows(f, rows);
  })
}

void layer_norm_backward(addr grad_y, addr grad_total, addr x, addr weight, addr mean, addr rstd, addr grad_x,
                         addr grad_weight, addr grad_bias, int64_t rows, int64_t n, int64_t x_stride, int dtype) {
  PYFUSED_BY_DTYPE(dtype, {
    const Backward<T, true> b{(const T*)grad_y, (const T*)grad_total, (const T*)x, (const T*)weight,
                              (const float*)mean, (const float*)rstd, (T*)grad_x, n, x_stride};
    normalise_rows_backward(b, rows, (T*)grad_weight, (T*)grad_bias);
  })
}

}  // namespace pyfused::PYFUSED_ISA
