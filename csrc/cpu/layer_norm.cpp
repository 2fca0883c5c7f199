// layer_norm on the CPU: total = x + residual; y = (total - mean) * rstd * weight + bias, statistics in float32.
//
// Moves: reads x (and residual) once, writes y (and total) once; the second and third pass over a row hit L1/L2.
// Does: about 8 N float operations a row, so one core is bound by memory from N = 768 on.
// Backward: dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) with g = dy * weight, plus the gradient of `total`;
// weight and bias gradients are summed per thread share, then in share order (repeatable for one thread count).
#include "kernels.h"

#include <cmath>
#include <cstdlib>

#include "pyfused/parallel.h"
#include "pyfused/simd.h"

namespace pyfused::PYFUSED_ISA {
namespace {

template <class T> struct Forward {
  const T *x, *residual, *weight, *bias;
  T *y, *total;
  float *mean, *rstd;
  int64_t n, x_stride, residual_stride;
  float eps;

  // A row of `total` as the rest of the network sees it: rounded to T when it is stored.
  void row(int64_t r, float* scratch) const {
    const T* px = x + r * x_stride;
    const T* pr = residual ? residual + r * residual_stride : nullptr;
    T* pt = total ? total + r * n : nullptr;
    vfloat sum{};
    auto gather = [&](int64_t i, vfloat v) {
      store(scratch + i, v);
      sum += v;
    };
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      vfloat v = load(px + i);
      if (pr) {
        store(pt + i, v + load(pr + i));
        v = load(pt + i);
      }
      gather(i, v);
    }
    if (i < n) {
      vfloat v = load_partial(px + i, n - i);
      if (pr) {
        store_partial(pt + i, v + load_partial(pr + i, n - i), n - i);
        v = load_partial(pt + i, n - i);
      }
      gather(i, v);  // lanes past the end are zero
    }
    const float mu = sum_lanes(sum) / n;
    // What the rounded sum left in the mean comes out as the mean of the deviations.
    vfloat square{}, drift{};
    for (i = 0; i + kWidth <= n; i += kWidth) {
      vfloat d = load(scratch + i) - mu;
      drift += d;
      square += d * d;
    }
    float square_tail = 0, drift_tail = 0;
    for (; i < n; ++i) {
      drift_tail += scratch[i] - mu;
      square_tail += (scratch[i] - mu) * (scratch[i] - mu);
    }
    const float shift = (sum_lanes(drift) + drift_tail) / n;
    const float rs = 1.0f / std::sqrt(std::fmax((sum_lanes(square) + square_tail) / n - shift * shift, 0.0f) + eps);
    T* py = y + r * n;
    for (i = 0; i + kWidth <= n; i += kWidth) {
      vfloat v = (load(scratch + i) - mu - shift) * rs * load(weight + i);
      store(py + i, bias ? v + load(bias + i) : v);
    }
    if (i < n) {
      vfloat v = (load(scratch + i) - mu - shift) * rs * load_partial(weight + i, n - i);
      store_partial(py + i, bias ? v + load_partial(bias + i, n - i) : v, n - i);
    }
    if (mean) mean[r] = mu + shift, rstd[r] = rs;
  }
};

template <class T> struct Backward {
  const T *grad_y, *grad_total, *x, *weight;
  const float *mean, *rstd;
  T* grad_x;
  int64_t n, x_stride;

  void row(int64_t r, float* grad_weight, float* grad_bias) const {
    const T *pg = grad_y + r * n, *px = x + r * x_stride, *pt = grad_total ? grad_total + r * n : nullptr;
    const float mu = mean[r], rs = rstd[r];
    vfloat sum_g{}, sum_gx{};
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
      vfloat dy = get(pg + i), xhat = (get(px + i) - mu) * rs, g = dy * get(weight + i);
      sum_g += g;  // zero in the lanes past the end, because dy is
      sum_gx += g * xhat;
      put(grad_weight + i, get(grad_weight + i) + dy * xhat);
      put(grad_bias + i, get(grad_bias + i) + dy);
    });
    const float mean_g = sum_lanes(sum_g) / n, mean_gx = sum_lanes(sum_gx) / n;
    T* out = grad_x + r * n;
    each([&](int64_t i, auto get, auto put) {
      // g is rounded as it was in mean_g, so that N = 1 gives exactly zero.
      vfloat xhat = (get(px + i) - mu) * rs, g = rounded(get(pg + i) * get(weight + i));
      vfloat dx = (g - mean_g - xhat * mean_gx) * rs;
      put(out + i, pt ? dx + get(pt + i) : dx);
    });
  }
};

}  // namespace

void layer_norm_forward(addr x, addr residual, addr weight, addr bias, addr y, addr total, addr mean, addr rstd,
                        int64_t rows, int64_t n, int64_t x_stride, int64_t residual_stride, double eps, int dtype) {
  PYFUSED_BY_DTYPE(dtype, {
    Forward<T> f{(const T*)x, (const T*)residual, (const T*)weight, (const T*)bias, (T*)y, (T*)total,
                 (float*)mean, (float*)rstd, n, x_stride, residual_stride, (float)eps};
    parallel_chunks(threads_for(rows, 8 * n), rows, [&](int, int64_t begin, int64_t end) {
      float* scratch = (float*)std::malloc((n + kWidth) * sizeof(float));
      for (int64_t r = begin; r < end; ++r) f.row(r, scratch);
      std::free(scratch);
    });
  })
}

void layer_norm_backward(addr grad_y, addr grad_total, addr x, addr weight, addr mean, addr rstd, addr grad_x,
                         addr grad_weight, addr grad_bias, int64_t rows, int64_t n, int64_t x_stride, int dtype) {
  PYFUSED_BY_DTYPE(dtype, {
    Backward<T> b{(const T*)grad_y, (const T*)grad_total, (const T*)x, (const T*)weight, (const float*)mean,
                  (const float*)rstd, (T*)grad_x, n, x_stride};
    const int threads = threads_for(rows, 16 * n);
    float* partial = (float*)std::calloc(2 * n * threads, sizeof(float));
    parallel_chunks(threads, rows, [&](int share, int64_t begin, int64_t end) {
      float* own = partial + 2 * n * share;
      for (int64_t r = begin; r < end; ++r) b.row(r, own, own + n);
    });
    for (int64_t i = 0; i < n; ++i) {
      float w = 0, c = 0;
      for (int t = 0; t < threads; ++t) w += partial[2 * n * t + i], c += partial[2 * n * t + n + i];
      store_one((T*)grad_weight + i, w);
      if (grad_bias) store_one((T*)grad_bias + i, c);
    }
    std::free(partial);
  })
}

}  // namespace pyfused::PYFUSED_ISA
