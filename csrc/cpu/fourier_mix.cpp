// fourier_mix on the CPU: y[s][n] = sum over a, b of x[a][b] cos(2 pi (s a / S + n b / N)).
//
// Symmetry leaves a quarter of a complex transform's work. y depends only on the even part of x, e[a][b] = (x[a][b] +
// x[-a][-b]) / 2. If P + i Q is the DFT of row a of e, row -a has P - i Q. So only rows 0 .. S / 2 are transformed, two of them
// as one complex signal, and only for columns k = 0 .. N / 2. Along the sequence a column's real part is even and its imaginary
// part is odd. The real part of its DFT is then the Hartley transform, Re - Im, of the real column w[a] = P + Q, w[-a] = P - Q.
// Again two columns make one complex signal. y[s][k] and y[-s][N - k] are the same number.
//
// The first half takes 2 kWidth rows at a time, transposed to one row per lane. It writes w in blocks of 2 kWidth columns,
// (block, S, 2 kWidth). The second half transforms a block with one column per lane. Both move whole cache lines.
//
// One to four signals of 1024 elements and more leave most lanes empty; torch.fft is faster there and takes them.
#include "kernels.h"

#include <pyfused/parallel.h>

#include "fft.h"

namespace pyfused::PYFUSED_ISA {
namespace {

constexpr int W = kWidth;

template <class T> struct Mix {
  const T* x;
  T* y;
  Plan along_s, along_n;
  int64_t S, N, batch_stride, row_stride;
  float* w;  // (samples, blocks, S, 2 W)

  int64_t rows() const { return S / 2 + 1; }         // the rows that are transformed
  int64_t pairs() const { return rows() / 2 + rows() % 2; }  // rows p and p + pairs() are one complex signal
  int64_t columns() const { return N / 2 + 1; }      // the columns that are kept
  int64_t blocks() const { return (columns() + 2 * W - 1) / (2 * W); }
  int64_t sample() const { return blocks() * S * 2 * W; }

  // The addresses of a lane's rows: row a and row -a of its sample.
  struct Lane {
    const T *row, *mirror;
    float *out, *mirror_out;  // in w, at its block 0
  };

  void features(int64_t first_batch, int64_t batches, int64_t group, Complex* work) const;
  void sequence(int64_t batch, const float* w, int64_t block, Complex* work) const;

  // Stores e[b] / 4 of the lanes' rows in z[b].re or z[b].im. The 1 / 4 does the halving of both separations below.
  void load_rows(const Lane* lanes, vfloat* z) const {
    const vfloat eighth = splat(0.125f);
    auto one = [&](int64_t b) {
      T at[W], mirror[W];
      for (int i = 0; i < W; ++i) {
        at[i] = lanes[i].row[b];
        mirror[i] = lanes[i].mirror[b ? N - b : 0];
      }
      z[2 * b] = eighth * load(at) + eighth * load(mirror);
    };
    one(0);
    if (N - 1 < W) {
      for (int64_t b = 1; b < N; ++b) one(b);
      return;
    }
    for (int64_t b = 1; b < N; b += W) {
      if (b > N - W) b = N - W;  // the last tile overlaps the one before
      vfloat tile[W], mirror[W];
      for (int i = 0; i < W; ++i) {
        tile[i] = load(lanes[i].row + b);
        mirror[i] = load(lanes[i].mirror + N - b - W + 1);
      }
      transpose(tile);
      transpose(mirror);
      for (int i = 0; i < W; ++i) z[2 * (b + i)] = eighth * tile[i] + eighth * mirror[W - 1 - i];
    }
  }

  void store_column(vfloat* tile, const Lane* lanes, int64_t at, bool mirrored) const {
    transpose(tile);
    for (int i = 0; i < W; ++i) store((mirrored ? lanes[i].mirror_out : lanes[i].out) + at, tile[i]);
  }
};

// Transforms W pairs of rows, numbered through the samples of a chunk. Lanes past the last pair repeat it. Both rows of a pair
// are from one sample, because a NaN in one row reaches both transforms.
template <class T> void Mix<T>::features(int64_t first_batch, int64_t batches, int64_t group, Complex* work) const {
  Complex *work0 = work, *work1 = work + along_n.work();
  Lane lanes[2 * W];
  const int64_t last = batches * pairs() - 1;
  for (int i = 0; i < 2 * W; ++i) {
    int64_t pair = group * W + i % W;
    pair = pair < last ? pair : last;
    const int64_t b = pair / pairs();
    int64_t a = pair % pairs() + i / W * pairs();
    a = a < rows() ? a : a - pairs();  // the middle row is its own partner; no other lane writes to its place
    const int64_t minus = a ? S - a : 0;
    const T* base = x + (first_batch + b) * batch_stride;
    float* out = w + b * sample();
    lanes[i] = {base + a * row_stride, base + minus * row_stride, out + a * 2 * W, out + minus * 2 * W};
  }
  load_rows(lanes, &work0->re);
  load_rows(lanes + W, &work0->im);
  const Complex* z = transform(along_n, work0, work0, work1);
  for (int64_t k0 = 0; k0 < blocks() * 2 * W; k0 += W) {
    vfloat plus0[W], plus1[W], minus0[W], minus1[W];
    for (int j = 0; j < W; ++j) {
      const int64_t k = k0 + j;
      if (k < columns()) {
        const Complex u = z[k], v = z[k ? N - k : 0];
        const vfloat p0 = u.re + v.re, q0 = u.im - v.im, p1 = u.im + v.im, q1 = v.re - u.re;
        plus0[j] = p0 + q0;
        minus0[j] = p0 - q0;
        plus1[j] = p1 + q1;
        minus1[j] = p1 - q1;
      } else {  // padding columns share a complex signal with kept ones, so they must not be NaN
        plus0[j] = plus1[j] = minus0[j] = minus1[j] = vfloat{};
      }
    }
    const int64_t at = k0 / (2 * W) * S * 2 * W + k0 % (2 * W);
    store_column(minus0, lanes, at, true);
    store_column(minus1, lanes + W, at, true);
    store_column(plus0, lanes, at, false);  // last, because row 0 is its own mirror
    store_column(plus1, lanes + W, at, false);
  }
}

// The columns k0 .. k0 + W - 1 of row s, and their mirror images in row -s.
template <class T> PYFUSED_INLINE void store_both(T* row, T* mirror, vfloat v, int64_t k0, int64_t n) {
  const int64_t columns = n / 2 + 1, twice = (n - 1) / 2;  // columns 1 .. twice are stored twice
  if (k0 + W <= columns)
    store(row + k0, v);
  else if (k0 < columns)
    store_partial(row + k0, v, columns - k0);
  if (k0 >= 1 && k0 + W - 1 <= twice) {
    store(mirror + n - k0 - W + 1, reversed(v));
  } else if (k0 <= twice) {
    T lanes[W];
    store(lanes, v);
    for (int i = k0 ? 0 : 1; i < W && k0 + i <= twice; ++i) mirror[n - k0 - i] = lanes[i];
  }
}

// Transforms the columns of a block and stores both copies of each number.
template <class T> void Mix<T>::sequence(int64_t batch, const float* from, int64_t block, Complex* work) const {
  Complex* x = (Complex*)(from + block * S * 2 * W);
  const Complex* z = transform(along_s, x, work, work + along_s.work());
  T* to = y + batch * S * N;
  const int64_t k0 = block * 2 * W;
  for (int64_t s = 0; s <= S / 2; ++s) {
    const int64_t minus = s ? S - s : 0;
    const Complex u = z[s], v = z[minus];
    const vfloat even0 = u.re + v.re, odd0 = u.im - v.im, even1 = u.im + v.im, odd1 = v.re - u.re;
    T *row = to + s * N, *mirror = to + minus * N;
    store_both(row, mirror, even0 - odd0, k0, N);
    store_both(row, mirror, even1 - odd1, k0 + W, N);
    if (minus == s) continue;
    store_both(mirror, row, even0 + odd0, k0, N);
    store_both(mirror, row, even1 + odd1, k0 + W, N);
  }
}

// Samples are taken in chunks. A chunk has just enough samples to fill the lanes, so w stays in the cache.
struct Schedule {
  int64_t chunk, chunks;
  int threads;
  int64_t shared, work;  // bytes: w of a chunk; both work arrays of a thread

