// rms_norm on the CPU: total = x + residual; y = total * rstd * weight, with the rows of row_norm.h.
//
// Speed relative to F.rms_norm, N = 768, one busy Zen 3 core: float32 1.7 at one row, 2.0 at 128, and as much with the
// residual; bfloat16 2.3, and 2.1 with the residual; backward from 1.4 at one row to 2.4 and more at 128.
#include "kernels.h"

#include "row_norm.h"

namespace pyfused::PYFUSED_ISA {

void rms_norm_forward(addr x, addr residual, addr weight, addr y, addr total, addr rstd, int64_t rows, int64_t n,
                      int64_t x_stride, int64_t residual_stride, double eps, int dtype) {
  PYFUSED_BY_DTYPE(dtype, {
    const Forward<T, false> f{(const T*)x, (const T*)residual, (const T*)weight, nullptr, (T*)y, (T*)total, nullptr,
                              (float*)rstd, n, x_stride, residual_stride, (float)eps};
    normalise_rows(f, rows);
  })
}

void rms_norm_backward(addr grad_y, addr grad_total, addr x, addr weight, addr rstd, addr grad_x, addr grad_weight,
                       int64_t rows, int64_t n, int64_t x_stride, int dtype) {
  PYFUSED_BY_DTYPE(dtype, {
    const Backward<T, false> b{(const T*)grad_y, (const T*)grad_total, (const T*)x, (const T*)weight, nullptr,
                               (const float*)rstd, (T*)grad_x, n, x_stride};
    normalise_rows_backward(b, rows, (T*)grad_weight, (T*)nullptr);
  })
}

}  // namespace pyfused::PYFUSED_ISA
