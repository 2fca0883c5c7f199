"""Does every operator take sizes of 0 like plain PyTorch? Results are empty, gradients zero, and only the bias is left if K is
0. On every backend and in every form such a call visibly runs on the reference."""

import pytest
import torch
import torch.nn.functional as F
from opchecks import check_registered

import pyfused
from pyfused.testing import available, running

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CASES: dict[str, tuple] = {}  # name -> shapes of the inputs, the operator, the same in plain PyTorch


def norm(operator, *shape, residual=False):
    plain = getattr(F, operator)
    n = shape[-1:]
    parameters = [n, n] if operator == "layer_norm" else [n]
    inputs = [shape, *parameters, *([shape] if residual else [])]

    def fused(x, *rest):
        return getattr(pyfused, operator)(x, *rest[: len(parameters)], residual=rest[-1] if residual else None)

    def expected(x, *rest):
        total = x + rest[-1] if residual else x
        y = plain(total, n, *rest[: len(parameters)], eps=1e-5)
        return (y, total) if residual else y

    CASES[f"{operator} {shape}{' residual' * residual}"] = inputs, fused, expected


for operator in ("layer_norm", "rms_norm"):
    for shape in ((0, 8), (3, 0), (2, 0, 8), (0, 0), (0,), (0, 5000)):
        norm(operator, *shape)
    norm(operator, 0, 8, residual=True)
    norm(operator, 3, 0, residual=True)


def products(lead, n, f, m):
    """linear, ffn and gated_ffn of x (*lead, n), with all biases and a residual, and with none."""
    tag = f"{lead} {n} {f} {m}"

    def act(x):
        return F.gelu(x, approximate="tanh")

    if 0 in (*lead, n, m):
        CASES[f"linear {tag}"] = (
            [(*lead, n), (m, n), (m,), (*lead, m)],
            lambda x, w, b, r: pyfused.linear(x, w, b, residual=r),
            lambda x, w, b, r: F.linear(x, w, b) + r,
        )
        CASES[f"linear {tag} weight alone"] = [(*lead, n), (m, n)], pyfused.linear, F.linear
    CASES[f"ffn {tag}"] = (
        [(*lead, n), (f, n), (f,), (m, f), (m,), (*lead, m)],
        lambda x, w, b, v, c, r: pyfused.ffn(x, w, b, v, c, activation="gelu_tanh", residual=r),
        lambda x, w, b, v, c, r: F.linear(act(F.linear(x, w, b)), v, c) + r,
    )
    CASES[f"ffn {tag} weights alone"] = (
        [(*lead, n), (f, n), (m, f)],
        lambda x, w, v: pyfused.ffn(x, w, None, v, None, activation="gelu_tanh"),
        lambda x, w, v: F.linear(act(F.linear(x, w)), v),
    )
    CASES[f"gated_ffn {tag}"] = (
        [(*lead, n), (f, n), (f, n), (m, f), (*lead, m)],
        lambda x, w, u, v, r: pyfused.gated_ffn(x, w, u, v, activation="gelu_tanh", residual=r),
        lambda x, w, u, v, r: F.linear(act(F.linear(x, w)) * F.linear(x, u), v) + r,
    )


for lead in ((3,), (40,), (2, 2), ()):
    for sizes in ((0, 6, 5), (4, 0, 5), (4, 6, 0), (0, 0, 0)):
        products(lead, *sizes)
for lead in ((0,), (2, 0), (0, 300)):
    products(lead, 4, 6, 5)


def attention(b, h, hkv, sq, sk, d, tag="", extra=(), **options):
    """extra: shapes of further inputs; options turn them into arguments."""

    def fused(q, k, v, *rest):
        given = {name: make(*rest) if callable(make) else make for name, make in options.items()}
        return pyfused.attention(q, k, v, **given)

    def expected(q, k, v, *rest):
        # No keys or no queries: zeros that depend on every input, like a product with zero.
        return q.new_zeros(q.shape) + sum(t.sum() * 0 for t in (q, k, v, *rest))

    shapes = [(b, h, sq, d), (b, hkv, sk, d), (b, hkv, sk, d), *extra]
    CASES[f"attention {b} {h}/{hkv} {sq}/{sk} {d}{tag}"] = shapes, fused, expected


def relative(table):
    return pyfused.RelativeBias(table, True, 20)