  template <class T> Schedule(const Mix<T>& m, int64_t B) {
    const int64_t fill = (8 * W + m.pairs() - 1) / m.pairs();
    chunk = B < fill ? B : fill;
    chunks = (B + chunk - 1) / chunk;
    const int64_t groups = (chunk * m.pairs() + W - 1) / W;
    int64_t stages = 1;
    for (int64_t i = 1; i < m.S * m.N; i *= 2) ++stages;
    threads = threads_for(groups, B * m.S * m.N / groups * stages);
    const int64_t longer = m.along_s.work() > m.along_n.work() ? m.along_s.work() : m.along_n.work();
    shared = chunk * m.sample() * (int64_t)sizeof(float);
    work = 2 * longer * (int64_t)sizeof(Complex);
  }
};

template <class T> void mix(Mix<T> m, int64_t B, char* scratch) {
  const auto [chunk, chunks, threads, shared, work] = Schedule(m, B);
  m.w = (float*)scratch;
  parallel_phases(threads, (int)(2 * chunks), [&, chunk = chunk, threads = threads, shared = shared, work = work](
                                                  int phase, int share) {
    const int64_t first = phase / 2 * chunk, batches = B - first < chunk ? B - first : chunk;
    Complex* own = (Complex*)(scratch + shared + share * work);
    if (phase % 2 == 0) {
      const int64_t groups = (batches * m.pairs() + W - 1) / W;
      for (int64_t g = groups * share / threads; g < groups * (share + 1) / threads; ++g)
        m.features(first, batches, g, own);
    } else {
      const int64_t items = batches * m.blocks();
      for (int64_t i = items * share / threads; i < items * (share + 1) / threads; ++i) {
        const int64_t b = i / m.blocks();
        m.sequence(first + b, m.w + b * m.sample(), i % m.blocks(), own);
      }
    }
  });
}

}  // namespace

int64_t fourier_mix_scratch(addr plan_s, addr plan_n, int64_t b, int64_t s, int64_t n) {
  const Plan along_s((const int64_t*)plan_s, nullptr), along_n((const int64_t*)plan_n, nullptr);
  if (!b || !s || !n) return 0;
  const Schedule schedule(Mix<float>{nullptr, nullptr, along_s, along_n, s, n, 0, 0, nullptr}, b);
  return schedule.shared + schedule.threads * schedule.work;
}

void fourier_mix_forward(addr x, addr y, addr scratch, addr plan_s, addr table_s, addr plan_n, addr table_n, int64_t b,
                         int64_t s, int64_t n, int64_t batch_stride, int64_t row_stride, int dtype) {
  if (!b || !s || !n) return;
  const Plan along_s((const int64_t*)plan_s, (const float*)table_s);
  const Plan along_n((const int64_t*)plan_n, (const float*)table_n);
  PYFUSED_BY_DTYPE(dtype, {
    mix(Mix<T>{(const T*)x, (T*)y, along_s, along_n, s, n, batch_stride, row_stride, nullptr}, b, (char*)scratch);
  })
}

}  // namespace pyfused::PYFUSED_ISA
