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
//
// FNet's usual lengths have kernels of their own (LENGTH, else 0): strides are constants, and every access has 16 bytes, or
// four elements of y. Only mirrored columns lie one element off, so they are stored in pairs.
#include <pyfused/launch.h>

#include "fft_fixed.cuh"
#include "kernels.h"

namespace pyfused::cuda {
namespace {

constexpr int kLongest = 9216;                // its two padded work arrays take 153 KiB; an A100's block may have 163
constexpr int kWantedShared = 72 * 1024;      // three blocks fit on a multiprocessor
constexpr int kMaxThreads = 256, kMaxPairs = 8;

int shared_bytes(const Plan& plan, int signals) { return 2 * (padded(plan.length() * signals) + 1) * (int)sizeof(float2); }

// C of sequence_kernel's own lengths, which pairs_of_columns() also finds for rows that are not very short.
constexpr int fixed_pairs(int length) { return length <= 512 ? 8 : 4; }

template <class T> struct Mix {
  const T* x;
  T* y;
  float* w;
  Plan along_s, along_n;
  int64_t batch, batch_stride, row_stride;
  int S, N, pairs_of_columns;  // C
  int log_width;               // 2 C = 1 << log_width

  __host__ __device__ int rows() const { return S / 2 + 1; }
  __host__ __device__ int pairs() const { return (rows() + 1) / 2; }  // rows p and p + pairs()
  __host__ __device__ int columns() const { return N / 2 + 1; }
  __host__ __device__ int blocks() const { return (columns() + 2 * pairs_of_columns - 1) / (2 * pairs_of_columns); }
};

// An element of the even parts of a pair of rows as one complex number. 1 / 8 is the even part's 1 / 2 times the 1 / 2 of
// each of the two separations of complex signals.
template <class T> __device__ inline float2 even_pair(T x0, T mirrored0, T x1, T mirrored1) {
  return {0.125f * widen(x0) + 0.125f * widen(mirrored0), 0.125f * widen(x1) + 0.125f * widen(mirrored1)};
}

// Fills `work` from the pairs of rows x0, x1 and their mirrors y0, y1, V elements at a time.
template <int N, class T>
__device__ inline void load_rows(const T* x0, const T* y0, const T* x1, const T* y1, float2* work) {
  constexpr int V = 16 / sizeof(T);
  for (int i = threadIdx.x * V; i < N; i += blockDim.x * V) {
    const int behind = i ? N - i : 0;  // where i is mirrored to; i + 1 .. i + V - 1 are mirrored into the vector before it
    const Pack<T, V> a0 = load<V>(x0 + i), a1 = load<V>(x1 + i), b0 = load<V>(y0 + N - V - i), b1 = load<V>(y1 + N - V - i);
    const int to = padded(i);  // a multiple of V, so no place within the vector stays unused
    work[to] = even_pair(a0.at[0], y0[behind], a1.at[0], y1[behind]);
#pragma unroll
    for (int j = 1; j < V; ++j) work[to + j] = even_pair(a0.at[j], b0.at[V - j], a1.at[j], b1.at[V - j]);
  }
}

// Rows a0, -a0, a1 and -a1 of w at column k, from the transform z of a pair of rows.
struct Hartley {
  float a0, m0, a1, m1;
};
__device__ inline Hartley separate(float2 u, float2 v) {
  const float p0 = u.x + v.x, q0 = u.y - v.y, p1 = u.y + v.y, q1 = v.x - u.x;
  return {p0 + q0, p0 - q0, p1 + q1, p1 - q1};
}

// A block transforms one pair of rows at a time.
template <class T, int LENGTH> __global__ void __launch_bounds__(kMaxThreads, 3) features_kernel(const Mix<T> mix) {
  PYFUSED_SHARED_BYTES(bytes);
  float2* work0 = reinterpret_cast<float2*>(bytes);
  float2* work1 = work0 + padded(mix.along_n.length()) + 1;
  const int S = mix.S, N = LENGTH ? LENGTH : mix.N, width = 1 << mix.log_width, stored = mix.blocks() * width;
  for (int64_t item = blockIdx.x; item < mix.batch * mix.pairs(); item += gridDim.x) {
    const int64_t b = item / mix.pairs();
    const int a0 = (int)(item % mix.pairs()), second = a0 + mix.pairs();
    const bool paired = second < mix.rows();  // the middle row may be left without a partner
    const int a1 = paired ? second : a0, m0 = a0 ? S - a0 : 0, m1 = a1 ? S - a1 : 0;
    const T* x = mix.x + b * mix.batch_stride;
    const T *x0 = x + a0 * mix.row_stride, *x1 = x + a1 * mix.row_stride;
    const T *y0 = x + m0 * mix.row_stride, *y1 = x + m1 * mix.row_stride;
    if constexpr (LENGTH) {
      load_rows<LENGTH>(x0, y0, x1, y1, work0);
    } else {
      for (int i = threadIdx.x; i < N; i += blockDim.x) {
        const int mirrored = i ? N - i : 0;
        work0[padded(i)] = even_pair(x0[i], y0[mirrored], x1[i], y1[mirrored]);
      }
    }
    __syncthreads();
    const float2* z;
    if constexpr (LENGTH) z = fixed_transform<LENGTH, 1>(mix.along_n.table, work0, work1);
    else z = transform(mix.along_n, 1, work0, work1);
    constexpr int V = LENGTH ? 4 : 1;  // columns at a time; a block of columns has a multiple of them
    float* w = mix.w + b * mix.blocks() * S * width;
    for (int k = threadIdx.x * V; k < stored; k += blockDim.x * V) {
      Pack<float, V> to_a0, to_m0, to_a1, to_m1;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        float2 u = {0, 0}, v = {0, 0};  // padding columns share complex signals with kept ones, so they must not be NaN
        if (k + j < mix.columns()) {
          u = z[padded(k + j)];
          v = z[padded(k + j ? N - k - j : 0)];
        }
        const Hartley h = separate(u, v);
        to_a0.at[j] = h.a0, to_m0.at[j] = h.m0, to_a1.at[j] = h.a1, to_m1.at[j] = h.m1;
      }
      float* column = w + (int64_t)(k >> mix.log_width) * S * width + (k & (width - 1));
      store<V>(column + (int64_t)a0 * width, to_a0);
      if (m0 != a0) store<V>(column + (int64_t)m0 * width, to_m0);
      if (paired) {
        store<V>(column + (int64_t)a1 * width, to_a1);
        if (m1 != a1) store<V>(column + (int64_t)m1 * width, to_m1);
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

// The same for V columns from k on.
template <int V, class T>
__device__ inline void store_both(T* y, int s, int minus, int k, int N, const float (&value)[V]) {
  if (V == 1 || k + V > N / 2) {
#pragma unroll
    for (int j = 0; j < V; ++j) store_both(y, s, minus, k + j, N, value[j]);
    return;
  }
  if constexpr (V == 4) {
    Pack<T, 4> all;
    Pack<T, 2> middle;
#pragma unroll
    for (int j = 0; j < 4; ++j) all.at[j] = narrow<T>(value[j]);
    store<4>(y + (int64_t)s * N + k, all);
    T* mirror = y + (int64_t)minus * N + N - k;
    middle.at[0] = all.at[2], middle.at[1] = all.at[1];
    if (k > 0) mirror[0] = all.at[0];
    store<2>(mirror - 2, middle);
    mirror[-3] = all.at[3];
  }
}

// A block transforms 2 C columns at a time.
template <class T, int LENGTH> __global__ void __launch_bounds__(kMaxThreads, 3) sequence_kernel(const Mix<T> mix) {
  PYFUSED_SHARED_BYTES(bytes);
  constexpr int V = LENGTH ? 4 : 1;
  const int S = LENGTH ? LENGTH : mix.S, N = mix.N, C = LENGTH ? fixed_pairs(LENGTH) : mix.pairs_of_columns, groups = C / V;
  float2* work0 = reinterpret_cast<float2*>(bytes);
  float2* work1 = work0 + padded((LENGTH ? LENGTH : mix.along_s.length()) * C) + 1;
  for (int64_t item = blockIdx.x; item < mix.batch * mix.blocks(); item += gridDim.x) {
    const float* w = mix.w + item * S * 2 * C;
    for (int i = threadIdx.x; i < S * groups; i += blockDim.x) {
      const int s = i / groups, c = i % groups * V;
      const Pack<float, V> re = load<V>(w + s * 2 * C + c), im = load<V>(w + s * 2 * C + C + c);
      const int to = padded(i * V);
#pragma unroll
      for (int j = 0; j < V; ++j) work0[to + j] = {re.at[j], im.at[j]};
    }
    __syncthreads();
    const float2* z;
    if constexpr (LENGTH) z = fixed_transform<LENGTH, fixed_pairs(LENGTH)>(mix.along_s.table, work0, work1);
    else z = transform(mix.along_s, C, work0, work1);
    T* y = mix.y + item / mix.blocks() * S * N;
    const int k0 = (int)(item % mix.blocks()) * 2 * C;
    for (int i = threadIdx.x; i < mix.rows() * groups; i += blockDim.x) {
      const int s = i / groups, c = i % groups * V, minus = s ? S - s : 0;
      const int at = padded(s * C + c), mirrored = padded(minus * C + c);
      float low0[V], low1[V], high0[V], high1[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float2 u = z[at + j], v = z[mirrored + j];
        const float even0 = u.x + v.x, odd0 = u.y - v.y, even1 = u.y + v.y, odd1 = v.x - u.x;
        low0[j] = even0 - odd0, low1[j] = even1 - odd1, high0[j] = even0 + odd0, high1[j] = even1 + odd1;
      }
      store_both<V>(y, s, minus, k0 + c, N, low0);
      store_both<V>(y, s, minus, k0 + C + c, N, low1);
      if (minus != s) {
        store_both<V>(y, minus, s, k0 + c, N, high0);
        store_both<V>(y, minus, s, k0 + C + c, N, high1);
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

template <class T, int LENGTH> void mix_features(const Launch& launch, const Mix<T>& mix, addr stream) {
  auto kernel = features_kernel<T, LENGTH>;
  const int bytes = shared_bytes(mix.along_n, 1);
  allow_shared(launch, kernel, bytes);
  PYFUSED_LAUNCH(kernel, capped(mix.batch * mix.pairs()), threads_for(mix.along_n.length()), bytes, stream, mix);
  launch.check();
}

template <class T, int LENGTH> void mix_sequence(const Launch& launch, const Mix<T>& mix, addr stream) {
  auto kernel = sequence_kernel<T, LENGTH>;
  const int bytes = shared_bytes(mix.along_s, mix.pairs_of_columns);
  allow_shared(launch, kernel, bytes);
  PYFUSED_LAUNCH(kernel, capped(mix.batch * mix.blocks()), threads_for(mix.along_s.length() * mix.pairs_of_columns), bytes,
                 stream, mix);
  launch.check();
}

template <class T> void mix_rows_and_columns(const Launch& launch, const Mix<T>& mix, addr stream) {
  constexpr int V = 16 / sizeof(T);
  const bool wide = aligned16({(addr)mix.x}) && mix.batch_stride % V == 0 && mix.row_stride % V == 0 &&
                    mix.pairs_of_columns >= 2;
  if (wide && mix.N == 256) mix_features<T, 256>(launch, mix, stream);
  else if (wide && mix.N == 512) mix_features<T, 512>(launch, mix, stream);
  else if (wide && mix.N == 768) mix_features<T, 768>(launch, mix, stream);
  else if (wide && mix.N == 1024) mix_features<T, 1024>(launch, mix, stream);
  else mix_features<T, 0>(launch, mix, stream);
  const bool fixed = mix.N % 4 == 0 && mix.pairs_of_columns == fixed_pairs(mix.S);
  if (fixed && mix.S == 128) mix_sequence<T, 128>(launch, mix, stream);
  else if (fixed && mix.S == 256) mix_sequence<T, 256>(launch, mix, stream);
  else if (fixed && mix.S == 512) mix_sequence<T, 512>(launch, mix, stream);
  else if (fixed && mix.S == 1024) mix_sequence<T, 1024>(launch, mix, stream);
  else mix_sequence<T, 0>(launch, mix, stream);
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
    const Mix<T> mix{(const T*)x, (T*)y, (float*)scratch, along_s, along_n, b, batch_stride, row_stride, (int)s, (int)n, c,
                     __builtin_ctz(2 * c)};
    mix_rows_and_columns(launch, mix, stream);
  })
}

}  // namespace pyfused::cuda
