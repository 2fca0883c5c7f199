// How is a complex DFT of any length computed for kWidth signals at once? Each lane has one signal, so every length vectorises.
//
// Stockham's self-sorting FFT by decimation in frequency has stages of radix 8, 5, 4, 3, 2 and of odd primes up to 127. Lengths
// with a larger prime factor use Bluestein's convolution (1970). Python computes the twiddles in float64.
// A plan is int64 {n, convolution length or 0, number of stages, radices}. Its floats are, in order: Bluestein's chirp and
// spectrum, if any; then each stage's twiddles e^(-2 pi i p k / length), k = 1 .. radix - 1, for p = 0 .. length / radix - 1,
// and for an odd prime above 5 cos and sin of 2 pi j / radix. The last stage's twiddles are 1 and are not stored.
#pragma once

#include <pyfused/simd.h>

namespace pyfused::PYFUSED_ISA {

// kWidth complex numbers.
struct Complex {
  vfloat re, im;
};

PYFUSED_INLINE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
PYFUSED_INLINE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
PYFUSED_INLINE Complex scaled(Complex a, float s) { return {a.re * splat(s), a.im * splat(s)}; }
PYFUSED_INLINE Complex times_minus_i(Complex a) { return {a.im, -a.re}; }
PYFUSED_INLINE Complex conjugate(Complex a) { return {a.re, -a.im}; }
PYFUSED_INLINE Complex times(Complex a, const float* w) {
  const vfloat c = splat(w[0]), s = splat(w[1]);
  return {a.re * c - a.im * s, a.re * s + a.im * c};
}

constexpr int kLargestDirect = 127;

struct Plan {
  int64_t n, convolution, stages;
  const int64_t* radices;
  const float* table;