for b, h, hkv, sq, sk, d in ((0, 4, 2, 3, 3, 8), (2, 0, 0, 3, 5, 8), (2, 0, 3, 3, 5, 8), (2, 4, 2, 0, 5, 8), (2, 4, 2, 3, 0, 8),
                             (2, 4, 4, 64, 0, 8), (2, 4, 2, 3, 5, 0), (0, 2, 2, 70, 70, 64), (0, 0, 0, 0, 0, 0)):  # fmt: skip
    attention(b, h, hkv, sq, sk, d)
    attention(b, h, hkv, sq, sk, d, " bias", [(b, h, sq, sk)], attn_bias=lambda bias: bias, is_causal=True, scale=0.5)
    mask = torch.ones(b, sk, dtype=torch.bool, device=DEVICE)
    attention(b, h, hkv, sq, sk, d, " table", [(8, h)], relative_bias=relative, padding_mask=mask)
for b, sk in ((0, 3), (2, 0)):
    attention(b, 4, 2, 3, sk, 8, " dropout", dropout_p=0.3)
for lengths in ([], [0], [0, 0, 0]):
    ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    attention(1, 4, 2, 0, 0, 8, f" packed {len(lengths)}", cu_seqlens=ends, is_causal=True)
    attention(1, 4, 4, 0, 0, 8, f" packed {len(lengths)} table", [(8, 4)], cu_seqlens=ends, relative_bias=relative)
attention(1, 4, 4, 0, 0, 8, " packed dropout", cu_seqlens=torch.tensor([0, 0], device=DEVICE), dropout_p=0.3, max_seqlen=0)

for h, sq, sk in ((2, 0, 5), (2, 5, 0), (0, 3, 5), (2, 0, 0)):
    CASES[f"relative_bias {h} {sq} {sk}"] = (
        [(8, h)],
        lambda t, sq=sq, sk=sk: pyfused.relative_bias(t, sq, sk, bidirectional=False, max_distance=20, query_offset=3),
        lambda t, sq=sq, sk=sk: t.new_zeros(1, t.shape[1], sq, sk) + t.sum() * 0,
    )
CASES["fourier_mix"] = [(0, 5, 8)], pyfused.fourier_mix, lambda x: x * 1

# The inputs without rows when a batch is empty
ONE_OF_EACH = {
    "layer_norm": "layer_norm (0, 8)", "rms_norm": "rms_norm (0, 8)", "linear": "linear (0,) 4 6 5", "ffn": "ffn (0,) 4 6 5",
    "gated_ffn": "gated_ffn (0,) 4 6 5", "attention": "attention 0 4/2 3/3 8", "relative_bias": "relative_bias 2 0 5",
    "fourier_mix": "fourier_mix",
}  # fmt: skip


def of(operator):
    return [name for name in CASES if name.split()[0] == operator]


def made(name, dtype):
    shapes, fused, expected = CASES[name]
    return [torch.randn(s).to(DEVICE, dtype) for s in shapes], fused, expected


