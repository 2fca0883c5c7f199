"""Are torch.func's transforms, forward-mode derivatives and recorded traces right for every operator?"""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import pyfused
from pyfused.weight_format import INT4


def tensors(*shapes):
    return [0.4 * torch.randn(shape) for shape in shapes]  # small: sines of large numbers would magnify rounding errors


W, B, G, U, D, TABLE = tensors((8,), (8,), (6, 8), (6, 8), (8, 6), (8, 2))
FOURS, SCALE = INT4.quantized(0.2 * torch.randn(6, 32))
CALLS = {
    "layer_norm": lambda x: pyfused.layer_norm(x, W, B, residual=x.sin())[0],
    "rms_norm": lambda x: pyfused.rms_norm(x, W),
    "linear": lambda x: pyfused.linear(x, G, residual=x[..., :6]),
    "linear, int4": lambda x: pyfused.linear(x.repeat_interleave(4, -1), FOURS, scale=SCALE),
    "ffn": lambda x: pyfused.ffn(x, G, None, D, B, activation="gelu"),
    "gated_ffn": lambda x: pyfused.gated_ffn(x, G, U, D, activation="silu"),
    "fourier_mix": lambda x: pyfused.fourier_mix(x),
    "attention": lambda x: pyfused.attention(*x.view(*x.shape[:-1], 2, 4).transpose(-2, -3)[None].expand(3, -1, -1, -1, -1)),
    "attention, T5's bias": lambda x: pyfused.attention(
        *x.view(*x.shape[:-1], 2, 4).transpose(-2, -3)[None].expand(3, -1, -1, -1, -1),
        relative_bias=pyfused.RelativeBias(TABLE, bidirectional=True, max_distance=16),
        padding_mask=torch.tensor([[1, 1, 1, 1, 0]]).expand(x.shape[0], -1),
    ),
}  # fmt: skip


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


def test_vmap(call):
    x = torch.randn(3, 2, 5, 8)
    expected = torch.stack([call(row) for row in x])
    torch.testing.assert_close(vmap(call)(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(vmap(call)(x), expected)


def test_grad_and_forward_mode(call):
    x, direction = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 8)
    (expected,) = torch.autograd.grad(call(x).sin().sum(), x)
    torch.testing.assert_close(grad(lambda x: call(x).sin().sum())(x.detach()), expected)
    with forward_ad.dual_level(), torch.no_grad():
        y = call(forward_ad.make_dual(x.detach(), direction))
        tangent = forward_ad.unpack_dual(y.sin().sum()).tangent
    torch.testing.assert_close(tangent, (expected * direction).sum())


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "linear", "ffn", "gated_ffn"])
def test_forward_mode_of_one_row(name):
    """The statistics of one row are single numbers. Forward mode makes a 0-d tensor plus a number float64."""
    x, direction = torch.randn(8), torch.randn(8)
    value, tangent = jvp(CALLS[name], (x,), (direction,))
    assert value.dtype == tangent.dtype == torch.float32
    torch.testing.assert_close(tangent, jacrev(CALLS[name])(x) @ direction)
    assert hessian(lambda x: CALLS[name](x).sin().sum())(x).dtype == torch.float32


def test_batched_gradients(call):
    """is_grads_batched=True and torch.autograd.functional.jacobian(vectorize=True) have a vmap of their own."""
    x = torch.randn(2, 5, 8, requires_grad=True)
    y = call(x)
    upstream = torch.randn(3, *y.shape)
    expected = torch.stack([torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in upstream])
    (found,) = torch.autograd.grad(y, x, upstream, is_grads_batched=True)
    torch.testing.assert_close(found, expected)


def test_compiled(call):
    """torch.compile runs the function inside the transform's levels; the operators must see them there too."""
    x, direction = torch.randn(2, 5, 8), torch.randn(2, 5, 8)

    def derivatives(x, direction):
        return grad(lambda x: call(x).sin().sum())(x), jvp(call, (x,), (direction,))[1], vmap(call)(x[None])[0]

    torch._dynamo.reset()
    found = torch.compile(derivatives, fullgraph=True, backend="aot_eager")(x, direction)
    for f, e in zip(found, derivatives(x, direction), strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("grad_mode", [False, True])
def test_recorded_by_torch_jit(call, grad_mode):
    """torch.jit's check records the function again without gradients; both graphs must be equal."""
    x = torch.randn(2, 5, 8, requires_grad=grad_mode)
    with torch.set_grad_enabled(grad_mode):
        call(x)  # prepares a launch, which must not run past the tracer
        traced = torch.jit.trace(call, (x,))
        for _ in range(2):
            other = torch.randn_like(x, requires_grad=grad_mode)
            found, expected = traced(other), call(other)
            torch.testing.assert_close(found, expected)
            if grad_mode:
                torch.testing.assert_close(*(torch.autograd.grad(y.sin().sum(), other)[0] for y in (found, expected)))


@pytest.mark.parametrize("grad_mode", [False, True])
def test_recorded_by_make_fx(call, grad_mode):
    x = torch.randn(2, 5, 8)
    with torch.set_grad_enabled(grad_mode):
        call(x)
        traced = make_fx(call)(x)
        assert any("pyfused" in str(node.target) for node in traced.graph.nodes)
        other = torch.randn_like(x)
        torch.testing.assert_close(traced(other), call(other))


@pytest.mark.parametrize("grad_mode", [False, True])
def test_a_profile_names_every_operator(call, grad_mode):
    x = torch.randn(2, 5, 8, requires_grad=grad_mode)
    with torch.set_grad_enabled(grad_mode):
        call(x)
        with torch.profiler.profile() as profile:
            found = call(x)
            if grad_mode:
                found.sin().sum().backward()
    names = {event.name for event in profile.events() if event.name.startswith("pyfused::")}
    assert any("backward" not in name for name in names)
    library = ("fourier", "linear")  # fourier's gradient is itself; linear's are torch's products
    if grad_mode and not any(word in name for name in names for word in library):
        assert any("backward" in name for name in names)


def test_a_mode_sees_every_operator(call):
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    x, names = torch.randn(2, 5, 8), []
    with torch.no_grad():
        expected = call(x)
        with Seen():
            found = call(x)
    assert any(name.startswith("pyfused.") for name in names)
    torch.testing.assert_close(found, expected)
