// fourier_mix on CUDA: y[s][n] = sum over a, b of x[a][b] cos(2 pi (s a / S + n b / N)), in two kernels.
//
// The maths is explained in csrc/cpu/fourier_mix.cpp. The first kernel transforms rows 0 .. S / 2 of the even part of x, two of
// them as one complex signal, and writes w, real, (S, N / 2 + 1). The second does a Hartley transform along the columns of w,
// two neighbours as one complex signal, and stores each number at [s][k] and [-s][N - k].
//
// Reads x once, writes and reads w once (half as many elements, in float32) and writes y once: (64, 512, 768) in bfloat16 50 +
// 52 + 52 + 50 MB. A sample takes 5 n log2 n FLOPs for each of S / 4 signals of n = N and N / 4 of n = S, 9 MFLOP at 512 x 768.
// Shared memory and latency are the bound, so a block holds little: one pair of rows, or up to 8 pairs of columns. w is stored
// by blocks of columns, (B, blocks, S, 2 C), so a block of the second kernel reads one contiguous piece.
//
// What it takes of w from the L2 (50 MB on an H100) the memory need not move. x passes through (evict first), so w's last part
// is there when the first kernel ends. The second kernel begins with it and goes backwards, and it discards what it has read:
// that is never written to memory, and makes room for y.
//
// FNet's usual lengths have kernels of their own (LENGTH, else 0): strides and threads are constants, and the first kernel's
// accesses have 16 bytes. In the second a warp reads one piece of w, for a first stage without shared memory, and stores whole
// rows of its block, a sector of 32 bytes in half precision. Mirrored rows lie one element off, in two sectors.
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

// Threads of a kernel for a length: each has one radix-8 butterfly of a row, and one or two of columns, at each stage. The most
// threads of the general kernels, LENGTH 0.
constexpr int threads_of_rows(int length) { return length ? length / 8 : kMaxThreads; }
constexpr int threads_of_columns(int length) {
  const int butterflies = length * fixed_pairs(length) / 8;
  return length && butterflies < kMaxThreads ? butterflies : kMaxThreads;
}

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

// 16 bytes of x, which are read once: the first to leave the L2.
template <int V, class T> __device__ inline Pack<T, V> load_once(const T* p) {
  const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(p));
  Pack<T, V> out;
  memcpy(&out, &bits, 16);
  return out;
}

// Drops a line of 128 bytes from the L2 without writing it to memory. Its contents are then undefined.
__device__ inline void discard_l2(float* line) {
#ifndef PYFUSED_CUDA_ON_CPU
  asm volatile("discard.global.L2 [%0], 128;" ::"l"(line) : "memory");
#else
  memset(line, 0xff, 128);  // NaN
#endif
}

// Fills `work` from the pairs of rows x0, x1 and their mirrors y0, y1, V elements at a time.
template <int N, int THREADS, class T>
__device__ inline void load_rows(const T* x0, const T* y0, const T* x1, const T* y1, float2* work) {
  constexpr int V = 16 / sizeof(T);
  static_assert(N % (THREADS * V) == 0, "no thread is left over");
#pragma unroll
  for (int start = 0; start < N; start += THREADS * V) {
    const int i = start + threadIdx.x * V;
    const int behind = i ? N - i : 0;  // where i is mirrored to; i + 1 .. i + V - 1 are mirrored into the vector before it
    const Pack<T, V> a0 = load_once<V>(x0 + i), a1 = load_once<V>(x1 + i);
    const Pack<T, V> b0 = load_once<V>(y0 + N - V - i), b1 = load_once<V>(y1 + N - V - i);
    const int to = padded(i);  // a multiple of V, so no place within the vector stays unused
    work[to] = even_pair(a0.at[0], y0[behind], a1.at[0], y1[behind]);
#pragma unroll
    for (int j = 1; j < V; ++j) work[to + j] = even_pair(a0.at[j], b0.at[V - j], a1.at[j], b1.at[V - j]);
  }
}

// Rows a0, -a0, a1 and -a1 of w at column k, from the transform of a pair of rows: u at k and v at -k.
struct Hartley {
  float a0, m0, a1, m1;
};
__device__ inline Hartley separate(float2 u, float2 v) {
  const float p0 = u.x + v.x, q0 = u.y - v.y, p1 = u.y + v.y, q1 = v.x - u.x;
  return {p0 + q0, p0 - q0, p1 + q1, p1 - q1};
}

