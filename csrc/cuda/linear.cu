// linear on CUDA, up to 16 rows: y = activation(x W^T + bias) + residual; x (R, K), W (N, K). few_rows.cuh has the kernels
// and explains them; few_rows_columns.cuh has those for up to 8 rows and W stored as (K, N). cuBLAS multiplies more rows
// (kernels/cuda/linear.py).
//
// Moves the weights once; x, bias, residual and y are small beside them. 2 R N K FLOPs. Floors at 3.0 TB/s in bf16,
// R = 1 or 16: GPT-2's 768 -> 3072 4.7 MB, 1.6 us; its head, 768 -> 50257, 77 MB, 26 us; T5-XL's 2048 -> 2048 8.4 MB,
// 2.8 us. By columns 3072 -> 768 is 48 blocks, which read 32 bytes a clock each: 4 us. Predicted: 80 to 90% of the
// bandwidth for the head, and about 1.5 us of launch and latency on top of the floor for the small ones. An H200 measured the
// first two kinds: docs/performance/gpus.md.
//
// ffn and gated_ffn call this launcher for their projections. They need the activation, `pre` (its argument, kept for a
// backward) and wide_x (x in float32, weights in float16).
#include "kernels.h"
#include "pyfused/few_rows_columns.cuh"

namespace pyfused::cuda {

void linear_forward(addr x, addr weight, addr bias, addr residual, addr y, addr pre, int64_t rows, int64_t n, int64_t k,
                    int64_t x_stride, int64_t weight_stride, bool by_columns, int64_t residual_stride, int activation,
                    bool wide_x, int dtype, int device, addr stream) {
  const Launch launch{"linear forward", rows, n, device};
  const OnDevice guard(launch);
  const auto run = [&](auto element, auto wide) {
    using T = decltype(element);
    using X = decltype(wide);
    FewRows<T, X, T> a{};
    a.x = (const X*)x, a.weight = (const T*)weight, a.bias = (const T*)bias, a.residual = (const T*)residual;
    a.y = (T*)y, a.pre = (T*)pre;
    a.rows = (int)rows, a.n = (int)n, a.k = (int)k, a.activation = activation;
    a.x_stride = x_stride, a.weight_stride = weight_stride, a.residual_stride = residual_stride;
    if constexpr (sizeof(T) == sizeof(X)) {
      if (by_columns) return few_rows_by_columns(a, stream);
    }
    few_rows<false>(a, stream);
  };
  if (wide_x && dtype == 1) run(__half(), float());
  else PYFUSED_BY_DTYPE(dtype, { run(T(), T()); })
  launch.check();
}

}  // namespace pyfused::cuda
