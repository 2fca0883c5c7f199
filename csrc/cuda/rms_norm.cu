// rms_norm on CUDA: total = x + residual; y = total * rstd * weight, with the kernels of row_norm.cuh.
#include "row_norm.cuh"
#include "row_norm_backward.cuh"

namespace pyfused::cuda {

void rms_norm_forward(addr x, addr residual, addr weight, addr bias, addr y, addr total, addr mean, addr rstd,
                      int64_t rows, int64_t n, int64_t x_stride, int64_t residual_stride, double eps, int dtype,
                      int device, addr stream) {
  normalise_rows<false>({"rms_norm forward", rows, n, device}, x, residual, weight, bias, y, total, mean, rstd,
                        x_stride, residual_stride, eps, dtype, stream);
}

int64_t rms_norm_backward_parts(int64_t rows, int64_t n, int multiprocessors) {
  return backward_parts(rows, n, multiprocessors);
}

void rms_norm_backward(addr grad_y, addr grad_total, addr x, addr weight, addr mean, addr rstd, addr grad_x,
                       addr grad_weight, addr grad_bias, addr partial, int64_t parts, int64_t rows, int64_t n,
                       int64_t x_stride, int dtype, int device, addr stream) {
  normalise_rows_backward<false>({"rms_norm backward", rows, n, device}, grad_y, grad_total, x, weight, mean, rstd,
                                 grad_x, grad_weight, grad_bias, partial, parts, x_stride, dtype, stream);
}

}  // namespace pyfused::cuda
