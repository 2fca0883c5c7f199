// fourier_mix on CUDA: y[s][n] = sum over a, b of x[a][b] cos(2 pi (s a / S + n b / N)), in two kernels.
//
// The maths is explained in csrc/cpu/fourier_mix.cpp. The first kernel transforms rows 0 .. S / 2 of the even part of x, two of
// them as one complex signal, and writes w, real, (S, N / 2 + 1). The second does a Hartley transform along the columns of w,
// two of them as one complex signal, and stores each number at [s][k] and [-s][N - k].
//
// Reads x once, writes and reads w once (half as many elements, in float32) and writes y once: (64, 512, 768) in bfloat16 50 +
// 50 + 50 + 50 MB. A sample takes 5 n log2 n FLOPs for each of S / 4 signals of n = N and N / 4 of n = S, 9 MFLOP at 512 x 768.
// Shared memory and latency are the bound, so a block holds little: one pair of rows, or up to 8 pairs of columns. w is stored
// by blocks of columns, (B, blocks, S, 2 C), so a block of the second kernel reads one contiguous piece.
#include <pyfused/launch.h>

#include "fft.cuh"
#include "kernels.h"

namespace pyfused::cuda {
namespace {

constexpr int kLongest = 9216;                // its two padded work arrays take 153 KiB; an A100's block may have 163
constexpr int kWantedShared = 72 * 1024;      // three blocks fit on a multiprocessor
constexpr int kMaxThreads = 256, kMaxPairs = 8;

int shared_bytes(const Plan& plan, int signals) { return 2 * (padded(plan.length() * signals) + 1) * (int)sizeof(float2); }

template <class T> struct Mix {
  const T* x;
  T* y;
  float* w;
  Plan along_s, along_n;
  int64_t batch, batch_stride, row_stride;
  int S, N, pairs_of_columns;  // C

  __host__ __device__ int rows() const { return S / 2 + 1; }
  __host__ __device__ int pairs() const { return (rows() + 1) / 2; }  // rows p and p + pairs()
  __host__ __device__ int columns() const { return N / 2 + 1; }
  __host__ __device__ int blocks() const { return (columns() + 2 * pairs_of_columns - 1) / (2 * pairs_of_columns); }
};

// A block transforms one pair of rows at a time.
template <class T> __global__ void __launch_bounds__(kMaxThreads, 3) features_kernel(const Mix<T> mix) {
  PYFUSED_SHARED_BYTES(bytes);
  float2* work0 = reinterpret_cast<float2*>(bytes);
  float2* work1 = work0 + padded(mix.along_n.length()) + 1;
  const int S = mix.S, N = mix.N, width = 2 * mix.pairs_of_columns, stored = mix.blocks() * width;
  for (int64_t item = blockIdx.x; item < mix.batch * mix.pairs(); item += gridDim.x) {
    const int64_t b = item / mix.pairs();
    const int a0 = (int)(item % mix.pairs()), second = a0 + mix.pairs();
    const bool paired = second < mix.rows();  // the middle row may be left without a partner
    const int a1 = paired ? second : a0, m0 = a0 ? S - a0 : 0, m1 = a1 ? S - a1 : 0;
    const T* x = mix.x + b * mix.batch_stride;
    const T *x0 = x + a0 * mix.row_stride, *x1 = x + a1 * mix.row_stride;
    const T *y0 = x + m0 * mix.row_stride, *y1 = x + m1 * mix.row_stride;
    for (int i = threadIdx.x; i < N; i += blockDim.x) {
      const int mirrored = i ? N - i : 0;
      // 1 / 8 is the even part's 1 / 2 times the 1 / 2 of each of the two separations below.
      work0[padded(i)] = {0.125f * widen(x0[i]) + 0.125f * widen(y0[mirrored]),
                          0.125f * widen(x1[i]) + 0.125f * widen(y1[mirrored])};
    }
    __syncthreads();
    const float2* z = transform(mix.along_n, 1, work0, work1);
    float* w = mix.w + b * mix.blocks() * S * width;
    for (int k = threadIdx.x; k < stored; k += blockDim.x) {
      float2 u = {0, 0}, v = {0, 0};  // padding columns share complex signals with kept ones, so they must not be NaN
      if (k < mix.columns()) {
        u = z[padded(k)];
        v = z[padded(k ? N - k : 0)];
      }
      const float p0 = u.x + v.x, q0 = u.y - v.y, p1 = u.y + v.y, q1 = v.x - u.x;
      float* column = w + (int64_t)(k / width) * S * width + k % width;
      column[(int64_t)a0 * width] = p0 + q0;
      if (m0 != a0) column[(int64_t)m0 * width] = p0 - q0;
      if (paired) {
        column[(int64_t)a1 * width] = p1 + q1;
        if (m1 != a1) column[(int64_t)m1 * width] = p1 - q1;
      }
    }
    __syncthreads();  // the work arrays may be written again
  }
}

// The value of column k in row s, and the same number in row -s.
template <class T> __device__ inline void store_both(T* y, int s, int minus, int k, int N, float value) {
  if (k > N / 2) return;
  y[(int64_t)s * N + k] = narrow<T>(value);
  if (k > 0 && 2 * k < N) y[(int64_t)minus * N + N - k] = narrow<T>(value);
}

// A block transforms 2 C columns at a time.
template <class T> __global__ void __launch_bounds__(kMaxThreads, 3) sequence_kernel(const Mix<T> mix) {
  PYFUSED_SHARED_BYTES(bytes);
  const int S = mix.S, N = mix.N, C = mix.pairs_of_columns;
  float2* work0 = reinterpret_cast<float2*>(bytes);
  float2* work1 = work0 + padded(mix.along_s.length() * C) + 1;
  for (int64_t item = blockIdx.x; item < mix.batch * mix.blocks(); item += gridDim.x) {
    const float* w = mix.w + item * S * 2 * C;
    for (int i = threadIdx.x; i < S * C; i += blockDim.x) {
      const int s = i / C, c = i % C;
      work0[padded(i)] = {w[s * 2 * C + c], w[s * 2 * C + C + c]};
    }
    __syncthreads();
    const float2* z = transform(mix.along_s, C, work0, work1);
    T* y = mix.y + item / mix.blocks() * S * N;
    const int k0 = (int)(item % mix.blocks()) * 2 * C;
    for (int i = threadIdx.x; i < mix.rows() * C; i += blockDim.x) {
      const int s = i / C, c = i % C, minus = s ? S - s : 0;
      const float2 u = z[padded(i)], v = z[padded(minus * C + c)];
      const float even0 = u.x + v.x, odd0 = u.y - v.y, even1 = u.y + v.y, odd1 = v.x - u.x;
      store_both(y, s, minus, k0 + c, N, even0 - odd0);
      store_both(y, s, minus, k0 + C + c, N, even1 - odd1);
      if (minus != s) {
        store_both(y, minus, s, k0 + c, N, even0 + odd0);
        store_both(y, minus, s, k0 + C + c, N, even1 + odd1);
      }
    }
    __syncthreads();  // the work arrays may be written again
  }
}

// ---- launchers ------------------------------------------------------------------------------------------------------

Plan read_plan(addr plan, addr table) {
  const int64_t* from = (const int64_t*)plan;
  Plan to{(int)from[0], (int)from[1], (int)from[2], {}, (const float2*)table};
  for (int i = 0; i < to.stages; ++i) to.radices[i] = (int)from[3 + i];
  return to;
}

// C: as many pairs of columns as leave room for other blocks on the multiprocessor, at most 16 columns or 64 bytes.
int pairs_of_columns(const Plan& along_s, int64_t n) {
  int c = kMaxPairs;
  while (c > 1 && (shared_bytes(along_s, c) > kWantedShared || c > n / 2 + 1)) c /= 2;
  return c;
}

// A thread has about one radix-8 butterfly per stage.
unsigned threads_for(int elements) { return row_threads(elements < kMaxThreads * 8 ? elements : kMaxThreads * 8, 8); }

template <class T> void mix_rows_and_columns(const Launch& launch, const Mix<T>& mix, addr stream) {
  const int for_rows = shared_bytes(mix.along_n, 1), for_columns = shared_bytes(mix.along_s, mix.pairs_of_columns);
  allow_shared(launch, features_kernel<T>, for_rows);
  PYFUSED_LAUNCH(features_kernel<T>, capped(mix.batch * mix.pairs()), threads_for(mix.along_n.length()), for_rows, stream,
                 mix);
  launch.check();
  allow_shared(launch, sequence_kernel<T>, for_columns);
  PYFUSED_LAUNCH(sequence_kernel<T>, capped(mix.batch * mix.blocks()),
                 threads_for(mix.along_s.length() * mix.pairs_of_columns), for_columns, stream, mix);
  launch.check();
}

}  // namespace

int64_t fourier_mix_longest() { return kLongest; }

int64_t fourier_mix_scratch(addr plan_s, int64_t b, int64_t s, int64_t n) {
  const int c = pairs_of_columns(read_plan(plan_s, 0), n);
  return b * up(n / 2 + 1, 2 * c) * s * 2 * c;
}

void fourier_mix_forward(addr x, addr y, addr scratch, addr plan_s, addr table_s, addr plan_n, addr table_n, int64_t b,
                         int64_t s, int64_t n, int64_t batch_stride, int64_t row_stride, int dtype, int device,
                         addr stream) {
  const Launch launch{"fourier_mix forward", b * s, n, device};
  if (launch.rows * n == 0) return;
  const OnDevice on(launch);
  const Plan along_s = read_plan(plan_s, table_s), along_n = read_plan(plan_n, table_n);
  const int c = pairs_of_columns(along_s, n);
  PYFUSED_BY_DTYPE(dtype, {
    const Mix<T> mix{(const T*)x, (T*)y, (float*)scratch, along_s, along_n, b, batch_stride, row_stride, (int)s, (int)n, c};
    mix_rows_and_columns(launch, mix, stream);
  })
}

}  // namespace pyfused::cuda
