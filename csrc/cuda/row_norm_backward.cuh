// What do the gradients of layer_norm and rms_norm share on CUDA? Kernels and launchers. CENTRED means layer_norm.
//
// grad_x = rstd * (g - mean(g) - xhat * mean(g * xhat)) + grad_total, g = grad_y * weight, mean(g) only if CENTRED.
// Weight gradients take two stages without atomics, so they are bitwise repeatable. Each block sums a share of the rows
// (in registers up to N = 8192, by columns beyond); then the shares are added in order.
#pragma once

#include "row_norm.cuh"

namespace pyfused::cuda {
namespace {

constexpr int kBackwardRows = 8;       // rows of a block whose warps own a row each; it also adds its warps' sums
constexpr int kColumns = 128;          // threads of a block that sums columns
constexpr int kSums = 8;               // threads that share a column of partial sums
template <bool CENTRED> constexpr int kGradients = CENTRED ? 2 : 1;  // weight, and bias if CENTRED

template <class T> struct Gradients {
  const T *grad_y, *grad_total, *x, *weight;
  const float *mean, *rstd;
  T* grad_x;
  float* partial;
  int64_t rows, n, x_stride, share;  // share: rows of a part
};

// ---- kernels --------------------------------------------------------------------------------------------------------
template <bool CENTRED> __device__ float normalised(float x, float mean, float rstd) {
  return (CENTRED ? x - mean : x) * rstd;
}

// g is rounded before it is used. Otherwise g - mean(g) would not be exactly zero at N = 1.
template <bool CENTRED, class T, int V>
__device__ void write_gradient(const Gradients<T>& a, int64_t row, int64_t at, const Pack<T, V>& dy,
                               const Pack<T, V>& x, float mean, float rstd, float mean_g, float mean_gx) {
  const Pack<T, V> weight = load<V>(a.weight + at);
  Pack<T, V> extra{}, out;
  if (a.grad_total) extra = load<V>(a.grad_total + row * a.n + at);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float xhat = normalised<CENTRED>(widen(x.at[j]), mean, rstd);
    const float g = __fmul_rn(widen(dy.at[j]), widen(weight.at[j])), centred = CENTRED ? g - mean_g : g;
    out.at[j] = narrow<T>((centred - xhat * mean_gx) * rstd + (a.grad_total ? widen(extra.at[j]) : 0.0f));
  }
  store<V>(a.grad_x + row * a.n + at, out);
}

// A block takes a share of the rows and keeps the sums of its weight gradients in registers. g and xhat are computed
// twice from the loaded values: keeping them would halve the number of warps that fit.
template <class T, int V, int ITEMS, bool WARP, bool CENTRED>
__global__ void __launch_bounds__(WARP ? kBackwardRows * kWarp : 512) backward_kernel(Gradients<T> a) {
  __shared__ float scratch[kWarp];
  __shared__ float sums[WARP ? kBackwardRows : 1][WARP ? ITEMS * V * kWarp : 1];
  const int step = (WARP ? kWarp : blockDim.x) * V;
  const int first = (WARP ? threadIdx.x % kWarp : threadIdx.x) * V;
  const int together = WARP ? kBackwardRows : 1, own = WARP ? threadIdx.x / kWarp : 0;
  const int n = (int)a.n;
  float grad_weight[ITEMS][V] = {}, grad_bias[CENTRED ? ITEMS : 1][V] = {};
  const int64_t begin = blockIdx.x * a.share, end = begin + a.share < a.rows ? begin + a.share : a.rows;
  for (int64_t row = begin + own; row < end; row += together) {
    const float mean = CENTRED ? a.mean[row] : 0.0f, rstd = a.rstd[row];
    float sum_g = 0, sum_gx = 0;
    Pack<T, V> dy[ITEMS], x[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
      if (const int at = first + i * step; at < n) {
        dy[i] = load<V>(a.grad_y + row * a.n + at);
        x[i] = load<V>(a.x + row * a.x_stride + at);
      }
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
      if (const int at = first + i * step; at < n) {
        const Pack<T, V> weight = load<V>(a.weight + at);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const float d = widen(dy[i].at[j]), xhat = normalised<CENTRED>(widen(x[i].at[j]), mean, rstd);
          const float g = __fmul_rn(d, widen(weight.at[j]));
          sum_gx += g * xhat;
          grad_weight[i][j] += d * xhat;
          if constexpr (CENTRED) {
            sum_g += g;
            grad_bias[i][j] += d;
          }
        }
      }
    const float mean_g = CENTRED ? row_sum<WARP>(sum_g, scratch) / n : 0.0f;
    const float mean_gx = row_sum<WARP>(sum_gx, scratch) / n;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
      if (const int at = first + i * step; at < n)
        write_gradient<CENTRED>(a, row, at, dy[i], x[i], mean, rstd, mean_g, mean_gx);
  }
  float* partial = a.partial + blockIdx.x * kGradients<CENTRED> * a.n;
#pragma unroll
  for (int which = 0; which < kGradients<CENTRED>; ++which, partial += a.n) {
    float(*grad)[V] = which ? grad_bias : grad_weight;
    if (WARP) __syncthreads();
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int at = first + i * step + j;
        if constexpr (WARP) sums[own][at] = grad[i][j];
        else if (at < n) partial[at] = grad[i][j];
      }
    if constexpr (WARP) {  // the warps of a block hold the same columns: add them in order
      __syncthreads();
      for (int at = threadIdx.x; at < n; at += blockDim.x) {
        float total = 0;
        for (int warp = 0; warp < kBackwardRows; ++warp) total += sums[warp][at];
        partial[at] = total;
      }
    }
  }
}

