// What do layer_norm and rms_norm share on CUDA? The kernels and their launchers. CENTRED means layer_norm, with a mean.
//
// total = x + residual; y = (total - mean) * rstd * weight + bias. Statistics are float32. rms_norm has neither mean nor
// bias and needs one sum over the row; layer_norm needs three.
//
// Reads x (and residual) once, writes y (and total) once. An H200's measurements: docs/performance/index.md. Predicted at
// 3.0 TB/s, 16 x 1024 rows, bf16:
// N = 768 alone 17 us, with residual 34; N = 1024 22 and 45. Backward, 4096 x 1024: 8.4 us, 1 for the sums.
//
// Tiling: up to N = 1024 a warp owns a row, and a block has four, so short rows fill the chip and need no barrier. A lane
// holds 8, 16 or 32 elements in registers. Up to N = 8192 a block owns a row, 16 elements a thread. Longer rows are walked
// by a block and read again from the L2. The variance takes two passes and is corrected by the mean of the deviations.
// Every access has 16 bytes if all addresses and strides allow it. Otherwise the kernels move one element at a time, and
// rows are read again from the L2 from N = 257 on, because the addresses alone would fill the registers.
#pragma once

#include "kernels.h"
#include "pyfused/device.cuh"
#include "pyfused/launch.h"

namespace pyfused::cuda {
namespace {

constexpr int kRowsPerBlock = 4;       // rows of a block whose warps own a row each, forward
constexpr int kWarpRow = 1024;         // the longest row that a warp owns
constexpr int kBlockRow = 8192;        // the longest row that a block keeps in registers, 16 elements a thread

template <class T> struct Tensors {  // only CENTRED rows have bias and mean
  const T *x, *residual, *weight, *bias;
  T *y, *total;
  float *mean, *rstd;
  int64_t rows, n, x_stride, residual_stride;
  float eps;
};

// ---- kernels --------------------------------------------------------------------------------------------------------
// The sum over the threads that own a row: a warp, or a block with its scratch.
template <bool WARP> __device__ float row_sum(float v, float* f) { return WARP ? warp_sum(v) : block_sum(v, f); }

// in += other, rounded and stored in `total`.
template <class T, int V>
__device__ void add(const Tensors<T>& a, int64_t row, int64_t at, const Pack<T, V>& other, Pack<T, V>& in) {
#pragma unroll
  for (int j = 0; j < V; ++j) in.at[j] = narrow<T>(widen(in.at[j]) + widen(other.at[j]));
  store<V>(a.total + row * a.n + at, in);
}

// y = deviation * rstd * weight + bias
template <bool CENTRED, class T, int V>
__device__ void write(const Tensors<T>& a, int64_t row, int64_t at, const float (&deviation)[V], float rstd) {
  const Pack<T, V> weight = load<V>(a.weight + at);
  const bool biased = CENTRED && a.bias;
  Pack<T, V> bias{}, out;
  if (biased) bias = load<V>(a.bias + at);
#pragma unroll
  for (int j = 0; j < V; ++j)
    out.at[j] = narrow<T>(deviation[j] * rstd * widen(weight.at[j]) + (biased ? widen(bias.at[j]) : 0.0f));
  store<V>(a.y + row * a.n + at, out);
}

// A row in registers: ITEMS vectors of V elements a thread, `step` threads a row.
template <class T, int V, int ITEMS, bool WARP, bool CENTRED>
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
        sum += CENTRED ? t[i][j] : t[i][j] * t[i][j];
      }
    float rough = 0, shift = 0, variance;
    if constexpr (CENTRED) {
      rough = row_sum<WARP>(sum, scratch) / n;
      float drift = 0, square = 0;
#pragma unroll
      for (int i = 0; i < ITEMS; ++i)
#pragma unroll
        for (int j = 0; j < V; ++j) {
          t[i][j] = first + i * step < n ? t[i][j] - rough : 0.0f;
          drift += t[i][j];
          square += t[i][j] * t[i][j];
        }
      shift = row_sum<WARP>(drift, scratch) / n;
      variance = fmaxf(row_sum<WARP>(square, scratch) / n - shift * shift, 0.0f);
    } else {
      variance = row_sum<WARP>(sum, scratch) / n;
    }
    const float rstd = 1.0f / sqrtf(variance + a.eps);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
#pragma unroll
      for (int j = 0; j < V; ++j) t[i][j] = CENTRED ? t[i][j] - shift : widen(in[i].at[j]);
      if (first + i * step < n) write<CENTRED>(a, row, first + i * step, t[i], rstd);
    }
    if constexpr (CENTRED) {
      if (first == 0 && a.mean) a.mean[row] = rough + shift, a.rstd[row] = rstd;
    } else {
      if (first == 0 && a.rstd) a.rstd[row] = rstd;
    }
  }
}

