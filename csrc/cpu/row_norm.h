// What do layer_norm and rms_norm share on the CPU? One pass over a row for each statistic, then one that writes it.
//
// total = x + residual; y = (total - mean) * rstd * weight + bias. CENTRED means layer_norm, which subtracts the mean and
// may add a bias; rms_norm does neither. Statistics are float32. Reads x (and residual) once, writes y (and total) once;
// later passes over a row hit L1/L2. A row takes about 8 N float operations (5 N without a mean), so memory bounds one
// core from N = 768 on.
// Backward: dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + the gradient of `total`, with g = dy * weight; mean(g)
// only if CENTRED. The weights' gradients are summed in chains of rows, then per thread share, then in share order
// (repeatable for one thread count).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>

#include "pyfused/parallel.h"
#include "pyfused/simd.h"

namespace pyfused::PYFUSED_ISA {

// Only CENTRED has bias and mean. X is float for decode, whose activations are float32 beside weights of any dtype.
template <class T, bool CENTRED, class X = T> struct Forward {
  const X *x, *residual;
  const T *weight, *bias;
  X *y, *total;
  float *mean, *rstd;
  int64_t n, x_stride, residual_stride;
  float eps;

  // A row is summed in blocks of so many elements: a longer chain of additions loses bits.
  static constexpr int64_t kBlock = 1024;

  // Calls step(k, i) for every whole vector i from `begin` to `end`, with k = 0..3 in turn. With four accumulators a sum is
  // bound by loads, not by the four cycles of an addition. Returns the start of the last, partial vector.
  template <class Step> PYFUSED_INLINE int64_t vectors(int64_t begin, int64_t end, Step step) const {
    int64_t i = begin;
    for (; i + 4 * kWidth <= end; i += 4 * kWidth) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) step(k, i + k * kWidth);
    }
    for (; i + kWidth <= end; i += kWidth) step(0, i);
    return i;
  }

  template <class Step> PYFUSED_INLINE int64_t vectors(Step step) const { return vectors(0, n, step); }

  int64_t block_end(int64_t begin) const { return begin + kBlock < n ? begin + kBlock : n; }

  // Writes x + residual, rounded to X because the next layer reads it, and returns the row to normalise. total may be x.
  const X* add_residual(int64_t r) const {
    const X *px = x + r * x_stride, *pr = residual + r * residual_stride;
    X* pt = total + r * n;
    const int64_t i = vectors([&](int, int64_t i) { store(pt + i, load(px + i) + load(pr + i)); });
    if (i < n) store_partial(pt + i, load_partial(px + i, n - i) + load_partial(pr + i, n - i), n - i);
    return pt;
  }

  void row(int64_t r) const {
    const X* px = residual ? add_residual(r) : x + r * x_stride;
    const float mu = CENTRED ? row_mean(px) : 0.0f;
    vfloat squares{}, rests{};
    int64_t i = 0;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      vfloat square[4] = {}, rest[4] = {};
      i = vectors(begin, block_end(begin), [&](int k, int64_t i) {
        vfloat d = load(px + i);
        if constexpr (CENTRED) d -= mu, rest[k] += d;
        square[k] += d * d;
      });
      squares += (square[0] + square[1]) + (square[2] + square[3]);
      if constexpr (CENTRED) rests += (rest[0] + rest[1]) + (rest[2] + rest[3]);
    }
    float tail_rest = 0, tail_square = 0;
    for (; i < n; ++i) {
      const float d = load_one(px + i) - mu;
      tail_rest += d, tail_square += d * d;
    }
    const float mean_square = (sum_lanes(squares) + tail_square) / n;
    if constexpr (CENTRED) {
      // The mean of the deviations corrects the mean, so a large offset costs no precision.
      const float shift = (sum_lanes(rests) + tail_rest) / n;
      const float variance = mean_square - shift * shift;
      finish(r, px, mu + shift, 1.0f / std::sqrt((!(variance < 0) ? variance : 0) + eps));
    } else {
      finish(r, px, 0.0f, 1.0f / std::sqrt(mean_square + eps));
    }
  }

  float row_mean(const X* px) const {
    vfloat sums{};
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      vfloat sum[4] = {};
      const int64_t end = block_end(begin);
      const int64_t i = vectors(begin, end, [&](int k, int64_t i) { sum[k] += load(px + i); });
      if (i < end) sum[1] += load_partial(px + i, end - i);
      sums += (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
    return sum_lanes(sums) / n;
  }

  // y of a row whose statistics are known.
  void finish(int64_t r, const X* px, float mu, float rs) const {
    auto scaled = [&](vfloat v, vfloat w) __attribute__((always_inline)) { return (CENTRED ? v - mu : v) * rs * w; };
    X* py = y + r * n;
    int64_t i;
    if (CENTRED && bias) {
      i = vectors([&](int, int64_t i) { store(py + i, scaled(load(px + i), load(weight + i)) + load(bias + i)); });
    } else {
      i = vectors([&](int, int64_t i) { store(py + i, scaled(load(px + i), load(weight + i))); });
    }
    if (i < n) {
      const vfloat v = scaled(load_partial(px + i, n - i), load_partial(weight + i, n - i));
      store_partial(py + i, CENTRED && bias ? v + load_partial(bias + i, n - i) : v, n - i);
    }
    if (rstd) rstd[r] = rs;
    if (CENTRED && mean) mean[r] = mu;
  }
};