// grad_x of a row too long for registers.
template <class T, int V, bool CENTRED> __global__ void __launch_bounds__(1024) backward_long_kernel(Gradients<T> a) {
  __shared__ float scratch[kWarp];
  const int64_t step = (int64_t)blockDim.x * V, first = (int64_t)threadIdx.x * V;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T *grad_y = a.grad_y + row * a.n, *x = a.x + row * a.x_stride;
    const float mean = CENTRED ? a.mean[row] : 0.0f, rstd = a.rstd[row];
    float sum_g = 0, sum_gx = 0;
    for (int64_t at = first; at < a.n; at += step) {
      const Pack<T, V> dy = load<V>(grad_y + at), in = load<V>(x + at), weight = load<V>(a.weight + at);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float g = __fmul_rn(widen(dy.at[j]), widen(weight.at[j]));
        if constexpr (CENTRED) sum_g += g;
        sum_gx += g * normalised<CENTRED>(widen(in.at[j]), mean, rstd);
      }
    }
    const float mean_g = CENTRED ? block_sum(sum_g, scratch) / a.n : 0.0f, mean_gx = block_sum(sum_gx, scratch) / a.n;
    for (int64_t at = first; at < a.n; at += step)
      write_gradient<CENTRED>(a, row, at, load<V>(grad_y + at), load<V>(x + at), mean, rstd, mean_g, mean_gx);
  }
}

// The first stage for long rows. A block sums a share of the rows (blockIdx.y) in kColumns vectors of columns.
template <class T, int V, bool CENTRED> __global__ void __launch_bounds__(kColumns) column_sums_kernel(Gradients<T> a) {
  const int64_t at = ((int64_t)blockIdx.x * kColumns + threadIdx.x) * V;
  if (at >= a.n) return;
  float grad_weight[V] = {}, grad_bias[V] = {};
  const int64_t begin = blockIdx.y * a.share, end = begin + a.share < a.rows ? begin + a.share : a.rows;
  for (int64_t row = begin; row < end; ++row) {
    const Pack<T, V> dy = load<V>(a.grad_y + row * a.n + at), x = load<V>(a.x + row * a.x_stride + at);
    const float mean = CENTRED ? a.mean[row] : 0.0f, rstd = a.rstd[row];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      grad_weight[j] += widen(dy.at[j]) * normalised<CENTRED>(widen(x.at[j]), mean, rstd);
      if constexpr (CENTRED) grad_bias[j] += widen(dy.at[j]);
    }
  }
  float* partial = a.partial + blockIdx.y * kGradients<CENTRED> * a.n + at;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    partial[j] = grad_weight[j];
    if constexpr (CENTRED) partial[a.n + j] = grad_bias[j];
  }
}