// A block transforms one pair of rows at a time.
template <class T, int LENGTH>
__global__ void __launch_bounds__(threads_of_rows(LENGTH), 3 * kMaxThreads / threads_of_rows(LENGTH))
    features_kernel(const Mix<T> mix) {
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
      load_rows<LENGTH, threads_of_rows(LENGTH)>(x0, y0, x1, y1, work0);
    } else {
      for (int i = threadIdx.x; i < N; i += blockDim.x) {
        const int mirrored = i ? N - i : 0;
        work0[padded(i)] = even_pair(x0[i], y0[mirrored], x1[i], y1[mirrored]);
      }
    }
    __syncthreads();
    const float2* z;
    if constexpr (LENGTH) z = fixed_transform<LENGTH, 1, threads_of_rows(LENGTH)>(mix.along_n.table, work0, work1);
    else z = transform(mix.along_n, 1, work0, work1);
    constexpr int V = LENGTH ? 4 : 1;  // columns at a time; a block of columns has a multiple of them
    const int step = (LENGTH ? threads_of_rows(LENGTH) : (int)blockDim.x) * V;
    float* w = mix.w + b * mix.blocks() * S * width;
    for (int k = threadIdx.x * V; k < stored; k += step) {
      Pack<float, V> to_a0, to_m0, to_a1, to_m1;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        float2 u = {0, 0}, v = {0, 0};  // a column of padding shares a complex signal with the last one: it must not be NaN
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

// The Hartley transform at n and at -n of the real or the imaginary part of a complex signal, from its DFT u at n and v at -n.
__device__ inline float2 hartley(float2 u, float2 v, bool imaginary) {
  const float p = imaginary ? u.y + v.y : u.x + v.x, q = imaginary ? v.x - u.x : u.y - v.y;
  return {p - q, p + q};
}

// The value of column k in a row, and the same number in the row's mirror.
template <class T> __device__ inline void store_both(T* row, T* mirror, int k, int N, float value) {
  if (k > N / 2) return;
  row[k] = narrow<T>(value);
  if (k > 0 && 2 * k < N) mirror[N - k] = narrow<T>(value);
}

// A block transforms 2 C columns at a time, the last ones first.
template <class T, int LENGTH>
__global__ void __launch_bounds__(threads_of_columns(LENGTH), 3 * kMaxThreads / threads_of_columns(LENGTH))
    sequence_kernel(const Mix<T> mix) {
  PYFUSED_SHARED_BYTES(bytes);
  const int S = LENGTH ? LENGTH : mix.S, N = mix.N, C = LENGTH ? fixed_pairs(LENGTH) : mix.pairs_of_columns;
  float2* work0 = reinterpret_cast<float2*>(bytes);
  float2* work1 = work0 + padded((LENGTH ? LENGTH : mix.along_s.length()) * C) + 1;
  const int64_t items = mix.batch * mix.blocks();
  for (int64_t left = blockIdx.x; left < items; left += gridDim.x) {
    const int64_t item = items - 1 - left;
    float* w = mix.w + item * S * 2 * C;
    T* y = mix.y + item / mix.blocks() * S * N;
    const int k0 = (int)(item % mix.blocks()) * 2 * C;
    if constexpr (LENGTH) {
      constexpr int PAIRS = fixed_pairs(LENGTH), THREADS = threads_of_columns(LENGTH), ALL = LENGTH * PAIRS;
      static_assert(ALL % THREADS == 0 && THREADS % 32 == 0, "no thread is left over, and places have regular distances");
      const float2* z = fixed_transform<LENGTH, PAIRS, THREADS>(
          mix.along_s.table, reinterpret_cast<const float2*>(w), work0, work1, [w] {
            for (int i = threadIdx.x * 32; i < LENGTH * 2 * PAIRS; i += THREADS * 32) discard_l2(w + i);
          });
      // A thread has a column, of rows s and -s; or, for s = 0, of rows 0 and S / 2, each its own mirror.
      const int s0 = threadIdx.x / (2 * PAIRS), column = threadIdx.x % (2 * PAIRS), k = k0 + column, pair = column / 2;
      const int at = padded(s0 * PAIRS + pair), mirrored = padded((S - s0) * PAIRS + pair), half = padded(S / 2 * PAIRS + pair);
#pragma unroll
      for (int start = 0; start < ALL; start += THREADS) {
        const int s = s0 + start / (2 * PAIRS), step = start / 2 + start / 32;
        const bool first = start == 0 && s0 == 0;
        const float2 u = z[at + step], v = z[first ? half : mirrored - step];
        float2 h = hartley(u, v, column % 2);
        if (first) h = column % 2 ? float2{2 * u.y, 2 * v.y} : float2{2 * u.x, 2 * v.x};
        T *row = y + s * N, *other = y + (first ? S / 2 : S - s) * N;
        store_both(row, first ? row : other, k, N, h.x);
        store_both(other, first ? other : row, k, N, h.y);
      }
    } else {
      for (int i = threadIdx.x; i < S * C; i += blockDim.x) work0[padded(i)] = reinterpret_cast<const float2*>(w)[i];
      __syncthreads();
      const float2* z = transform(mix.along_s, C, work0, work1);
      for (int i = threadIdx.x; i < mix.rows() * 2 * C; i += blockDim.x) {
        const int s = i / (2 * C), column = i % (2 * C), minus = s ? S - s : 0;
        const float2 h = hartley(z[padded(s * C + column / 2)], z[padded(minus * C + column / 2)], column % 2);
        T *row = y + (int64_t)s * N, *other = y + (int64_t)minus * N;
        store_both(row, other, k0 + column, N, h.x);
        if (minus != s) store_both(other, row, k0 + column, N, h.y);
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
  const unsigned threads = LENGTH ? threads_of_rows(LENGTH) : threads_for(mix.along_n.length());
  PYFUSED_LAUNCH(kernel, capped(mix.batch * mix.pairs()), threads, bytes, stream, mix);
  launch.check();
}

template <class T, int LENGTH> void mix_sequence(const Launch& launch, const Mix<T>& mix, addr stream) {
  auto kernel = sequence_kernel<T, LENGTH>;
  const int bytes = shared_bytes(mix.along_s, mix.pairs_of_columns);
  allow_shared(launch, kernel, bytes);
  const unsigned threads = LENGTH ? threads_of_columns(LENGTH) : threads_for(mix.along_s.length() * mix.pairs_of_columns);
  PYFUSED_LAUNCH(kernel, capped(mix.batch * mix.blocks()), threads, bytes, stream, mix);
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
  // w begins with a line of the cache; then every block's part of it does, and is whole lines.
  const bool fixed = mix.N % 4 == 0 && mix.pairs_of_columns == fixed_pairs(mix.S) && (addr)mix.w % 128 == 0;
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
