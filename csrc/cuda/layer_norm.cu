// layer_norm on CUDA: total = x + residual; y = (total - mean) * rstd * weight + bias, statistics in float32.
//
// Moves: x (and residual) read once, y (and total) written once. Predicted at 3.0 TB/s, 16 x 1024 rows, bf16, not yet
// measured: N = 768 alone 17 us, with residual 34; N = 1024 22 and 45. Backward, 4096 x 1024: 8.4 us, 1 for the sums.
//
// Tiling: up to N = 1024 a warp owns a row, four rows a block, so that short rows fill the chip and no barrier is met;
// a lane holds 8, 16 or 32 elements in registers. Up to 8192 a block owns a row, 16 elements a thread. Beyond, a block
// walks the row and reads it again from the L2. The variance is the two-pass one, corrected by the mean of the
// deviations. Every access has 16 bytes where all addresses and strides allow it; else the kernels move one element at
// a time, and a row walks through the L2 from N = 257 on: the addresses alone would fill the registers.
//
// Backward: grad_x = rstd * (g - mean(g) - xhat * mean(g * xhat)) + grad_total, g = grad_y * weight. Weight gradients
// in two stages, bitwise repeatable, no atomics: a share of the rows each (in registers up to N = 8192, by columns
// beyond), then the shares in order.
#include "kernels.h"
#include "pyfused/device.cuh"
#include "pyfused/launch.h"

