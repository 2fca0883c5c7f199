"""Inside torch.autocast, does every operator behave like the torch functions that it replaces?"""

import pytest
import torch
import torch.nn.functional as F

import pyfused
from pyfused.testing import assert_close

HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def heads(x):
    return x.unflatten(-1, (4, 8)).transpose(1, 2)


def attend(function, x, w, **options):
    query, key, value = (heads(F.linear(x, w)) for _ in range(3))
    return function(query, key, value, **options).transpose(1, 2).flatten(2)


def with_table(x, w, b):
    return attend(pyfused.attention, x, w, relative_bias=pyfused.RelativeBias(b.view(8, 4), True, 16))


def with_table_in_torch(x, w, b):
    bias = pyfused.relative_bias(b.view(8, 4), x.shape[1], x.shape[1], bidirectional=True, max_distance=16)
    return attend(F.scaled_dot_product_attention, x, w, attn_mask=bias.to(w.dtype))


def total_and_norm(norm):
    """The sum is an output too: the residual stream for the next layer."""
    return lambda *args: torch.cat(norm(*args))


def layer_norm_after_linear(x, w, b, r):
    y = F.linear(x, w)  # in the autocast dtype, beside a float32 residual
    return (F.layer_norm(y + r, (32,), b, b), y + r)


def own_layer_norm_after_linear(x, w, b, r):
    return pyfused.layer_norm(F.linear(x, w), b, b, residual=r)


def rms_norm_after_linear(x, w, b):
    return F.rms_norm(F.linear(x, w), (32,), b, 1e-6)


# name: (pyfused, torch), functions of x (2, 9, 32), a weight (32, 32), a vector (32,) and a residual, all float32 leaves
CASES = {
    "linear": (lambda x, w, b, r: pyfused.linear(x, w, b), lambda x, w, b, r: F.linear(x, w, b)),
    "linear residual": (
        lambda x, w, b, r: pyfused.linear(x, w, b, residual=r),
        lambda x, w, b, r: F.linear(x, w, b) + r,
    ),
    "ffn residual": (
        lambda x, w, b, r: pyfused.ffn(x, w, b, w, b, activation="gelu", residual=r),
        lambda x, w, b, r: F.linear(F.gelu(F.linear(x, w, b)), w, b) + r,
    ),
    "gated_ffn": (
        lambda x, w, b, r: pyfused.gated_ffn(x, w, w, w, activation="silu"),
        lambda x, w, b, r: F.linear(F.silu(F.linear(x, w)) * F.linear(x, w), w),
    ),
    "attention": (
        lambda x, w, b, r: attend(pyfused.attention, x, w, is_causal=True),
        lambda x, w, b, r: attend(F.scaled_dot_product_attention, x, w, is_causal=True),
    ),
    "attention bias": (
        lambda x, w, b, r: attend(pyfused.attention, x, w, attn_bias=r[0, :, :9]),
        lambda x, w, b, r: attend(F.scaled_dot_product_attention, x, w, attn_mask=r[0, :, :9]),
    ),
    "attention table": (
        lambda x, w, b, r: with_table(x, w, b),
        lambda x, w, b, r: with_table_in_torch(x, w, b),
    ),
    "layer_norm": (lambda x, w, b, r: pyfused.layer_norm(x, b, b), lambda x, w, b, r: F.layer_norm(x, (32,), b, b)),
    "layer_norm of half": (
        lambda x, w, b, r: pyfused.layer_norm(F.linear(x, w), b, b),
        lambda x, w, b, r: F.layer_norm(F.linear(x, w), (32,), b, b),
    ),
    "layer_norm residual": (total_and_norm(own_layer_norm_after_linear), total_and_norm(layer_norm_after_linear)),
    "rms_norm of half": (
        lambda x, w, b, r: pyfused.rms_norm(F.linear(x, w), b),
        lambda x, w, b, r: rms_norm_after_linear(x, w, b),
    ),
    "fourier_mix": (lambda x, w, b, r: pyfused.fourier_mix(x), lambda x, w, b, r: torch.fft.fft2(x).real),
}


def leaves(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    shapes = (2, 9, 32), (32, 32), (32,), (2, 9, 32)
    x, w, b, r = (torch.randn(s, generator=generator, dtype=torch.float32) for s in shapes)
    return [t.to(device, dtype).requires_grad_() for t in (x, w / 32**0.5, b, r)]


def outputs(function, inputs):
    """The result and the gradients of the leaves."""
    y = function(*inputs)
    cotangent = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, inputs, cotangent, allow_unused=True)]


@HALVES
@pytest.mark.parametrize("name", CASES)
def test_as_torch_does(name, half, device):
    own, plain = CASES[name]
    truths = outputs(plain, leaves(device, torch.float64))
    with torch.autocast(device, dtype=half):
        actual, expected = outputs(own, leaves(device)), outputs(plain, leaves(device))
    for i, (a, p, t) in enumerate(zip(actual, expected, truths, strict=True)):
        assert (a is None) == (p is None)
        if a is not None:
            assert a.dtype == p.dtype, f"output {i}"
            assert_close(a, p, t, f"output {i}")