// A row too long for registers: the second and third pass read `total` or x from the L2.
template <class T, int V, bool CENTRED> __global__ void __launch_bounds__(1024) forward_long_kernel(Tensors<T> a) {
  __shared__ float scratch[kWarp];
  const int64_t step = (int64_t)blockDim.x * V, first = (int64_t)threadIdx.x * V;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T* x = a.x + row * a.x_stride;
    float sum = 0;
    for (int64_t at = first; at < a.n; at += step) {
      Pack<T, V> in = load<V>(x + at);
      if (a.residual) add(a, row, at, load<V>(a.residual + row * a.residual_stride + at), in);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float t = widen(in.at[j]);
        sum += CENTRED ? t : t * t;
      }
    }
    if (a.residual) x = a.total + row * a.n;  // a thread reads back only what it wrote itself
    float rough = block_sum(sum, scratch) / a.n, shift = 0, variance = rough;
    if constexpr (CENTRED) {
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
      shift = block_sum(drift, scratch) / a.n;
      variance = fmaxf(block_sum(square, scratch) / a.n - shift * shift, 0.0f);
    }
    const float rstd = 1.0f / sqrtf(variance + a.eps);
    for (int64_t at = first; at < a.n; at += step) {
      const Pack<T, V> in = load<V>(x + at);
      float deviation[V];
#pragma unroll
      for (int j = 0; j < V; ++j) deviation[j] = CENTRED ? widen(in.at[j]) - rough - shift : widen(in.at[j]);
      write<CENTRED>(a, row, at, deviation, rstd);
    }
    if (first == 0 && a.rstd) {
      if (CENTRED) a.mean[row] = rough + shift;
      a.rstd[row] = rstd;
    }
  }
}

// ---- launchers ------------------------------------------------------------------------------------------------------
template <bool CENTRED, class T, int V, int ITEMS> void forward_by_warp(const Tensors<T>& a, addr stream) {
  auto kernel = forward_kernel<T, V, ITEMS, true, CENTRED>;
  PYFUSED_LAUNCH(kernel, capped(up(a.rows, kRowsPerBlock)), kRowsPerBlock * kWarp, 0, stream, a);
}

template <bool CENTRED, class T, int V> void forward(const Tensors<T>& a, addr stream) {
  if (a.n <= 256) return forward_by_warp<CENTRED, T, V, 8 / V>(a, stream);
  if constexpr (V > 1) {
    if (a.n <= 512) return forward_by_warp<CENTRED, T, V, 16 / V>(a, stream);
    if (a.n <= kWarpRow) return forward_by_warp<CENTRED, T, V, 32 / V>(a, stream);
    if (a.n <= kBlockRow) {
      auto kernel = forward_kernel<T, V, 16 / V, false, CENTRED>;
      PYFUSED_LAUNCH(kernel, capped(a.rows), row_threads(a.n, 16), 0, stream, a);
      return;
    }
  }
  auto kernel = forward_long_kernel<T, V, CENTRED>;
  PYFUSED_LAUNCH(kernel, capped(a.rows), row_threads(a.n, 4), 0, stream, a);
}

// Pointers, strides and dtype as in kernels.h; bias and mean are 0 unless CENTRED.
template <bool CENTRED>
void normalise_rows(const Launch& launch, addr x, addr residual, addr weight, addr bias, addr y, addr total, addr mean,
                    addr rstd, int64_t x_stride, int64_t residual_stride, double eps, int dtype, addr stream) {
  const int64_t rows = launch.rows, n = launch.n;
  if (rows * n == 0) return;
  const OnDevice guard(launch);
  PYFUSED_BY_DTYPE(dtype, {
    const Tensors<T> a{(const T*)x, (const T*)residual, (const T*)weight, (const T*)bias, (T*)y, (T*)total,
                       (float*)mean, (float*)rstd, rows, n, x_stride, residual_stride, (float)eps};
    constexpr int V = 16 / sizeof(T);
    if (aligned16({x, residual, weight, bias, y, total}) && n % V == 0 && x_stride % V == 0 && residual_stride % V == 0)
      forward<CENTRED, T, V>(a, stream);
    else forward<CENTRED, T, 1>(a, stream);
  })
  launch.check();
}

}  // namespace
}  // namespace pyfused::cuda
