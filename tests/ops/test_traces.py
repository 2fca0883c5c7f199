"""What do traces by torch.compile and torch.export contain for a public function, and are they right?"""

import pytest
import torch

import pyfused

X, W, B = torch.randn(2, 5, 8), torch.randn(8), torch.randn(8)
INNER, OUTER = torch.randn(16, 8), torch.randn(8, 16)
QUERY, TABLE = torch.randn(2, 2, 5, 4), torch.randn(8, 2)
BIAS = pyfused.RelativeBias(TABLE, True, 20)

CALLS = {
    "layer_norm": lambda: pyfused.layer_norm(X, W, B),
    "layer_norm, residual": lambda: pyfused.layer_norm(X, W, eps=1e-3, residual=X),
    "rms_norm": lambda: pyfused.rms_norm(X, W),
    "rms_norm, residual": lambda: pyfused.rms_norm(X, W, eps=1e-3, residual=X),
    "linear": lambda: pyfused.linear(X, INNER, residual=None),
    "ffn": lambda: pyfused.ffn(X, INNER, None, OUTER, B, activation="gelu_new", residual=X),
    "gated_ffn": lambda: pyfused.gated_ffn(X, INNER, INNER, OUTER, activation="silu"),
    "fourier_mix": lambda: pyfused.fourier_mix(X),
    "attention": lambda: pyfused.attention(QUERY, QUERY, QUERY, is_causal=True, scale=0.3),
    "attention, T5's bias": lambda: pyfused.attention(QUERY, QUERY, QUERY, relative_bias=BIAS),
    "relative_bias": lambda: pyfused.relative_bias(TABLE, 5, 7, bidirectional=True, query_offset=2),
}


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("name", CALLS)
def test_a_compiled_call_is_one_operator(name):
    held = []

    def collect(graph, _):
        held.extend(str(n.target) for n in graph.graph.nodes if str(n.target).startswith("pyfused."))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(CALLS[name], fullgraph=True, backend=collect)()
    assert held == [f"pyfused.{name.partition(',')[0]}_inference{'_sum' * ('residual' in name)}.default"]
    for f, e in zip(as_tuple(found), as_tuple(CALLS[name]()), strict=True):
        assert torch.equal(f, e)


@pytest.mark.parametrize("name", CALLS)
def test_an_exported_program_holds_the_same(name):
    class Model(torch.nn.Module):
        def forward(self, x):
            return (*as_tuple(CALLS[name]()), x)

    for strict in (True, False):
        with torch.no_grad():
            program = torch.export.export(Model(), (X,), strict=strict)
        names = [str(n.target) for n in program.graph.nodes if str(n.target).startswith("pyfused.")]
        assert names == [f"pyfused.{name.partition(',')[0]}_inference{'_sum' * ('residual' in name)}.default"]


def test_an_error_names_the_argument():
    for backend in ("eager", "inductor"):
        torch._dynamo.reset()
        call = torch.compile(lambda: pyfused.layer_norm(X, W[:7], B), fullgraph=True, backend=backend)
        with pytest.raises(RuntimeError, match=r"weight has shape \(7,\); it takes \(N,\) = \(8,\)"):
            call()


ROWS = {"a kernel's": 3, "the library's": 200}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_compiled_products_and_norms(dtype):
    """A compiled program owns the results' memory. The number of rows decides between kernel and library, and the program may
    run on any backend. bfloat16 takes float16's way."""
    weights = [torch.randn(shape, dtype=dtype) / 5 for shape in ((48, 24), (48, 24), (24, 48), (24, 24))]
    bias, weight = torch.randn(24, dtype=dtype), torch.rand(24, dtype=dtype) + 0.5

    def block(x):
        y = pyfused.linear(x, weights[3], bias, residual=x)
        y, total = pyfused.layer_norm(y, weight, bias, residual=x)
        z = pyfused.ffn(y, weights[0], None, weights[2], bias, activation="gelu_tanh", residual=y)
        z, second = pyfused.rms_norm(z, weight, residual=total)
        z = pyfused.gated_ffn(z, *weights[:3], activation="silu", residual=z)
        heads = pyfused.linear(z, weights[3]).view(2, x.shape[1], 3, 8).transpose(1, 2)
        w = pyfused.attention(heads, heads, heads, is_causal=True).transpose(1, 2).reshape(x.shape)
        return pyfused.fourier_mix(w), second

    torch._dynamo.reset()
    call = torch.compile(block, fullgraph=True, dynamic=True)
    for rows in ROWS.values():
        x = torch.randn(2, rows, 24, dtype=dtype)
        with torch.no_grad():
            call(x)
            for backend in ("cpu", "reference"):
                with pyfused.backend(backend):
                    for _ in range(2):  # the second with prepared launches
                        for found, expected in zip(call(x), block(x), strict=True):
                            torch.testing.assert_close(found, expected)
