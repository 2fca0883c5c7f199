// How does a block transform complex signals of any length in its shared memory? Stockham's self-sorting FFT alternates between
// two arrays. Several signals lie side by side: element i of signal c is at i * signals + c.
//
// Stages and tables are as in csrc/cpu/fft.h: radices 8, 5, 4, 3, 2, odd primes up to 127, and Bluestein's convolution for
// lengths with a larger prime factor. But a stage's twiddles lie by k, then by p: neighbouring threads read neighbours. (By p,
// then by k, 56 bytes lie between them, and a warp's access to 14 lines of the cache takes 14 cycles.) Every thread of the
// block calls these functions.
#pragma once

#include <pyfused/device.cuh>

namespace pyfused::cuda {

constexpr int kMaxStages = 16;

struct Plan {
  int n, convolution, stages;
  int radices[kMaxStages];
  const float2* table;

  // Elements of a work array for one signal.
  __host__ __device__ int length() const { return convolution ? convolution : n; }
};

// One place stays unused after every 16 elements. Otherwise strides of 4 and 8 elements would hit the same banks.
__host__ __device__ inline int padded(int i) { return i + i / 16; }

__device__ inline float2 add(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }
__device__ inline float2 sub(float2 a, float2 b) { return {a.x - b.x, a.y - b.y}; }
__device__ inline float2 scaled(float2 a, float s) { return {a.x * s, a.y * s}; }
__device__ inline float2 times_minus_i(float2 a) { return {a.y, -a.x}; }
__device__ inline float2 conjugate(float2 a) { return {a.x, -a.y}; }
__device__ inline float2 times(float2 a, float2 w) { return {a.x * w.x - a.y * w.y, a.x * w.y + a.y * w.x}; }

__device__ inline void dft4(float2& a, float2& b, float2& c, float2& d) {
  const float2 t0 = add(a, c), t1 = sub(a, c), t2 = add(b, d), t3 = times_minus_i(sub(b, d));
  a = add(t0, t2);
  b = add(t1, t3);
  c = sub(t0, t2);
  d = sub(t1, t3);
}

template <int R> __device__ inline void dft(float2* a) {
  if constexpr (R == 2) {
    const float2 t = a[0];
    a[0] = add(t, a[1]);
    a[1] = sub(t, a[1]);
  } else if constexpr (R == 3) {
    const float2 t = add(a[1], a[2]), d = times_minus_i(scaled(sub(a[1], a[2]), 0.866025403784438647f));
    const float2 m = sub(a[0], scaled(t, 0.5f));
    a[0] = add(a[0], t);
    a[1] = add(m, d);
    a[2] = sub(m, d);
  } else if constexpr (R == 4) {
    dft4(a[0], a[1], a[2], a[3]);
  } else if constexpr (R == 5) {
    constexpr float c1 = 0.309016994374947424f, c2 = -0.809016994374947424f;
    constexpr float s1 = 0.951056516295153572f, s2 = 0.587785252292473129f;
    const float2 t1 = add(a[1], a[4]), t2 = add(a[2], a[3]), d1 = sub(a[1], a[4]), d2 = sub(a[2], a[3]);
    const float2 m1 = add(a[0], add(scaled(t1, c1), scaled(t2, c2))), m2 = add(a[0], add(scaled(t1, c2), scaled(t2, c1)));
    const float2 n1 = times_minus_i(add(scaled(d1, s1), scaled(d2, s2)));
    const float2 n2 = times_minus_i(sub(scaled(d1, s2), scaled(d2, s1)));
    a[0] = add(a[0], add(t1, t2));
    a[1] = add(m1, n1);
    a[2] = add(m2, n2);
    a[3] = sub(m2, n2);
    a[4] = sub(m1, n1);
  } else {
    static_assert(R == 8, "the radices of dft()");
    constexpr float h = 0.707106781186547524f;
    dft4(a[0], a[2], a[4], a[6]);
    dft4(a[1], a[3], a[5], a[7]);
    const float2 o0 = a[1], o1 = scaled({a[3].x + a[3].y, a[3].y - a[3].x}, h), o2 = times_minus_i(a[5]);
    const float2 o3 = scaled({a[7].y - a[7].x, -a[7].x - a[7].y}, h);
    const float2 e0 = a[0], e1 = a[2], e2 = a[4], e3 = a[6];
    a[0] = add(e0, o0);
    a[1] = add(e1, o1);
    a[2] = add(e2, o2);
    a[3] = add(e3, o3);
    a[4] = sub(e0, o0);
    a[5] = sub(e1, o1);
    a[6] = sub(e2, o2);
    a[7] = sub(e3, o3);
  }
}

// y[q + s (R p + k)] = w^(p k) sum over j of x[q + s (p + m j)] e^(-2 pi i j k / R). A thread does one (p, q) at a time.
template <int R> __device__ inline void stage(const float2* x, float2* y, int m, int s, const float2* w) {
  for (int i = threadIdx.x; i < m * s; i += blockDim.x) {
    const int p = i / s, q = i % s, out = q + s * R * p;
    float2 a[R];
#pragma unroll
    for (int j = 0; j < R; ++j) a[j] = x[padded(i + m * s * j)];
    dft<R>(a);
    y[padded(out)] = a[0];
#pragma unroll
    for (int k = 1; k < R; ++k) y[padded(out + s * k)] = m == 1 ? a[k] : times(a[k], w[(k - 1) * m + p]);
  }
}

// An odd prime radix. A thread does outputs k and r - k of one (p, q). k = 0 is the plain sum.
__device__ inline void odd_stage(const float2* x, float2* y, int m, int s, const float2* w, int r, const float2* roots) {
  const int half = (r - 1) / 2, butterflies = m * s;
  for (int item = threadIdx.x; item < butterflies * (half + 1); item += blockDim.x) {
    const int i = item % butterflies, k = item / butterflies, p = i / s, out = i % s + s * r * p;
    float2 even = x[padded(i)], odd = {0, 0};
    for (int j = 1, jk = k; j <= half; ++j, jk = jk + k < r ? jk + k : jk + k - r) {
      const float2 a = x[padded(i + butterflies * j)], b = x[padded(i + butterflies * (r - j))];
      const float2 root = roots[jk], t = add(a, b), d = sub(a, b);
      even = {even.x + root.x * t.x, even.y + root.x * t.y};
      odd = {odd.x + root.y * d.x, odd.y + root.y * d.y};
    }
    odd = times_minus_i(odd);
    if (k == 0) {
      y[padded(out)] = even;
    } else {
      const float2 low = add(even, odd), high = sub(even, odd);
      y[padded(out + s * k)] = m == 1 ? low : times(low, w[(k - 1) * m + p]);
      y[padded(out + s * (r - k))] = m == 1 ? high : times(high, w[(r - k - 1) * m + p]);
    }
  }
}

// Transforms `n` elements of each signal, starting with x. Returns the array that holds the result.
__device__ inline float2* stockham(const Plan& plan, int n, const float2* table, int signals, float2* x, float2* other) {
  for (int i = 0, s = signals, m = n; i < plan.stages; ++i) {
    const int r = plan.radices[i];
    m /= r;
    const float2* w = table;
    if (m > 1) table += m * (r - 1);
    if (r == 8) {
      stage<8>(x, other, m, s, w);
    } else if (r == 5) {
      stage<5>(x, other, m, s, w);
    } else if (r == 4) {
      stage<4>(x, other, m, s, w);
    } else if (r == 3) {
      stage<3>(x, other, m, s, w);
    } else if (r == 2) {
      stage<2>(x, other, m, s, w);
    } else {
      odd_stage(x, other, m, s, w, r, table);
      table += r;
    }
    s *= r;
    __syncthreads();
    float2* t = x;
    x = other;
    other = t;
  }
  return x;
}

// The DFT of each signal in x. Returns the array that holds the result. All threads must see x; all see the result.
__device__ inline float2* transform(const Plan& plan, int signals, float2* x, float2* other) {
  if (!plan.convolution) return stockham(plan, plan.n, plan.table, signals, x, other);
  const int n = plan.n * signals, length = plan.convolution * signals;
  const float2 *chirp = plan.table, *spectrum = chirp + plan.n, *twiddles = spectrum + plan.convolution;
  for (int i = threadIdx.x; i < length; i += blockDim.x)
    x[padded(i)] = i < n ? times(x[padded(i)], chirp[i / signals]) : float2{0, 0};
  __syncthreads();
  float2* y = stockham(plan, plan.convolution, twiddles, signals, x, other);
  for (int i = threadIdx.x; i < length; i += blockDim.x) y[padded(i)] = conjugate(times(y[padded(i)], spectrum[i / signals]));
  __syncthreads();
  y = stockham(plan, plan.convolution, twiddles, signals, y, y == x ? other : x);
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[padded(i)] = times(conjugate(y[padded(i)]), chirp[i / signals]);
  __syncthreads();
  return y;
}

}  // namespace pyfused::cuda
