// Which activations are there, and what are their derivatives? Each takes one exponential and one division at most.
//
// value(x), and gradient(x, g) = g times the derivative at x. The formulas avoid cancellation: errors stay within a few
// float32 roundings (tests/ops/test_ffn.py walks a dense grid). NaN stays NaN. At infinity, and where x^2 overflows,
// the results are the mathematical limits. Infinity times zero is NaN, so a factor x that may meet a zero is bounded
// first. Results below 1e-36 may be 0.
#pragma once

#include "activation_codes.h"
#include "simd.h"

namespace pyfused::PYFUSED_ISA {

// Runs `call` with A naming the activation.
#define PYFUSED_BY_ACTIVATION(activation, ...)                   \
  switch (activation) {                                          \
    case kIdentity: { using A = Identity; __VA_ARGS__; } break;  \
    case kRelu: { using A = Relu; __VA_ARGS__; } break;          \
    case kSilu: { using A = Silu; __VA_ARGS__; } break;          \
    case kTanh: { using A = Tanh; __VA_ARGS__; } break;          \
    case kGelu: { using A = Gelu; __VA_ARGS__; } break;          \
    case kGeluTanh: { using A = GeluTanh; __VA_ARGS__; } break;  \
    case kQuickGelu: { using A = QuickGelu; __VA_ARGS__; } break; \
  }

PYFUSED_INLINE vfloat magnitude(vfloat x) { return bits_as<vfloat>(bits_as<vuint>(x) & 0x7fffffffu); }

// Bounds for x. Beyond them every activation is at its limit in float32. NaN stays NaN.
constexpr float kFar = 128.0f;
PYFUSED_INLINE vfloat not_below(vfloat x) { return max(splat(-kFar), x); }
PYFUSED_INLINE vfloat bounded(vfloat x) { return min(splat(kFar), not_below(x)); }

// The logistic function s(z) and 1 - s(z) = s(-z); through e^-|z|, so neither overflows nor cancels.
struct Logistic {
  vfloat s, rest;
  PYFUSED_INLINE explicit Logistic(vfloat z) {
    // Their sum is exactly 1. Otherwise their errors would not cancel near the zero of silu's derivative.
    const vfloat e = exp(-magnitude(z)), far = e / (splat(1.0f) + e), near = splat(1.0f) - far;
    s = z < vfloat{} ? far : near;
    rest = z < vfloat{} ? near : far;
  }
};

struct Identity {
  static PYFUSED_INLINE vfloat value(vfloat x) { return x; }
  static PYFUSED_INLINE vfloat gradient(vfloat, vfloat g) { return g; }
};

struct Relu {
  static PYFUSED_INLINE vfloat value(vfloat x) { return x < vfloat{} ? vfloat{} : x; }
  static PYFUSED_INLINE vfloat gradient(vfloat x, vfloat g) { return x <= vfloat{} ? vfloat{} : g; }
};

struct Silu {  // x s(x)
  static PYFUSED_INLINE vfloat value(vfloat x) { return not_below(x) / (splat(1.0f) + exp(-x)); }
  static PYFUSED_INLINE vfloat gradient(vfloat x, vfloat g) {
    const Logistic l(x);
    return g * (l.s * (splat(1.0f) + bounded(x) * l.rest));
  }
};

struct Tanh {
  // Below 0.625 1 - 2 / (e^2x + 1) would cancel, so the odd polynomial of Cephes' tanhf is used.
  static PYFUSED_INLINE vfloat value(vfloat x) {
    const vfloat a = magnitude(x), z = x * x;
    vfloat p = splat(-5.70498872745e-3f);
    p = p * z + splat(2.06390887954e-2f);
    p = p * z + splat(-5.37397155531e-2f);
    p = p * z + splat(1.33314422036e-1f);
    p = p * z + splat(-3.33332819422e-1f);
    p = p * z * x + x;
    const vfloat far = splat(1.0f) - splat(2.0f) / (exp(a + a) + splat(1.0f));
    return a < splat(0.625f) ? p : x < vfloat{} ? -far : far;
  }
  static PYFUSED_INLINE vfloat gradient(vfloat x, vfloat g) {
    const vfloat e = exp(magnitude(x) * splat(-2.0f)), r = splat(1.0f) / (splat(1.0f) + e);
    const vfloat t = value(x);
    return g * (magnitude(x) < splat(1.0f) ? splat(1.0f) - t * t : splat(4.0f) * e * r * r);  // both are 1 / cosh^2
  }
};

struct Gelu {  // x P(x), P the normal distribution, with the smaller of its two tails computed
  vfloat tail, bell;  // P(-|x|), e^(-x^2 / 2)
  // far: |x|, bounded
  PYFUSED_INLINE explicit Gelu(vfloat far) {
    // erfc(a) = e^(-a^2) (1 - v Q(v)), v = 0.32 a / (1 + 0.32 a), a = |x| / sqrt(2): as in Abramowitz and Stegun 7.1.26, but
    // exact at zero. Half of Q is fitted for the least relative error, 8.5e-8 over 0 <= a <= 9.4; further out e^(-a^2) is zero.
    const vfloat a = far * splat(0.32f * 0.70710678118654752f), v = a / (splat(1.0f) + a);
    vfloat q = splat(0.08943241835f);
    q = q * v + splat(-0.3576414287f);
    q = q * v + splat(0.3974160254f);
    q = q * v + splat(0.5367721319f);
    q = q * v + splat(-2.284457922f);
    q = q * v + splat(3.475138664f);
    q = q * v + splat(-3.119684219f);
    q = q * v + splat(1.763092279f);
    bell = exp_below_88(far * far * splat(-0.5f));
    tail = (splat(0.5f) - v * q) * bell;
  }
  static PYFUSED_INLINE vfloat value(vfloat x) {
    const vfloat far = min(splat(kFar), magnitude(x));
    return max(vfloat{}, x) - far * Gelu(far).tail;
  }
  static PYFUSED_INLINE vfloat gradient(vfloat x, vfloat g) {
    const Gelu n(min(splat(kFar), magnitude(x)));
    const vfloat p = x < vfloat{} ? n.tail : splat(1.0f) - n.tail;
    return g * (p + bounded(x) * n.bell * splat(0.3989422804014327f));
  }
};

struct GeluTanh {  // x (1 + tanh u) / 2 = x s(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
  static PYFUSED_INLINE vfloat twice_u(vfloat x) {
    return x * splat(1.5957691216057308f) * (splat(1.0f) + x * x * splat(0.044715f));
  }
  static PYFUSED_INLINE vfloat value(vfloat x) { return not_below(x) / (splat(1.0f) + exp(-twice_u(x))); }
  static PYFUSED_INLINE vfloat gradient(vfloat far, vfloat g) {
    const vfloat x = bounded(far);
    const Logistic l(twice_u(x));
    const vfloat slope = splat(1.5957691216057308f) * (splat(1.0f) + x * x * splat(3 * 0.044715f));
    return g * (l.s * (splat(1.0f) + x * slope * l.rest));
  }
};

struct QuickGelu {  // x s(c x), which is silu(c x) / c
  static PYFUSED_INLINE vfloat scaled(vfloat x) { return x * splat(1.702f); }
  static PYFUSED_INLINE vfloat value(vfloat x) { return not_below(x) / (splat(1.0f) + exp(-scaled(x))); }
  static PYFUSED_INLINE vfloat gradient(vfloat x, vfloat g) { return Silu::gradient(scaled(x), g); }
};

}  // namespace pyfused::PYFUSED_ISA
