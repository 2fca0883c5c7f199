// ffn on CUDA: y = activation(x W_in^T + b_in) W_out^T + b_out (+ residual); x (R, N), W_in (F, N), W_out (M, F).
//
// Up to 16 rows, decoding: two launches of linear.cu's kernels stream each weight once. The first does in-projection +
// bias + activation, the second out-projection + bias + residual. The inner activations (R, F) stay in the L2 in the
// reference's dtype. 2 F (N + M) bytes in 16 bits, 2 R F (N + M) FLOPs. GPT-2 124M, 768 -> 3072 -> 768: 9.4 MB, 3.1 us at
// 3.0 TB/s; predicted 5.5 us in a CUDA graph for R = 1 and R = 16, because each launch adds about 1.2 us of start and
// latency. T5-XL's sizes without gate, 2048 -> 5120 -> 2048: 42 MB, 14 us, predicted 17.
//
// More rows: activation_kernel runs in place between the library's products, which add the biases. It moves 4 R F bytes in
// 16 bits; a thread reads and writes 16 bytes. R = 4096, F = 3072: 50 MB, 17 us at 3.0 TB/s, beside 48 us of products at
// 800 TFLOP/s. In the backward the same kernel reads `pre` and the gradient of inner, and writes inner and the gradient of
// pre in one pass: 8 R F bytes, 34 us there, beside 97 us of products.
// An H100 measured other sizes: docs/performance/index.md.
#include "kernels.h"
#include "pyfused/activation.cuh"
#include "pyfused/launch.h"

namespace pyfused::cuda {
namespace {

constexpr int kThreads = 256;

// ---- kernels --------------------------------------------------------------------------------------------------------
template <class T, int V, bool GRADIENT>
__global__ void __launch_bounds__(kThreads)
    activation_kernel(const T* pre, const T* grad_inner, T* inner, T* grad_pre, int64_t size, int activation) {
  const int64_t step = (int64_t)gridDim.x * kThreads * V;
  for (int64_t at = ((int64_t)blockIdx.x * kThreads + threadIdx.x) * V; at < size; at += step) {
    const Pack<T, V> in = load<V>(pre + at);
    Pack<T, V> out, grad{};
    if (GRADIENT) grad = load<V>(grad_inner + at);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float x = widen(in.at[j]);
      out.at[j] = narrow<T>(activate(activation, x));
      if (GRADIENT) grad.at[j] = narrow<T>(activate_gradient(activation, x, widen(grad.at[j])));
    }
    store<V>(inner + at, out);
    if (GRADIENT) store<V>(grad_pre + at, grad);
  }
}

// ---- launchers ------------------------------------------------------------------------------------------------------
template <class T, int V>
void launch_activation(const T* pre, const T* grad_inner, T* inner, T* grad_pre, int64_t size, int activation,
                       addr stream) {
  auto kernel = grad_inner ? activation_kernel<T, V, true> : activation_kernel<T, V, false>;
  const unsigned blocks = capped(up(size, kThreads * V));
  PYFUSED_LAUNCH(kernel, blocks, kThreads, 0, stream, pre, grad_inner, inner, grad_pre, size, activation);
}

}  // namespace

void ffn_forward(addr x, addr w_in, addr b_in, addr w_out, addr b_out, addr residual, addr inner, addr pre, addr y,
                 int64_t rows, int64_t n, int64_t f, int64_t m, int64_t x_stride, int64_t w_in_stride, bool in_by_columns,
                 int64_t w_out_stride, bool out_by_columns, int64_t residual_stride, int activation, int dtype, int device,
                 addr stream) {
  linear_forward(x, w_in, b_in, 0, inner, pre, rows, f, n, x_stride, w_in_stride, in_by_columns, 0, activation, false,
                 dtype, device, stream);
  linear_forward(inner, w_out, b_out, residual, y, 0, rows, m, f, f, w_out_stride, out_by_columns, residual_stride, 0,
                 false, dtype, device, stream);
}

void ffn_activation(addr pre, addr grad_inner, addr inner, addr grad_pre, int64_t size, int activation, int dtype,
                    int device, addr stream) {
  if (size == 0) return;
  const Launch launch{"ffn activation", 1, size, device};
  const OnDevice guard(launch);
  PYFUSED_BY_DTYPE(dtype, {
    constexpr int V = 16 / sizeof(T);
    const bool wide = aligned16({pre, grad_inner, inner, grad_pre}) && size % V == 0;
    auto run = wide ? launch_activation<T, V> : launch_activation<T, 1>;
    run((const T*)pre, (const T*)grad_inner, (T*)inner, (T*)grad_pre, size, activation, stream);
  })
  launch.check();
}

}  // namespace pyfused::cuda