  explicit Plan(const int64_t* p, const float* t) : n(p[0]), convolution(p[1]), stages(p[2]), radices(p + 3), table(t) {}
  // The number of elements of each work array.
  int64_t work() const { return convolution ? convolution : n; }
};

// ---- small transforms, in place -------------------------------------------------------------------------------------

PYFUSED_INLINE void dft2(Complex& a, Complex& b) {
  const Complex t = a;
  a = t + b;
  b = t - b;
}

PYFUSED_INLINE void dft4(Complex& a, Complex& b, Complex& c, Complex& d) {
  const Complex t0 = a + c, t1 = a - c, t2 = b + d, t3 = times_minus_i(b - d);
  a = t0 + t2;
  b = t1 + t3;
  c = t0 - t2;
  d = t1 - t3;
}

template <int R> PYFUSED_INLINE void dft(Complex* a) {
  if constexpr (R == 2) {
    dft2(a[0], a[1]);
  } else if constexpr (R == 3) {
    const Complex t = a[1] + a[2], d = times_minus_i(scaled(a[1] - a[2], 0.866025403784438647f));
    const Complex m = {a[0].re - splat(0.5f) * t.re, a[0].im - splat(0.5f) * t.im};
    a[0] = a[0] + t;
    a[1] = m + d;
    a[2] = m - d;
  } else if constexpr (R == 4) {
    dft4(a[0], a[1], a[2], a[3]);
  } else if constexpr (R == 5) {
    constexpr float c1 = 0.309016994374947424f, c2 = -0.809016994374947424f;
    constexpr float s1 = 0.951056516295153572f, s2 = 0.587785252292473129f;
    const Complex t1 = a[1] + a[4], t2 = a[2] + a[3], d1 = a[1] - a[4], d2 = a[2] - a[3];
    const Complex m1 = a[0] + scaled(t1, c1) + scaled(t2, c2), m2 = a[0] + scaled(t1, c2) + scaled(t2, c1);
    const Complex n1 = times_minus_i(scaled(d1, s1) + scaled(d2, s2)), n2 = times_minus_i(scaled(d1, s2) - scaled(d2, s1));
    a[0] = a[0] + t1 + t2;
    a[1] = m1 + n1;
    a[2] = m2 + n2;
    a[3] = m2 - n2;
    a[4] = m1 - n1;
  } else {
    static_assert(R == 8, "the radices of dft()");
    constexpr float h = 0.707106781186547524f;
    dft4(a[0], a[2], a[4], a[6]);
    dft4(a[1], a[3], a[5], a[7]);
    const Complex o1 = scaled({a[3].re + a[3].im, a[3].im - a[3].re}, h), o2 = times_minus_i(a[5]);
    const Complex o3 = scaled({a[7].im - a[7].re, -a[7].re - a[7].im}, h);
    const Complex e0 = a[0], e1 = a[2], e2 = a[4], e3 = a[6], o0 = a[1];
    a[0] = e0 + o0;
    a[1] = e1 + o1;
    a[2] = e2 + o2;
    a[3] = e3 + o3;
    a[4] = e0 - o0;
    a[5] = e1 - o1;
    a[6] = e2 - o2;
    a[7] = e3 - o3;
  }
}

// ---- stages ---------------------------------------------------------------------------------------------------------
// y[q + s (R p + k)] = w^(p k) sum over j of x[q + s (p + m j)] e^(-2 pi i j k / R), with p < m, q < s.

template <int R> void stage(const Complex* x, Complex* y, int64_t m, int64_t s, const float* w) {
  if (m == 1) {
    for (int64_t q = 0; q < s; ++q) {
      Complex a[R];
      for (int j = 0; j < R; ++j) a[j] = x[q + s * j];
      dft<R>(a);
      for (int k = 0; k < R; ++k) y[q + s * k] = a[k];
    }
    return;
  }
  for (int64_t p = 0; p < m; ++p, w += 2 * (R - 1))
    for (int64_t q = 0; q < s; ++q) {
      Complex a[R];
#pragma GCC unroll 8
      for (int j = 0; j < R; ++j) a[j] = x[q + s * (p + m * j)];
      dft<R>(a);
      Complex* out = y + q + s * R * p;
      out[0] = a[0];
#pragma GCC unroll 8
      for (int k = 1; k < R; ++k) out[s * k] = times(a[k], w + 2 * (k - 1));
    }
}

// An odd prime radix. With sums and differences of a[j] and a[r - j], a pair takes four real products.
inline void odd_stage(const Complex* x, Complex* y, int64_t m, int64_t s, const float* w, int r, const float* roots) {
  const int half = (r - 1) / 2;
  Complex sum[kLargestDirect / 2 + 1], difference[kLargestDirect / 2 + 1];
  for (int64_t p = 0; p < m; ++p, w += 2 * (r - 1))
    for (int64_t q = 0; q < s; ++q) {
      const Complex first = x[q + s * p];
      Complex total = first;
      for (int j = 1; j <= half; ++j) {
        const Complex a = x[q + s * (p + m * j)], b = x[q + s * (p + m * (r - j))];
        sum[j] = a + b;
        difference[j] = a - b;
        total = total + sum[j];
      }
      Complex* out = y + q + s * r * p;
      out[0] = total;
      for (int k = 1; k <= half; ++k) {
        Complex even = first, odd = {vfloat{}, vfloat{}};
        for (int j = 1, jk = k; j <= half; ++j, jk = jk + k < r ? jk + k : jk + k - r) {
          const vfloat c = splat(roots[2 * jk]), sine = splat(roots[2 * jk + 1]);
          even = {even.re + c * sum[j].re, even.im + c * sum[j].im};
          odd = {odd.re + sine * difference[j].re, odd.im + sine * difference[j].im};
        }
        odd = times_minus_i(odd);
        const Complex low = even + odd, high = even - odd;
        out[s * k] = m == 1 ? low : times(low, w + 2 * (k - 1));
        out[s * (r - k)] = m == 1 ? high : times(high, w + 2 * (r - k - 1));
      }
    }
}

// Transforms `n` elements at x and returns the result's address: a work array, or x if there is nothing to do. x is not
// changed unless it is a work array.
inline Complex* stockham(const Plan& plan, int64_t n, const float* table, Complex* x, Complex* work0, Complex* work1) {
  int64_t s = 1;
  for (int64_t i = 0; i < plan.stages; ++i) {
    const int r = (int)plan.radices[i];
    const int64_t m = n / (r * s);
    Complex* y = x == work0 ? work1 : work0;
    const float* w = table;
    if (m > 1) table += 2 * m * (r - 1);
    switch (r) {
      case 2: stage<2>(x, y, m, s, w); break;
      case 3: stage<3>(x, y, m, s, w); break;
      case 4: stage<4>(x, y, m, s, w); break;
      case 5: stage<5>(x, y, m, s, w); break;
      case 8: stage<8>(x, y, m, s, w); break;
      default:
        odd_stage(x, y, m, s, w, r, table);
        table += 2 * r;
    }
    s *= r;
    x = y;
  }
  return x;
}

// A DFT of any length. x is as in stockham(); both work arrays have plan.work() elements.
inline Complex* transform(const Plan& plan, Complex* x, Complex* work0, Complex* work1) {
  if (!plan.convolution) return stockham(plan, plan.n, plan.table, x, work0, work1);
  // X[k] = chirp[k] sum over j of (x[j] chirp[j]) conj(chirp[k - j]) is a convolution. Its inverse transform is the
  // conjugate of the transform of the conjugate. `spectrum` is the transform of conj(chirp) divided by the length.
  const int64_t n = plan.n, length = plan.convolution;
  const float *chirp = plan.table, *spectrum = chirp + 2 * n, *twiddles = spectrum + 2 * length;
  for (int64_t j = 0; j < n; ++j) work0[j] = times(x[j], chirp + 2 * j);
  for (int64_t j = n; j < length; ++j) work0[j] = {vfloat{}, vfloat{}};
  Complex* y = stockham(plan, length, twiddles, work0, work0, work1);
  for (int64_t j = 0; j < length; ++j) y[j] = conjugate(times(y[j], spectrum + 2 * j));
  y = stockham(plan, length, twiddles, y, work0, work1);
  for (int64_t k = 0; k < n; ++k) y[k] = times(conjugate(y[k]), chirp + 2 * k);
  return y;
}

}  // namespace pyfused::PYFUSED_ISA