def test_where_it_is_off_mixed_dtypes_are_refused(device):
    x, w, b, _ = leaves(device)
    with torch.autocast(device, dtype=torch.bfloat16), torch.autocast(device, enabled=False):
        assert pyfused.linear(x, w, b).dtype == torch.float32
        with pytest.raises(TypeError, match="weight is bfloat16; it takes x's dtype, float32"):
            pyfused.linear(x, w.bfloat16())
        with pytest.raises(TypeError, match="weight is bfloat16; it takes x's dtype, float32"):
            pyfused.layer_norm(x, b.bfloat16())


def test_bad_input_is_refused_inside_too(device):
    x, w, b, r = leaves(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        with pytest.raises(TypeError, match="x is a list"):
            pyfused.linear([1.0], w)
        with pytest.raises(TypeError, match="weight is int64"):
            pyfused.linear(x, w.long())
        with pytest.raises(TypeError, match="weight is a list"):
            pyfused.rms_norm(x, [1.0])
        for function in (
            lambda r: pyfused.linear(x, w, residual=r),
            lambda r: pyfused.layer_norm(x.half(), b, residual=r),
        ):
            with pytest.raises(ValueError, match="residual has shape"):
                function(r[:1])
            with pytest.raises(TypeError, match="residual is a str"):
                function("r")


def test_float64_is_left_alone(device):
    inputs = leaves(device, torch.float64)
    with torch.autocast(device, dtype=torch.bfloat16):
        for own, plain in CASES.values():
            assert torch.allclose(own(*inputs), plain(*inputs), atol=1e-6)
            assert own(*inputs).dtype == torch.float64


@HALVES
def test_the_table_of_a_bias_and_fourier_mix_keep_their_dtype(half, device):
    x, w, b, _ = leaves(device)
    with torch.autocast(device, dtype=half):
        assert pyfused.fourier_mix(x.to(half)).dtype == half
        for dtype in (torch.float32, torch.bfloat16):
            table = b.view(8, 4).to(dtype)
            assert pyfused.relative_bias(table, 3, 4, bidirectional=False, max_distance=16).dtype == dtype
            out = attend(pyfused.attention, x, w, relative_bias=pyfused.RelativeBias(table, True, 16))
            assert out.dtype == half


def test_products_inside_a_kernel_keep_the_width_they_ask_for(device):
    """float16's gated_ffn and its gradients multiply in float32; under autocast's dtype they would overflow."""
    x, w, w_out = (torch.full(s, v, device=device) for s, v in [((1, 64), 4.0), ((8, 64), 1.0), ((4, 8), 1e-4)])
    for t in (x, w):
        t.requires_grad_()
    with torch.autocast(device, dtype=torch.float16), pyfused.backend("reference"):
        y = pyfused.gated_ffn(x, w, w, w_out, activation="relu")  # 256 * 256 inside
        y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert w.grad.isfinite().all()


def test_one_step_with_a_gradient_scaler(device):
    x, w, b, r = leaves(device)
    other = [t.detach().clone().requires_grad_() for t in (w, b)]
    wide = [t.detach().double().requires_grad_() for t in (w, b)]
    scaler = torch.amp.GradScaler(device, init_scale=2.0**12)
    after = []
    for function, (weight, bias) in (CASES["ffn residual"][0], (w, b)), (CASES["ffn residual"][1], other):
        optimizer = torch.optim.SGD([weight, bias], lr=0.1)
        with torch.autocast(device, dtype=torch.float16):
            loss = function(x.detach(), weight, bias, r.detach()).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        after.append([weight, bias])
    scaler.update()
    assert scaler.get_scale() == 2.0**12  # no overflow was seen and no step skipped
    optimizer = torch.optim.SGD(wide, lr=0.1)
    CASES["ffn residual"][1](x.detach().double(), *wide, r.detach().double()).square().mean().backward()
    optimizer.step()
    for a, p, t in zip(*after, wide):
        assert_close(a, p, t)


@HALVES
def test_compiled_without_a_graph_break(half, device):
    def block(x, w, b, r):
        with torch.autocast(device, dtype=half, enabled=x.dtype != torch.float64):
            y = pyfused.linear(pyfused.layer_norm(x, b, b), w, b, residual=r)
            y, total = pyfused.layer_norm(attend(pyfused.attention, y, w), b, b, residual=y)
            return pyfused.ffn(pyfused.rms_norm(y, b), w, b, w, b, activation="gelu_tanh", residual=total)

    eager = outputs(block, leaves(device))
    compiled = outputs(torch.compile(block, fullgraph=True, backend="aot_eager"), leaves(device))
    for e, c, t in zip(eager, compiled, outputs(block, leaves(device, torch.float64)), strict=True):
        assert e.dtype == c.dtype
        assert_close(c, e, t)
