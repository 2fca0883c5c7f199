// rms_norm on the CPU: total = x + residual; y = total * rstd * weight, with the rows of row_norm.h.
#include "kernels.h"

#include "row_norm.h"

namespace pyfused::PYFUSED_ISA {

void rms_norm_forward(addr x, addr residual, addr weight, addr bias, addr y, addr total, addr mean, addr rstd,
                      int64_t rows, int64_t n, int64_t x_stride, int64_t residual_stride, double eps, int dtype) {
  normalise_rows<false>(x, residual, weight, bias, y, total, mean, rstd, rows, n, x_stride, residual_stride, eps, dtype);
}

void rms_norm_backward(addr grad_y, addr grad_total, addr x, addr weight, addr mean, addr rstd, addr grad_x,
                       addr grad_weight, addr grad_bias, int64_t rows, int64_t n, int64_t x_stride, int dtype) {
  normalise_rows_backward<false>(grad_y, grad_total, x, weight, mean, rstd, grad_x, grad_weight, grad_bias, rows, n,
                                 x_stride, dtype);
}

}  // namespace pyfused::PYFUSED_ISA
