"""Are gradients' products in half precision right in float32 too, and taken there where that is faster?"""

import pytest
import torch
from evidence_cases import empty_cache, row
from torch.fx.experimental.proxy_tensor import make_fx

import pyfused
from pyfused import evidence as evidence_of
from pyfused.dispatch import forget
from pyfused.evidence import storage
from pyfused.kernels.shared import product
from pyfused.testing import assert_close

HALF = [torch.bfloat16, torch.float16]
# (M, K, N): a gradient of x, of a weight, of a vocabulary
SIZES = [(1, 1, 1), (5, 40, 7), (64, 300, 24), (300, 5, 40), (3, 900, 20), (900, 3, 20), (0, 4, 5), (4, 0, 5)]


@pytest.fixture
def evidence(tmp_path, monkeypatch):
    with empty_cache(tmp_path, monkeypatch) as write:
        yield write


@pytest.mark.parametrize("part", [1 << 18, 1000], ids=["at once", "in parts"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("m, k, n", SIZES)
def test_in_float32(m, k, n, dtype, part, monkeypatch):
    monkeypatch.setattr(product, "_PART", part)
    a, c = (torch.randn(k, m).to(dtype).t() for _ in range(2))  # as a weight's gradient has it
    b, d = (torch.randn(k, n).to(dtype) for _ in range(2))
    for given in ((a, b), (a, b, c, d)):
        found = product.in_float32(*given)
        truth = product.plain_product(*(t.double() for t in given))
        assert found.dtype == dtype
        assert_close(found, product.plain_product(*given), truth)
        torch.testing.assert_close(found, truth.to(dtype))  # one rounding


def calls_of(dtype, rows=24, width=40):
    """Each operator's gradients, and the same by plain PyTorch."""
    x, weight, up, out = (torch.randn(n, width).to(dtype) for n in (rows, width, width, width))
    weight, up, out = (w * width**-0.5 for w in (weight, up, out))
    yield "linear", (x, weight), pyfused.linear, torch.nn.functional.linear
    for name, weights in ("ffn", (weight, out)), ("gated_ffn", (weight, up, out)):

        def own(x, *weights, name=name):
            if name == "ffn":
                return pyfused.ffn(x, weights[0], None, weights[1], None, activation="gelu_tanh")
            return pyfused.gated_ffn(x, *weights, activation="gelu_tanh")

        def plain(x, *weights, name=name):
            inner = torch.nn.functional.gelu(x @ weights[0].t(), approximate="tanh")
            return (inner if name == "ffn" else inner * (x @ weights[1].t())) @ weights[-1].t()

        yield name, (x, *weights), own, plain


def gradients(function, tensors):
    tensors = [t.clone().requires_grad_() for t in tensors]
    y = function(*tensors)
    return torch.autograd.grad(y, tensors, torch.ones_like(y))


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients(dtype, slow, monkeypatch, evidence):
    monkeypatch.setattr(product, "is_slow", lambda dtype: slow)
    for name, tensors, own, plain in calls_of(dtype):
        found, near = gradients(own, tensors), gradients(plain, tensors)
        for i, truth in enumerate(gradients(plain, [t.double() for t in tensors])):
            assert_close(found[i], near[i], truth, f"{name}, gradient {i}")


def ways(monkeypatch):
    """Gets the sizes of each product in float32."""
    taken = []

    def noted(*given):
        taken.append(tuple(given[0].shape))
        return product.plain_product(*given)

    monkeypatch.setattr(product, "in_float32", noted)
    return taken


@pytest.mark.parametrize("operator", ["linear", "ffn", "gated_ffn"])
def test_all_products_of_a_slow_dtype_are_in_float32(operator, monkeypatch, evidence):
    taken = ways(monkeypatch)
    tensors, own = next((tensors, own) for name, tensors, own, _ in calls_of(torch.bfloat16) if name == operator)
    monkeypatch.setattr(product, "is_slow", lambda dtype: True)
    gradients(own, tensors)
    assert len(taken) == {"linear": 2, "ffn": 4, "gated_ffn": 5}[operator]  # the two that gated_ffn's grad_x adds are one
    taken.clear()
    gradients(own, [t.float() for t in tensors])
    with pyfused.backend("reference"):
        gradients(own, tensors)
    assert not taken


def test_evidence_decides_where_plain_pytorch_has_instructions(monkeypatch, evidence):
    taken = ways(monkeypatch)
    monkeypatch.setattr(product, "is_slow", lambda dtype: False)
    a, b = torch.randn(8, 400).bfloat16(), torch.randn(400, 400).bfloat16()
    slower = [row("linear", "float16", "large", function="backward", **{"8": 0.5})]
    slower.append(row("linear", "bfloat16", "small", function="backward", **{"8": 0.5}))
    evidence(*slower, row("linear", "bfloat16", "large", function="backward", **{"8": 0.5, "64": 1.5}))
    product.product(a, b)
    assert not taken
    many = a.repeat(8, 1)
    product.product(many, b)
    product.product(many.t(), many)  # of a weight
    assert taken == [(64, 400), (400, 64)]
    product.product(many, b[:, :7])  # small
    product.product(many.half(), b.half())
    assert len(taken) == 2


def test_a_similar_processor_s_evidence_does_not_count(monkeypatch, evidence, tmp_path):
    """Instructions for half precision differ most between processors."""
    taken = ways(monkeypatch)
    monkeypatch.setattr(product, "is_slow", lambda dtype: False)
    line, a = row("linear", function="backward", dtype="bfloat16", **{"8": 2.0}), torch.randn(8, 8).bfloat16()
    path = evidence(line)
    product.product(a, a)
    assert len(taken) == 1
    similar = path.rename(tmp_path / "similar.json")
    monkeypatch.setattr(storage, "files", lambda device="cpu": [path, similar])
    forget()
    product.product(a, a)
    assert len(taken) == 1


@pytest.mark.parametrize("operator", ["linear", "ffn", "gated_ffn"])
def test_batched_gradients_in_parts(operator, monkeypatch, evidence):
    """torch.autograd.grad(is_grads_batched=True) runs the backward under vmap."""
    monkeypatch.setattr(product, "is_slow", lambda dtype: True)
    monkeypatch.setattr(product, "_PART", 100)
    _, tensors, own, plain = next(row for row in calls_of(torch.bfloat16) if row[0] == operator)
    grads = torch.randn(3, len(tensors[0]), 40).bfloat16()

    def batched(function, dtype):
        given = [t.to(dtype).requires_grad_() for t in tensors]
        return torch.autograd.grad(function(*given), given, grads.to(dtype), is_grads_batched=True)

    for found in zip(batched(own, torch.bfloat16), batched(plain, torch.bfloat16), batched(plain, torch.float64), strict=True):
        assert_close(*found)


@pytest.mark.parametrize("slow", [True, False])
def test_traced_with_sizes_that_change(slow, monkeypatch, evidence):
    """The choice is that of the traced call and assumes nothing of later ones."""
    monkeypatch.setattr(product, "is_slow", lambda dtype: slow)
    evidence(row("linear", function="backward", dtype="bfloat16", shapes="small", **{"8": 1.5}))

    def step(x, weight):
        x = x.detach().requires_grad_()
        y = pyfused.linear(x, weight)
        return torch.autograd.grad(y, x, torch.ones_like(y))[0]

    weight = torch.randn(6, 16).bfloat16()
    traced = make_fx(step, tracing_mode="symbolic")(torch.randn(8, 16).bfloat16(), weight)
    assert torch.float32 in [node.kwargs.get("dtype") for node in traced.graph.nodes]
    for rows in (8, 21):
        x = torch.randn(rows, 16).bfloat16()
        torch.testing.assert_close(traced(x, weight), step(x, weight))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_is_slow_measures_real_products_in_a_trace(dtype):
    seen = []
    make_fx(lambda x: seen.append(product.is_slow.__wrapped__(dtype)) or x, tracing_mode="symbolic")(torch.randn(3))
    assert [type(one) for one in seen] == [bool]


def test_the_forward_s_kernel_runs_where_plain_pytorch_is_slow(monkeypatch, evidence):
    """Whatever a processor with instructions has shown. By columns too, which else has to be measured first."""
    evidence(*(row(dtype="bfloat16", shapes=f"small{more}", **{"16": 0.5}) for more in ("", ", by columns, many rows")))
    x, w = torch.randn(16, 8).bfloat16(), torch.randn(8, 8).bfloat16()
    for slow, expected in (False, "by PyTorch's own code"), (True, ""):
        monkeypatch.setattr(product, "is_slow", lambda dtype, slow=slow: slow)
        forget()
        for weight in w, w.t():
            said = str(pyfused.explain("linear", x, weight))
            assert ("by PyTorch's own code" in said) == bool(expected), said
    with evidence_of.one_way(library=True):  # as `pyfused tune` measures it
        assert "asked for" in str(pyfused.explain("linear", x, w))
