// gated_ffn on CUDA: y = (activation(x W_gate^T) * (x W_up^T)) W_out^T (+ residual); x (R, N), W_gate and W_up (F, N),
// W_out (M, F).
//
// Up to 16 rows, decoding: two launches of few_rows.cuh's kernels. The first streams W_gate and W_up, with a feature's gate
// and up column in the same warp, and writes activation(gate) * up. The second is linear.cu's product with residual. Each
// weight is read once: 2 F (2 N + M) bytes in 16 bits, 2 R F (2 N + M) FLOPs. T5-XL, 2048 -> 5120 -> 2048: 63 MB, 21 us at
// 3.0 TB/s; T5-base, 768 -> 2048 -> 768: 9.4 MB, 3.1 us. Predicted for R = 1 and 16 in bf16: 25 us (84% of the bandwidth)
// and 5.5 us, of which two launches take 2.4. An H100's measurements, outside a graph: docs/performance/index.md.
// float16: the product may exceed 65504 (Flan-T5: 1e6), so these few rows are kept in float32. The out-projection then runs
// on the CUDA cores. Beyond 8 rows its FMAs are the bound, not its bytes: about 1.7 times the floor.
//
// More rows: one pass between the library's products, 6 R F bytes in 16 bits (R = 4096, F = 5120: 126 MB, 42 us beside
// 322 us of products at 800 TFLOP/s). In float16 the pass gives each row a power-of-two scale. It reads the row twice for
// that, the second time from the L2. unscale_kernel multiplies the result by the scale, 2 to 3 accesses to (R, M).
// Backward: one pass of 12 R F bytes, with hidden in float32 for float16. An H100 timed it with its products.
#include "kernels.h"
#include "pyfused/few_rows.cuh"

namespace pyfused::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLargest = 12;  // a scaled row stays below 2^12, so sums of a few thousand terms stay in float16's range

// The type of activation(gate) * up.
template <class T> struct Hidden {
  using type = T;
};
template <> struct Hidden<__half> {
  using type = float;
};

template <class T> struct Pass {
  const T *gate, *up, *grad_hidden;
  typename Hidden<T>::type* hidden;
  T *grad_gate, *grad_up;
  int64_t size;
  int activation;
};

// ---- kernels --------------------------------------------------------------------------------------------------------
template <class T, int V, bool GRADIENT> __global__ void __launch_bounds__(kThreads) pass_kernel(Pass<T> a) {
  using H = typename Hidden<T>::type;
  constexpr int H_V = V * sizeof(H) > 16 ? 16 / sizeof(H) : V;  // elements of one access to hidden
  const int64_t step = (int64_t)gridDim.x * kThreads * V;
  for (int64_t at = ((int64_t)blockIdx.x * kThreads + threadIdx.x) * V; at < a.size; at += step) {
    Pack<T, V> gate = load<V>(a.gate + at), up = load<V>(a.up + at), grad{};
    if (GRADIENT) grad = load<V>(a.grad_hidden + at);
    float active[V];
#pragma unroll
    for (int j = 0; j < V; ++j) active[j] = activate(a.activation, widen(gate.at[j]));
#pragma unroll
    for (int half = 0; half < V; half += H_V) {
      Pack<H, H_V> out;
#pragma unroll
      for (int j = 0; j < H_V; ++j) out.at[j] = narrow<H>(active[half + j] * widen(up.at[half + j]));
      store<H_V>(a.hidden + at + half, out);
    }
    if (GRADIENT) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float g = widen(grad.at[j]);
        gate.at[j] = narrow<T>(activate_gradient(a.activation, widen(gate.at[j]), g * widen(up.at[j])));
        up.at[j] = narrow<T>(g * active[j]);
      }
      store<V>(a.grad_gate + at, gate);
      store<V>(a.grad_up + at, up);
    }
  }
}

// A block owns a row. It finds the largest |activation(gate) * up|, then stores the row divided by a power of two.
template <int V>
__global__ void __launch_bounds__(kThreads)
    scaled_kernel(const __half* gates, const __half* ups, __half* hiddens, float* scale, int64_t f, int activation) {
  __shared__ float scratch[kThreads / kWarp];
  const __half *gate = gates + blockIdx.x * f, *up = ups + blockIdx.x * f;
  __half* hidden = hiddens + blockIdx.x * f;
  float largest = 0;
  for (int64_t at = threadIdx.x * V; at < f; at += kThreads * V) {
    const Pack<__half, V> g = load<V>(gate + at), u = load<V>(up + at);
#pragma unroll
    for (int j = 0; j < V; ++j) largest = fmaxf(largest, fabsf(activate(activation, widen(g.at[j])) * widen(u.at[j])));
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, offset));
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = largest;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kThreads / kWarp; ++warp) largest = fmaxf(largest, scratch[warp]);
  const int exponent = (__float_as_int(largest) >> 23) - 127, shift = max(exponent + 1 - kLargest, 0);
  const float down = __int_as_float((127 - shift) << 23);
  if (threadIdx.x == 0) scale[blockIdx.x] = __int_as_float((127 + shift) << 23);
  for (int64_t at = threadIdx.x * V; at < f; at += kThreads * V) {
    const Pack<__half, V> g = load<V>(gate + at), u = load<V>(up + at);
    Pack<__half, V> out;
#pragma unroll
    for (int j = 0; j < V; ++j)
      out.at[j] = narrow<__half>(activate(activation, widen(g.at[j])) * widen(u.at[j]) * down);
    store<V>(hidden + at, out);
  }
}

