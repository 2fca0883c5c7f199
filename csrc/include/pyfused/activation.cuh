// What are the activations and their derivatives on a GPU, in float32? The formulas of activation.h, on one number.
//
// activate(code, x), and activate_gradient(code, x, g) = g times the derivative at x. The formulas avoid cancellation.
// NaN stays NaN. At infinity, and where x^2 overflows, the results are the mathematical limits. Infinity times zero is
// NaN, so a factor x that may meet a zero is bounded first. fmaf is written out, so the host rounds like the GPU. A
// launch has one code: the switch costs a few cycles and saves a copy of each kernel per activation.
#pragma once

#include "pyfused/activation_codes.h"
#include "pyfused/device.cuh"

namespace pyfused {

// Bounds for x. Beyond them every activation is at its limit in float32. NaN stays NaN.
constexpr float kFar = 128.0f;
__device__ inline float not_below(float x) { return x < -kFar ? -kFar : x; }
__device__ inline float bounded(float x) { return x > kFar ? kFar : not_below(x); }

// The logistic function s(z) and 1 - s(z) = s(-z); through e^-|z|, so neither overflows nor cancels.
struct Logistic {
  float s, rest;
  __device__ explicit Logistic(float z) {
    // Their sum is exactly 1. Otherwise their errors would not cancel near the zero of silu's derivative.
    const float e = expf(-fabsf(z)), far = e / (1.0f + e), near = 1.0f - far;
    s = z < 0 ? far : near;
    rest = z < 0 ? near : far;
  }
};

// The normal distribution: its smaller tail P(-|x|), and e^(-x^2 / 2).
struct Normal {
  float tail, bell;
  __device__ explicit Normal(float x) {
    // erfc(a) = e^(-a^2) (1 + u Q(u)), u = t - 1, t = 1 / (1 + 0.36 a), a = |x| / sqrt(2): as in Abramowitz and Stegun
    // 7.1.26, but exact at zero. Q is fitted for the least relative error, 1.4e-8 over 0 <= a <= 11; further out
    // e^(-a^2) is zero.
    const float a = fabsf(bounded(x)) * (0.36f * 0.70710678118654752f);
    const float u = -a / (1.0f + a);
    float q = 0.06780595085f;
    q = fmaf(q, u, 0.2434261216f);
    q = fmaf(q, u, 0.1901682835f);
    q = fmaf(q, u, -0.313721754f);
    q = fmaf(q, u, -0.2943513386f);
    q = fmaf(q, u, 1.412080039f);
    q = fmaf(q, u, 3.825432111f);
    q = fmaf(q, u, 4.581632069f);
    q = fmaf(q, u, 3.134385452f);
    bell = expf(-0.5f * x * x);
    tail = fmaf(0.5f * u, q, 0.5f) * bell;
  }
};

// 2 sqrt(2 / pi) (x + 0.044715 x^3): gelu_tanh is x (1 + tanh u) / 2 = x s(2 u).
__device__ inline float twice_u(float x) { return x * 1.5957691216057308f * fmaf(x * x, 0.044715f, 1.0f); }

__device__ inline float silu_gradient(float x, float g) {
  const Logistic l(x);
  return g * fmaf(bounded(x) * l.s, l.rest, l.s);
}

__device__ inline float activate(int code, float x) {
  switch (code) {
    case kRelu: return x < 0 ? 0.0f : x;
    case kSilu: return not_below(x) / (1.0f + expf(-x));
    case kTanh: return tanhf(x);
    case kGelu: {
      const Normal n(x);
      const float near = bounded(x);
      return x < 0 ? near * n.tail : fmaf(-near, n.tail, x);
    }
    case kGeluTanh: return not_below(x) / (1.0f + expf(-twice_u(x)));
    case kQuickGelu: return not_below(x) / (1.0f + expf(-1.702f * x));
    default: return x;
  }
}

__device__ inline float activate_gradient(int code, float x, float g) {
  switch (code) {
    case kRelu: return x <= 0 ? 0.0f : g;
    case kSilu: return silu_gradient(x, g);
    case kTanh: {  // both forms are 1 / cosh^2
      if (fabsf(x) < 1.0f) {
        const float t = tanhf(x);
        return g * fmaf(-t, t, 1.0f);
      }
      const float e = expf(-2.0f * fabsf(x)), r = 1.0f / (1.0f + e);
      return g * (4.0f * e * r * r);
    }
    case kGelu: {
      const Normal n(x);
      return g * fmaf(bounded(x), n.bell * 0.3989422804014327f, x < 0 ? n.tail : 1.0f - n.tail);
    }
    case kGeluTanh: {
      const float near = bounded(x);
      const Logistic l(twice_u(near));
      const float slope = 1.5957691216057308f * fmaf(near * near, 3 * 0.044715f, 1.0f);
      return g * fmaf(near * slope * l.s, l.rest, l.s);
    }
    case kQuickGelu: return silu_gradient(1.702f * x, g);  // quick_gelu(x) is silu(c x) / c
    default: return g;
  }
}

}  // namespace pyfused