template <class T, bool CENTRED> struct Backward {
  const T *grad_y, *grad_total, *x, *weight;
  const float *mean, *rstd;
  T* grad_x;
  int64_t n, x_stride;

  void row(int64_t r, float* grad_weight, float* grad_bias) const {
    const T *pg = grad_y + r * n, *px = x + r * x_stride, *pt = grad_total ? grad_total + r * n : nullptr;
    const float mu = CENTRED ? mean[r] : 0.0f, rs = rstd[r];
    vfloat sum_g{}, sum_gx{};
    auto normalised = [&](vfloat v) __attribute__((always_inline)) { return (CENTRED ? v - mu : v) * rs; };
    auto each = [&](auto&& body) {
      int64_t i = 0;
      for (; i + kWidth <= n; i += kWidth)
        body(i, [](const auto* p) { return load(p); }, [](auto* p, vfloat v) { store(p, v); });
      if (i < n) {
        const int64_t rest = n - i;
        body(i, [rest](const auto* p) { return load_partial(p, rest); },
             [rest](auto* p, vfloat v) { store_partial(p, v, rest); });
      }
    };
    each([&](int64_t i, auto get, auto put) {
      vfloat dy = get(pg + i), xhat = normalised(get(px + i)), g = dy * get(weight + i);
      sum_gx += g * xhat;  // zero in the lanes past the end, because dy is
      put(grad_weight + i, get(grad_weight + i) + dy * xhat);
      if constexpr (CENTRED) {
        sum_g += g;
        put(grad_bias + i, get(grad_bias + i) + dy);
      }
    });
    const float mean_g = sum_lanes(sum_g) / n, mean_gx = sum_lanes(sum_gx) / n;
    T* out = grad_x + r * n;
    each([&](int64_t i, auto get, auto put) {
      // g is rounded as in mean_g, so N = 1 gives exactly zero.
      vfloat xhat = normalised(get(px + i)), g = rounded(get(pg + i) * get(weight + i));
      vfloat dx = ((CENTRED ? g - mean_g : g) - xhat * mean_gx) * rs;
      put(out + i, pt ? dx + get(pt + i) : dx);
    });
  }
};

// All rows; arguments as in kernels.h.
template <bool CENTRED>
void normalise_rows(addr x, addr residual, addr weight, addr bias, addr y, addr total, addr mean, addr rstd,
                    int64_t rows, int64_t n, int64_t x_stride, int64_t residual_stride, double eps, int dtype) {
  PYFUSED_BY_DTYPE(dtype, {
    const Forward<T, CENTRED> f{(const T*)x, (const T*)residual, (const T*)weight, (const T*)bias, (T*)y, (T*)total,
                                (float*)mean, (float*)rstd, n, x_stride, residual_stride, (float)eps};
    parallel_chunks(threads_for(rows, 8 * n), rows, [&](int, int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) f.row(r);
    });
  })
}

constexpr int64_t kRowChain = 32;  // rows whose gradients are summed one after another: longer chains lose bits

template <class T, bool CENTRED>
void add_up_rows(const Backward<T, CENTRED>& b, int64_t rows, T* grad_weight, T* grad_bias) {
  const int64_t n = b.n, width = CENTRED ? 2 * n : n;  // sums for the weight, then for the bias
  const int threads = threads_for(rows, 16 * n);
  float* partial = (float*)std::calloc(2 * width * threads, sizeof(float));
  parallel_chunks(threads, rows, [&](int share, int64_t begin, int64_t end) {
    float *total = partial + 2 * width * share, *chain = total + width;
    for (int64_t r = begin; r < end; ++r) {
      b.row(r, chain, chain + n);
      if (r + 1 == end || (r + 1 - begin) % kRowChain == 0)
        for (int64_t i = 0; i < width; ++i) total[i] += chain[i], chain[i] = 0;
    }
  });
  for (int64_t i = 0; i < width; ++i) {
    float sum = 0;
    for (int t = 0; t < threads; ++t) sum += partial[2 * width * t + i];
    if (i < n) store_one(grad_weight + i, sum);
    else if (grad_bias) store_one(grad_bias + i - n, sum);
  }
  std::free(partial);
}

template <bool CENTRED>
void normalise_rows_backward(addr grad_y, addr grad_total, addr x, addr weight, addr mean, addr rstd, addr grad_x,
                             addr grad_weight, addr grad_bias, int64_t rows, int64_t n, int64_t x_stride, int dtype) {
  PYFUSED_BY_DTYPE(dtype, {
    const Backward<T, CENTRED> b{(const T*)grad_y, (const T*)grad_total, (const T*)x, (const T*)weight,
                                 (const float*)mean, (const float*)rstd, (T*)grad_x, n, x_stride};
    add_up_rows(b, rows, (T*)grad_weight, (T*)grad_bias);
  })
}

}  // namespace pyfused::PYFUSED_ISA