namespace pyfused::cuda {
namespace {

constexpr int kRowsPerBlock = 4;       // of rows that a warp owns, forward
constexpr int kBackwardRows = 8;       // and backward, where a block also adds up its warps' sums
constexpr int kWarpRow = 1024;         // the longest of them
constexpr int kBlockRow = 8192;        // the longest row that a block keeps in registers, 16 elements a thread
constexpr int kColumns = 128;          // of a block that sums columns
constexpr int kSums = 8;               // threads that share a column of partial sums

template <class T> struct Tensors {
  const T *x, *residual, *weight, *bias;
  T *y, *total;
  float *mean, *rstd;
  int64_t rows, n, x_stride, residual_stride;
  float eps;
};

template <class T> struct Gradients {
  const T *grad_y, *grad_total, *x, *weight;
  const float *mean, *rstd;
  T* grad_x;
  float* partial;
  int64_t rows, n, x_stride, share;  // share: rows of a part
};

// ---- kernels --------------------------------------------------------------------------------------------------------
// The sum over the threads that own a row: a warp, or a block with its scratch.
template <bool WARP> __device__ float row_sum(float v, float* f) { return WARP ? warp_sum(v) : block_sum(v, f); }

// in += other, rounded and kept in `total`.
template <class T, int V>
__device__ void add(const Tensors<T>& a, int64_t row, int64_t at, const Pack<T, V>& other, Pack<T, V>& in) {
#pragma unroll
  for (int j = 0; j < V; ++j) in.at[j] = narrow<T>(widen(in.at[j]) + widen(other.at[j]));
  store<V>(a.total + row * a.n + at, in);
}

// y = deviation * rstd * weight + bias
template <class T, int V>
__device__ void write(const Tensors<T>& a, int64_t row, int64_t at, const float (&deviation)[V], float rstd) {
  const Pack<T, V> weight = load<V>(a.weight + at);
  Pack<T, V> bias{}, out;
  if (a.bias) bias = load<V>(a.bias + at);
#pragma unroll
  for (int j = 0; j < V; ++j)
    out.at[j] = narrow<T>(deviation[j] * rstd * widen(weight.at[j]) + (a.bias ? widen(bias.at[j]) : 0.0f));
  store<V>(a.y + row * a.n + at, out);
}

// A row in registers: ITEMS vectors of V elements a thread, `step` threads a row.
template <class T, int V, int ITEMS, bool WARP>
__global__ void __launch_bounds__(WARP ? kRowsPerBlock * kWarp : 512) forward_kernel(Tensors<T> a) {
  __shared__ float scratch[kWarp];
  const int step = (WARP ? kWarp : blockDim.x) * V;
  const int first = (WARP ? threadIdx.x % kWarp : threadIdx.x) * V;
  const int64_t together = WARP ? kRowsPerBlock : 1;
  const int n = (int)a.n;
  for (int64_t row = blockIdx.x * together + (WARP ? threadIdx.x / kWarp : 0); row < a.rows;
       row += gridDim.x * together) {
    const T* x = a.x + row * a.x_stride;
    float t[ITEMS][V], sum = 0;
    Pack<T, V> in[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)  // all loads of a row are under way before the first is used
      if (first + i * step < n) in[i] = load<V>(x + first + i * step);
    if (a.residual) {
      const T* residual = a.residual + row * a.residual_stride;
      Pack<T, V> other[ITEMS];
#pragma unroll
      for (int i = 0; i < ITEMS; ++i)
        if (first + i * step < n) other[i] = load<V>(residual + first + i * step);
#pragma unroll
      for (int i = 0; i < ITEMS; ++i)
        if (first + i * step < n) add(a, row, first + i * step, other[i], in[i]);
    }
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
#pragma unroll
      for (int j = 0; j < V; ++j) {
        t[i][j] = first + i * step < n ? widen(in[i].at[j]) : 0.0f;
        sum += t[i][j];
      }
    const float rough = row_sum<WARP>(sum, scratch) / n;
    float drift = 0, square = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
#pragma unroll
      for (int j = 0; j < V; ++j) {
        t[i][j] = first + i * step < n ? t[i][j] - rough : 0.0f;
        drift += t[i][j];
        square += t[i][j] * t[i][j];
      }
    const float shift = row_sum<WARP>(drift, scratch) / n;
    const float variance = fmaxf(row_sum<WARP>(square, scratch) / n - shift * shift, 0.0f);
    const float rstd = 1.0f / sqrtf(variance + a.eps);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
#pragma unroll
      for (int j = 0; j < V; ++j) t[i][j] -= shift;
      if (first + i * step < n) write(a, row, first + i * step, t[i], rstd);
    }
    if (first == 0 && a.mean) a.mean[row] = rough + shift, a.rstd[row] = rstd;
  }
}

// A row too long for registers: the second and third pass read `total` or x from the L2.
template <class T, int V> __global__ void __launch_bounds__(1024) forward_long_kernel(Tensors<T> a) {
  __shared__ float scratch[kWarp];
  const int64_t step = (int64_t)blockDim.x * V, first = (int64_t)threadIdx.x * V;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T* x = a.x + row * a.x_stride;
    float sum = 0;
    for (int64_t at = first; at < a.n; at += step) {
      Pack<T, V> in = load<V>(x + at);
      if (a.residual) add(a, row, at, load<V>(a.residual + row * a.residual_stride + at), in);
#pragma unroll
      for (int j = 0; j < V; ++j) sum += widen(in.at[j]);
    }
    if (a.residual) x = a.total + row * a.n;  // a thread reads back only what it wrote itself
    const float rough = block_sum(sum, scratch) / a.n;
    float drift = 0, square = 0;
    for (int64_t at = first; at < a.n; at += step) {
      const Pack<T, V> in = load<V>(x + at);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float d = widen(in.at[j]) - rough;
        drift += d;
        square += d * d;
      }
    }
    const float shift = block_sum(drift, scratch) / a.n;
    const float variance = fmaxf(block_sum(square, scratch) / a.n - shift * shift, 0.0f);
    const float rstd = 1.0f / sqrtf(variance + a.eps);
    for (int64_t at = first; at < a.n; at += step) {
      const Pack<T, V> in = load<V>(x + at);
      float deviation[V];
#pragma unroll
      for (int j = 0; j < V; ++j) deviation[j] = widen(in.at[j]) - rough - shift;
      write(a, row, at, deviation, rstd);
    }
    if (first == 0 && a.mean) a.mean[row] = rough + shift, a.rstd[row] = rstd;
  }
}