// The second stage. kSums threads share a column. Each adds every kSums-th part; then their sums are added in order.
template <class T, bool CENTRED>
__global__ void __launch_bounds__(kWarp* kSums)
    reduce_kernel(const float* partial, T* grad_weight, T* grad_bias, int64_t parts, int64_t n) {
  __shared__ float sums[kSums][kWarp];
  const int lane = threadIdx.x % kWarp, own = threadIdx.x / kWarp;
  const int64_t at = (int64_t)blockIdx.x * kWarp + lane;
  for (int which = 0; which < (grad_bias ? 2 : 1); ++which) {
    float total = 0;
    if (at < n)
      for (int64_t part = own; part < parts; part += kSums)
        total += partial[(kGradients<CENTRED> * part + which) * n + at];
    sums[own][lane] = total;
    __syncthreads();
    if (own == 0 && at < n) {
      for (int i = 1; i < kSums; ++i) total += sums[i][lane];
      (which ? grad_bias : grad_weight)[at] = narrow<T>(total);
    }
    __syncthreads();
  }
}

// ---- launchers ------------------------------------------------------------------------------------------------------
template <bool CENTRED, class T, int V, int ITEMS>
void backward_by_warp(const Gradients<T>& a, int64_t parts, addr stream) {
  auto kernel = backward_kernel<T, V, ITEMS, true, CENTRED>;
  PYFUSED_LAUNCH(kernel, (unsigned)parts, kBackwardRows * kWarp, 0, stream, a);
}

template <bool CENTRED, class T, int V> void backward(const Gradients<T>& a, int64_t parts, addr stream) {
  if (a.n <= 256) return backward_by_warp<CENTRED, T, V, 8 / V>(a, parts, stream);
  if constexpr (V > 1) {
    if (a.n <= kWarpRow) return backward_by_warp<CENTRED, T, V, 32 / V>(a, parts, stream);
    if (a.n <= kBlockRow) {
      auto kernel = backward_kernel<T, V, 16 / V, false, CENTRED>;
      PYFUSED_LAUNCH(kernel, (unsigned)parts, row_threads(a.n, 16), 0, stream, a);
      return;
    }
  }
  auto rows = backward_long_kernel<T, V, CENTRED>;
  PYFUSED_LAUNCH(rows, capped(a.rows), row_threads(a.n, 4), 0, stream, a);
  auto columns = column_sums_kernel<T, V, CENTRED>;
  const dim3 tiles((unsigned)up(a.n, kColumns * V), (unsigned)parts);
  PYFUSED_LAUNCH(columns, tiles, kColumns, 0, stream, a);
}

// Two blocks per multiprocessor. Up to N = 1024 a share has a row for every warp of its block.
inline int64_t backward_parts(int64_t rows, int64_t n, int multiprocessors) {
  const int64_t most = n <= kWarpRow ? up(rows, kBackwardRows) : rows, wanted = 2 * (int64_t)multiprocessors;
  const int64_t parts = most < wanted ? most : wanted;
  return parts ? up(rows, up(rows, parts)) : 0;  // no part without rows
}

// `partial` holds (parts, kGradients, n) floats; mean and grad_bias are 0 unless CENTRED.
template <bool CENTRED>
void normalise_rows_backward(const Launch& launch, addr grad_y, addr grad_total, addr x, addr weight, addr mean,
                             addr rstd, addr grad_x, addr grad_weight, addr grad_bias, addr partial, int64_t parts,
                             int64_t x_stride, int dtype, addr stream) {
  const int64_t rows = launch.rows, n = launch.n;
  if (n == 0 || (rows != 0 && parts == 0)) return;
  const OnDevice guard(launch);
  PYFUSED_BY_DTYPE(dtype, {
    if (rows) {
      const Gradients<T> a{(const T*)grad_y, (const T*)grad_total, (const T*)x, (const T*)weight, (const float*)mean,
                           (const float*)rstd, (T*)grad_x, (float*)partial, rows, n, x_stride, up(rows, parts)};
      constexpr int V = 16 / sizeof(T);
      if (aligned16({grad_y, grad_total, x, weight, grad_x}) && n % V == 0 && x_stride % V == 0)
        backward<CENTRED, T, V>(a, parts, stream);
      else backward<CENTRED, T, 1>(a, parts, stream);
      launch.check();
    }
    auto kernel = reduce_kernel<T, CENTRED>;
    PYFUSED_LAUNCH(kernel, (unsigned)up(n, kWarp), kWarp * kSums, 0, stream, (const float*)partial, (T*)grad_weight,
                   (T*)grad_bias, parts, n);
  })
  launch.check();
}

}  // namespace
}  // namespace pyfused::cuda