template <int V>
__global__ void __launch_bounds__(kThreads)
    unscale_kernel(__half* y, const float* scale, const __half* residual, int64_t size, int64_t m, int64_t stride) {
  const int64_t step = (int64_t)gridDim.x * kThreads * V;
  for (int64_t at = ((int64_t)blockIdx.x * kThreads + threadIdx.x) * V; at < size; at += step) {
    const int64_t row = at / m;
    const float factor = scale[row];
    Pack<__half, V> out = load<V>(y + at), other{};
    if (residual) other = load<V>(residual + row * stride + at % m);
#pragma unroll
    for (int j = 0; j < V; ++j) out.at[j] = narrow<__half>(widen(out.at[j]) * factor + widen(other.at[j]));
    store<V>(y + at, out);
  }
}

// ---- launchers ------------------------------------------------------------------------------------------------------
unsigned pass_blocks(int64_t size, int vector) { return capped(up(size, kThreads * vector)); }

template <class T, int V> void launch_pass(const Pass<T>& a, addr stream) {
  auto kernel = a.grad_hidden ? pass_kernel<T, V, true> : pass_kernel<T, V, false>;
  PYFUSED_LAUNCH(kernel, pass_blocks(a.size, V), kThreads, 0, stream, a);
}

}  // namespace

void gated_ffn_forward(addr x, addr w_gate, addr w_up, addr w_out, addr residual, addr hidden, addr gate, addr up,
                       addr y, int64_t rows, int64_t n, int64_t f, int64_t m, int64_t x_stride, int64_t w_gate_stride,
                       int64_t w_up_stride, int64_t w_out_stride, int64_t residual_stride, int activation, int dtype,
                       int device, addr stream) {
  const Launch launch{"gated_ffn forward", rows, f, device};
  const OnDevice guard(launch);
  PYFUSED_BY_DTYPE(dtype, {
    FewRows<T, T, typename Hidden<T>::type> a{};
    a.x = (const T*)x, a.weight = (const T*)w_gate, a.up = (const T*)w_up;
    a.y = (typename Hidden<T>::type*)hidden, a.pre = (T*)gate, a.pre_up = (T*)up;
    a.rows = (int)rows, a.n = (int)f, a.k = (int)n, a.activation = activation;
    a.x_stride = x_stride, a.weight_stride = w_gate_stride, a.up_stride = w_up_stride;
    few_rows<true>(a, stream);
  })
  launch.check();
  linear_forward(hidden, w_out, 0, residual, y, 0, rows, m, f, f, w_out_stride, false, residual_stride, 0, dtype == 1,
                 dtype, device, stream);
}

void gated_ffn_activation(addr gate, addr up, addr grad_hidden, addr hidden, addr grad_gate, addr grad_up, int64_t size,
                          int activation, int dtype, int device, addr stream) {
  if (size == 0) return;
  const Launch launch{"gated_ffn activation", 1, size, device};
  const OnDevice guard(launch);
  PYFUSED_BY_DTYPE(dtype, {
    constexpr int V = 16 / sizeof(T);
    const Pass<T> a{(const T*)gate, (const T*)up, (const T*)grad_hidden, (typename Hidden<T>::type*)hidden,
                    (T*)grad_gate, (T*)grad_up, size, activation};
    const bool wide = aligned16({gate, up, grad_hidden, hidden, grad_gate, grad_up}) && size % V == 0;
    if (wide) launch_pass<T, V>(a, stream);
    else launch_pass<T, 1>(a, stream);
  })
  launch.check();
}

void gated_ffn_scaled(addr gate, addr up, addr hidden, addr scale, int64_t rows, int64_t f, int activation, int device,
                      addr stream) {
  if (rows == 0) return;
  const Launch launch{"gated_ffn scaled", rows, f, device};
  const OnDevice guard(launch);
  auto kernel = aligned16({gate, up, hidden}) && f % 8 == 0 ? scaled_kernel<8> : scaled_kernel<1>;
  PYFUSED_LAUNCH(kernel, launch.blocks(rows), kThreads, 0, stream, (const __half*)gate, (const __half*)up, (__half*)hidden,
                 (float*)scale, f, activation);
  launch.check();
}

void gated_ffn_unscale(addr y, addr scale, addr residual, int64_t rows, int64_t m, int64_t residual_stride, int device,
                       addr stream) {
  if (rows * m == 0) return;
  const Launch launch{"gated_ffn unscale", rows, m, device};
  const OnDevice guard(launch);
  const bool wide = aligned16({y, residual}) && m % 8 == 0 && residual_stride % 8 == 0;
  auto kernel = wide ? unscale_kernel<8> : unscale_kernel<1>;
  PYFUSED_LAUNCH(kernel, pass_blocks(rows * m, wide ? 8 : 1), kThreads, 0, stream, (__half*)y, (const float*)scale,
                 (const __half*)residual, rows * m, m, residual_stride);
  launch.check();
}

}  // namespace pyfused::cuda