// g is rounded before it is used: else, at N = 1, g - mean(g) would not be exactly zero.
template <class T, int V>
__device__ void write_gradient(const Gradients<T>& a, int64_t row, int64_t at, const Pack<T, V>& dy,
                               const Pack<T, V>& x, float mean, float rstd, float mean_g, float mean_gx) {
  const Pack<T, V> weight = load<V>(a.weight + at);
  Pack<T, V> extra{}, out;
  if (a.grad_total) extra = load<V>(a.grad_total + row * a.n + at);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float xhat = (widen(x.at[j]) - mean) * rstd, g = __fmul_rn(widen(dy.at[j]), widen(weight.at[j]));
    out.at[j] = narrow<T>((g - mean_g - xhat * mean_gx) * rstd + (a.grad_total ? widen(extra.at[j]) : 0.0f));
  }
  store<V>(a.grad_x + row * a.n + at, out);
}

// A block takes a share of the rows and keeps the sums of its weight gradients in registers. g and xhat are computed
// twice from what was loaded: kept, they would halve the number of warps that fit.
template <class T, int V, int ITEMS, bool WARP>
__global__ void __launch_bounds__(WARP ? kBackwardRows * kWarp : 512) backward_kernel(Gradients<T> a) {
  __shared__ float scratch[kWarp];
  __shared__ float sums[WARP ? kBackwardRows : 1][WARP ? ITEMS * V * kWarp : 1];
  const int step = (WARP ? kWarp : blockDim.x) * V;
  const int first = (WARP ? threadIdx.x % kWarp : threadIdx.x) * V;
  const int together = WARP ? kBackwardRows : 1, own = WARP ? threadIdx.x / kWarp : 0;
  const int n = (int)a.n;
  float grad_weight[ITEMS][V] = {}, grad_bias[ITEMS][V] = {};
  const int64_t begin = blockIdx.x * a.share, end = begin + a.share < a.rows ? begin + a.share : a.rows;
  for (int64_t row = begin + own; row < end; row += together) {
    const float mean = a.mean[row], rstd = a.rstd[row];
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
          const float d = widen(dy[i].at[j]), xhat = (widen(x[i].at[j]) - mean) * rstd;
          const float g = __fmul_rn(d, widen(weight.at[j]));
          sum_g += g;
          sum_gx += g * xhat;
          grad_weight[i][j] += d * xhat;
          grad_bias[i][j] += d;
        }
      }
    const float mean_g = row_sum<WARP>(sum_g, scratch) / n, mean_gx = row_sum<WARP>(sum_gx, scratch) / n;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
      if (const int at = first + i * step; at < n)
        write_gradient(a, row, at, dy[i], x[i], mean, rstd, mean_g, mean_gx);
  }
  float* partial = a.partial + blockIdx.x * 2 * a.n;
#pragma unroll
  for (int which = 0; which < 2; ++which, partial += a.n) {
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
template <class T, int V> __global__ void __launch_bounds__(1024) backward_long_kernel(Gradients<T> a) {
  __shared__ float scratch[kWarp];
  const int64_t step = (int64_t)blockDim.x * V, first = (int64_t)threadIdx.x * V;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T *grad_y = a.grad_y + row * a.n, *x = a.x + row * a.x_stride;
    const float mean = a.mean[row], rstd = a.rstd[row];
    float sum_g = 0, sum_gx = 0;
    for (int64_t at = first; at < a.n; at += step) {
      const Pack<T, V> dy = load<V>(grad_y + at), in = load<V>(x + at), weight = load<V>(a.weight + at);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float g = __fmul_rn(widen(dy.at[j]), widen(weight.at[j]));
        sum_g += g;
        sum_gx += g * ((widen(in.at[j]) - mean) * rstd);
      }
    }
    const float mean_g = block_sum(sum_g, scratch) / a.n, mean_gx = block_sum(sum_gx, scratch) / a.n;
    for (int64_t at = first; at < a.n; at += step)
      write_gradient(a, row, at, load<V>(grad_y + at), load<V>(x + at), mean, rstd, mean_g, mean_gx);
  }
}

