// How does a block transform complex signals of a length that is known at compile time? As fft.cuh does, with the same
// stages and tables, but a stage's strides and its number of threads are constants: no division, no loop that counts, and one
// address serves a whole butterfly.
#pragma once

#include "fft.cuh"

namespace pyfused::cuda {

// The radix of the first stage of n elements, as in kernels/shared/fourier.py.
constexpr int first_radix(int n) { return n % 8 == 0 ? 8 : n % 5 == 0 ? 5 : n % 4 == 0 ? 4 : n % 3 == 0 ? 3 : 2; }

// padded(i + STEP * k) for i = STEP * COUNT * p + q, q < STEP, k < COUNT. It is padded(i) and a constant, if the unused
// places lie at the same distances from every such i.
template <int STEP, int COUNT> constexpr bool is_regular() {
  return STEP % 16 == 0 || (16 % STEP == 0 && (STEP * COUNT % 16 == 0 || 16 % (STEP * COUNT) == 0));
}
template <int STEP, int COUNT> __device__ inline int place(int i, int padded_i, int k) {
  return is_regular<STEP, COUNT>() ? padded_i + STEP * k + STEP * k / 16 : padded(i + STEP * k);
}

// stage() of fft.cuh with constants. x is in global memory, where no place stays unused, or in shared memory.
template <int R, int M, int S, int THREADS, bool GLOBAL>
__device__ inline void fixed_stage(const float2* x, float2* y, const float2* w) {
#pragma unroll
  for (int start = 0; start < M * S; start += THREADS) {
    const int i = start + threadIdx.x;
    if (M * S - start < THREADS && i >= M * S) break;
    const int p = i / S, from = padded(i), to = i % S + S * R * p, padded_to = padded(to);
    float2 a[R];
#pragma unroll
    for (int j = 0; j < R; ++j) a[j] = GLOBAL ? x[i + M * S * j] : x[place<M * S, 1>(i, from, j)];
    dft<R>(a);
    y[padded_to] = a[0];
#pragma unroll
    for (int k = 1; k < R; ++k) y[place<S, R>(to, padded_to, k)] = M == 1 ? a[k] : times(a[k], w[(k - 1) * M + p]);
  }
}

// Transforms N elements of each of S signals, starting with x. Returns the array that holds the result. All threads must see x;
// all see the result.
template <int N, int S, int THREADS> __device__ inline float2* fixed_transform(const float2* table, float2* x, float2* other) {
  if constexpr (N == 1) {
    return x;
  } else {
    constexpr int R = first_radix(N), M = N / R;
    fixed_stage<R, M, S, THREADS, false>(x, other, table);
    __syncthreads();
    return fixed_transform<M, S * R, THREADS>(table + (M > 1 ? M * (R - 1) : 0), other, x);
  }
}

// The same for signals in global memory; work0 and work1 are free. `read` is called once all threads have read x.
template <int N, int S, int THREADS, class Read>
__device__ inline float2* fixed_transform(const float2* table, const float2* x, float2* work0, float2* work1,
                                          const Read& read) {
  constexpr int R = first_radix(N), M = N / R;
  fixed_stage<R, M, S, THREADS, true>(x, work0, table);
  __syncthreads();
  read();
  return fixed_transform<M, S * R, THREADS>(table + M * (R - 1), work0, work1);
}

}  // namespace pyfused::cuda
