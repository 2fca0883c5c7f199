"""What are the activations and their derivatives, in float32, inside a Triton kernel?

gelu_tanh uses the logistic function, 0.5 (1 + tanh u) = 1 / (1 + exp(-2u)), which keeps its digits where tanh u is near
-1. Near zero tanh is a polynomial with a relative error below one rounding; 1 - 2 / (exp(2x) + 1) would lose digits. NaN
stays NaN. At infinity, and where x^2 overflows, the results are the mathematical limits: a factor of zero gives zero,
although infinity times zero is NaN.
GELU: Hendrycks and Gimpel 2016 (arXiv:1606.08415).
"""

import triton
import triton.language as tl


@triton.jit
def _scaled(factor, x):
    """factor x, but 0 where the factor is 0, even if x is infinite."""
    return tl.where(factor == 0.0, 0.0, factor * x)


@triton.jit
def _tanh(x):
    s = x * x
    # tanh(x) / x - 1 over x^2, a minimax fit in x^2 on [0, 0.6^2]: error 3e-9.
    near = -5.905846723e-03
    near = near * s + 2.080536501e-02
    near = near * s - 5.378667741e-02
    near = near * s + 1.333195816e-01
    near = near * s - 3.333329927e-01
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.6, x + x * (s * near), tl.where(x < 0, -far, far))


@triton.jit
def _logistic(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _logistic_with_slope(x):
    """(p, p (1 - p)) from the smaller of p and 1 - p. The larger is 1 minus the smaller and loses nothing. Then silu's errors
    cancel near the zero of its derivative."""
    e = tl.exp(-tl.abs(x))
    smaller = e / (1.0 + e)
    larger = 1.0 - smaller
    return tl.where(x < 0, smaller, larger), smaller * larger


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """activation(x) for float32 x; "none" gives x."""
    if ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)  # NaN stays NaN
    elif ACTIVATION == "silu":
        return _scaled(_logistic(x), x)
    elif ACTIVATION == "tanh":
        return _tanh(x)
    elif ACTIVATION == "gelu":
        return _scaled(0.5 * (1.0 + tl.erf(x * 0.7071067811865476)), x)
    elif ACTIVATION == "gelu_tanh":
        return _scaled(_logistic(1.5957691216057308 * (x + 0.044715 * x * x * x)), x)
    elif ACTIVATION == "quick_gelu":
        return _scaled(_logistic(1.702 * x), x)
    else:
        return x


@triton.jit
def activate_with_slope(x, ACTIVATION: tl.constexpr):
    """(activation(x), its derivative) for float32 x."""
    if ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x), tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        p, slope = _logistic_with_slope(x)
        return _scaled(p, x), p + _scaled(slope, x)
    elif ACTIVATION == "tanh":
        t = _tanh(x)
        return t, 1.0 - t * t
    elif ACTIVATION == "gelu":
        p = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return _scaled(p, x), p + _scaled(0.3989422804014327 * tl.exp(-0.5 * x * x), x)
    elif ACTIVATION == "quick_gelu":
        p, slope = _logistic_with_slope(1.702 * x)
        return _scaled(p, x), p + _scaled(slope, 1.702 * x)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        p, slope = _logistic_with_slope(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return _scaled(p, x), p + _scaled(slope, x * (1.5957691216057308 * (1.0 + 0.134145 * x * x)))