// The first stage for long rows: a share of the rows (blockIdx.y) by kColumns vectors of columns.
template <class T, int V> __global__ void __launch_bounds__(kColumns) column_sums_kernel(Gradients<T> a) {
  const int64_t at = ((int64_t)blockIdx.x * kColumns + threadIdx.x) * V;
  if (at >= a.n) return;
  float grad_weight[V] = {}, grad_bias[V] = {};
  const int64_t begin = blockIdx.y * a.share, end = begin + a.share < a.rows ? begin + a.share : a.rows;
  for (int64_t row = begin; row < end; ++row) {
    const Pack<T, V> dy = load<V>(a.grad_y + row * a.n + at), x = load<V>(a.x + row * a.x_stride + at);
    const float mean = a.mean[row], rstd = a.rstd[row];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      grad_weight[j] += widen(dy.at[j]) * ((widen(x.at[j]) - mean) * rstd);
      grad_bias[j] += widen(dy.at[j]);
    }
  }
  float* partial = a.partial + blockIdx.y * 2 * a.n + at;
#pragma unroll
  for (int j = 0; j < V; ++j) partial[j] = grad_weight[j], partial[a.n + j] = grad_bias[j];
}

// The second stage: kSums threads share a column, each adds every kSums-th part; then those sums in order.
template <class T>
__global__ void __launch_bounds__(kWarp* kSums)
    reduce_kernel(const float* partial, T* grad_weight, T* grad_bias, int64_t parts, int64_t n) {
  __shared__ float sums[kSums][kWarp];
  const int lane = threadIdx.x % kWarp, own = threadIdx.x / kWarp;
  const int64_t at = (int64_t)blockIdx.x * kWarp + lane;
  for (int which = 0; which < (grad_bias ? 2 : 1); ++which) {
    float total = 0;
    if (at < n)
      for (int64_t part = own; part < parts; part += kSums) total += partial[(2 * part + which) * n + at];
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
template <class T, int V, int ITEMS> void forward_by_warp(const Tensors<T>& a, addr stream) {
  auto kernel = forward_kernel<T, V, ITEMS, true>;
  PYFUSED_LAUNCH(kernel, capped(up(a.rows, kRowsPerBlock)), kRowsPerBlock * kWarp, 0, stream, a);
}

template <class T, int V> void forward(const Tensors<T>& a, addr stream) {
  if (a.n <= 256) return forward_by_warp<T, V, 8 / V>(a, stream);
  if constexpr (V > 1) {
    if (a.n <= 512) return forward_by_warp<T, V, 16 / V>(a, stream);
    if (a.n <= kWarpRow) return forward_by_warp<T, V, 32 / V>(a, stream);
    if (a.n <= kBlockRow) {
      auto kernel = forward_kernel<T, V, 16 / V, false>;
      PYFUSED_LAUNCH(kernel, capped(a.rows), row_threads(a.n, 16), 0, stream, a);
      return;
    }
  }
  auto kernel = forward_long_kernel<T, V>;
  PYFUSED_LAUNCH(kernel, capped(a.rows), row_threads(a.n, 4), 0, stream, a);
}

template <class T, int V, int ITEMS> void backward_by_warp(const Gradients<T>& a, int64_t parts, addr stream) {
  auto kernel = backward_kernel<T, V, ITEMS, true>;
  PYFUSED_LAUNCH(kernel, (unsigned)parts, kBackwardRows * kWarp, 0, stream, a);
}

template <class T, int V> void backward(const Gradients<T>& a, int64_t parts, addr stream) {
  if (a.n <= 256) return backward_by_warp<T, V, 8 / V>(a, parts, stream);
  if constexpr (V > 1) {
    if (a.n <= kWarpRow) return backward_by_warp<T, V, 32 / V>(a, parts, stream);
    if (a.n <= kBlockRow) {
      auto kernel = backward_kernel<T, V, 16 / V, false>;
      PYFUSED_LAUNCH(kernel, (unsigned)parts, row_threads(a.n, 16), 0, stream, a);
      return;
    }
  }
  auto rows = backward_long_kernel<T, V>;
  PYFUSED_LAUNCH(rows, capped(a.rows), row_threads(a.n, 4), 0, stream, a);
  auto columns = column_sums_kernel<T, V>;
  const dim3 tiles((unsigned)up(a.n, kColumns * V), (unsigned)parts);
  PYFUSED_LAUNCH(columns, tiles, kColumns, 0, stream, a);
}

}  // namespace

void layer_norm_forward(addr x, addr residual, addr weight, addr bias, addr y, addr total, addr mean, addr rstd,
                        int64_t rows, int64_t n, int64_t x_stride, int64_t residual_stride, double eps, int dtype,
                        int device, addr stream) {
  if (rows == 0) return;
  const Launch launch{"layer_norm forward", rows, n, device};
  const OnDevice guard(launch);
  PYFUSED_BY_DTYPE(dtype, {
    const Tensors<T> a{(const T*)x, (const T*)residual, (const T*)weight, (const T*)bias, (T*)y, (T*)total,
                       (float*)mean, (float*)rstd, rows, n, x_stride, residual_stride, (float)eps};
    constexpr int V = 16 / sizeof(T);
    if (aligned16({x, residual, weight, bias, y, total}) && n % V == 0 && x_stride % V == 0 && residual_stride % V == 0)
      forward<T, V>(a, stream);
    else forward<T, 1>(a, stream);
  })
  launch.check();
}

// Two blocks on each multiprocessor; up to N = 1024 a share has a row for every warp of its block.
int64_t layer_norm_backward_parts(int64_t rows, int64_t n, int multiprocessors) {
  const int64_t most = n <= kWarpRow ? up(rows, kBackwardRows) : rows, wanted = 2 * (int64_t)multiprocessors;
  const int64_t parts = most < wanted ? most : wanted;
  return parts ? up(rows, up(rows, parts)) : 0;  // no part without rows
}

void layer_norm_backward(addr grad_y, addr grad_total, addr x, addr weight, addr mean, addr rstd, addr grad_x,
                         addr grad_weight, addr grad_bias, addr partial, int64_t parts, int64_t rows, int64_t n,
                         int64_t x_stride, int dtype, int device, addr stream) {
  const Launch launch{"layer_norm backward", rows, n, device};
  const OnDevice guard(launch);
  PYFUSED_BY_DTYPE(dtype, {
    if (rows) {
      const Gradients<T> a{(const T*)grad_y, (const T*)grad_total, (const T*)x, (const T*)weight, (const float*)mean,
                           (const float*)rstd, (T*)grad_x, (float*)partial, rows, n, x_stride, up(rows, parts)};
      constexpr int V = 16 / sizeof(T);
      if (aligned16({grad_y, grad_total, x, weight, grad_x}) && n % V == 0 && x_stride % V == 0)
        backward<T, V>(a, parts, stream);
      else backward<T, 1>(a, parts, stream);
      launch.check();
    }
    auto kernel = reduce_kernel<T>;
    PYFUSED_LAUNCH(kernel, (unsigned)up(n, kWarp), kWarp * kSums, 0, stream, (const float*)partial, (T*)grad_weight,
                   (T*)grad_bias, parts, n);
  })
  launch.check();
}

}  // namespace pyfused::cuda