def parts(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def with_gradients(function, inputs):
    """The outputs, and the gradients of all inputs."""
    inputs = [t.clone().requires_grad_() for t in inputs]
    outputs = parts(function(*inputs))
    torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
    return [*(o.detach() for o in outputs), *(t.grad for t in inputs)]


def same(name, found, expected, **tolerance):
    for f, e in zip(found, expected, strict=True):
        assert (f.shape, f.dtype) == (e.shape, e.dtype), name
        torch.testing.assert_close(f, e, msg=lambda text: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("backend", available(DEVICE))
@pytest.mark.parametrize("operator", ONE_OF_EACH)
def test_forward_and_backward(operator, backend):
    for name in of(operator):
        for dtype in DTYPES if backend == "reference" else (torch.float32,):
            inputs, fused, expected = made(name, dtype)
            with running(backend, strict=operator != "relative_bias"):  # no tensor has its sizes
                same(name, with_gradients(fused, inputs), with_gradients(expected, inputs))
                with torch.inference_mode():
                    same(name, parts(fused(*inputs)), parts(expected(*inputs)))


@pytest.mark.parametrize("operator", ONE_OF_EACH)
def test_autocast(operator):
    """Shapes and values equal plain PyTorch's; gradients have the inputs' own dtype."""
    for name in of(operator):
        inputs, fused, expected = made(name, torch.float32)
        with torch.autocast(DEVICE, torch.bfloat16):
            found = with_gradients(fused, inputs)
        same(name, [f.float() for f in found], with_gradients(expected, inputs), atol=0.1, rtol=0.1)
        assert all(f.dtype == torch.float32 for f in found[len(found) - len(inputs) :])


def test_compiled_with_a_batch_that_becomes_empty():
    """torch.compile replaces the program for many batch sizes by one for 0, forward and backward."""

    def chain(x, weight, square, heads):
        y, total = pyfused.layer_norm(x, weight, residual=pyfused.rms_norm(x, weight))
        q = pyfused.linear(y, square).unflatten(-1, (2, 4)).transpose(1, 2)
        y = pyfused.attention(q, q, q, relative_bias=pyfused.RelativeBias(heads, True, 20))
        y = pyfused.fourier_mix(y.transpose(1, 2).flatten(2))
        y = pyfused.ffn(y, square, weight, square, weight, activation="gelu", residual=total)
        return pyfused.gated_ffn(y, square, square, square, activation="silu")

    torch._dynamo.reset()
    program = torch.compile(chain, backend="aot_eager", dynamic=True)
    parameters = [torch.randn(s, device=DEVICE) for s in ((8,), (8, 8), (8, 2))]
    for batch in (3, 0):
        inputs = [torch.randn(batch, 5, 8, device=DEVICE), *parameters]
        same(f"batch {batch}", with_gradients(program, inputs), with_gradients(chain, inputs), rtol=1e-3, atol=1e-3)
    assert all((g == 0).all() for g in with_gradients(program, inputs)[1:])
    torch._dynamo.reset()


REGISTERED = {
    "layer_norm": lambda x: ((x(0, 8), x(8), x(8), 1e-5, x(0, 8), True), {"save": 5, "summed": True}),
    "rms_norm": lambda x: ((x(0, 8), x(8), 1e-5, None, True), {"save": 4}),
    "linear": lambda x: ((x(3, 0), x(4, 0), x(4), None), {}),
    "ffn": lambda x: ((x(3, 4), x(0, 4), x(0), x(5, 0), x(5), "silu", None, True), {"save": 7}),
    "gated_ffn": lambda x: ((x(0, 4), x(6, 4), x(6, 4), x(5, 6), "silu", x(0, 5), True), {"save": 6}),
    "attention": lambda x: (
        (x(2, 4, 3, 8), x(2, 2, 0, 8), x(2, 2, 0, 8), False, None, None, 0.5, 0.0, None, True),
        {"save": 9},
    ),
    "relative_bias": lambda x: ((x(8, 2), 0, 5, True, 20, 0), {}),
    "fourier_mix": lambda x: ((x(0, 3, 4),), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", REGISTERED)
def test_registered_operator(name):
    arguments, options = REGISTERED[name](lambda *shape: torch.randn(shape, device=DEVICE, requires_grad=True))
    check_registered(name, arguments, **options)


@pytest.mark.parametrize("backend", available(DEVICE))
def test_explain_says_that_nothing_is_left_for_a_kernel(backend):
    q = torch.zeros(0, 2, 3, 8, device=DEVICE)
    with running(backend):
        found = pyfused.explain("attention", q, q, q)
    assert found.backend == "reference"
    others = [v for v in found.verdicts if v.backend == backend.partition(":")[0] != "reference"]
    assert all(not v.runs and "is empty" in v.reason for v in others)
    with running(backend):
        assert pyfused.explain("attention", *[torch.zeros(1, 2, 3, 8, device=DEVICE)] * 3).backend in backend


def test_a_full_batch_after_an_empty_one_runs_the_kernel():
    """A launch kept for one signature does not serve another."""
    query = torch.randn(2, 4, 3, 8, device=DEVICE)
    expected = pyfused.attention(query, query, query)
    for batch in (0, 2, 0, 2):
        q = query[:batch]
        assert torch.equal(pyfused.attention(q, q, q), expected[:batch])


def test_what_pytorch_refuses_is_refused():
    x = torch.ones(2, 3, 4, 8, device=DEVICE)
    with pytest.raises(ValueError, match="key has 0 heads"):
        pyfused.attention(x, x[:, :0], x[:, :0])
    for shape in ((2, 0, 4), (2, 4, 0)):
        with pytest.raises(ValueError, match="S >= 1 and N >= 1"):
            pyfused.fourier_mix(torch.ones(shape, device=DEVICE))
    with pytest.raises(ValueError, match="query_length is -1; it takes at least 0"):
        pyfused.relative_bias(x[0, 0], -1, 2, bidirectional=True)
    with pytest.raises(ValueError, match="cu_seqlens has shape"):
        pyfused.attention(*[x[:1, :, :0]] * 3, cu_seqlens=torch.zeros(0, dtype=torch.int32, device=DEVICE))
