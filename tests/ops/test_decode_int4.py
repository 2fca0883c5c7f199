"""Is a generation step right with int4 weights? Random plans in every path against the reference in float64."""

from dataclasses import replace

import decode_cases
import operator_calls
import pytest
import torch
from draws import check

from pyfused import dispatch
from pyfused.decode_plan import DecodePlan, Matrix, sizes
from pyfused.ops.decode import run
from pyfused.testing import assert_close, available, running
from pyfused.weight_format import FORMATS, dequantized

BACKENDS = [name for name in available("cpu") if name.partition(":")[0] == "cpu"]
# (rows, keys), options. Widths of an odd number of groups too; the table is int4 as well.
CASES = {
    "one row": ((1, 30), {"bias": True}),
    "gated": ((3, 17), {"gated": True, "rms": True, "relative": True, "sources": 1, "source_length": 9, "kv_heads": 2}),
    "many rows": ((16, 5), {"bias": True, "hidden": 160, "inner": 96, "uneven": True, "mask": True}),
}


def case(name, dtype, seed=3):
    new = operator_calls.Numbers("cpu", dtype)
    new.generator.manual_seed(seed)
    (rows, keys), options = CASES[name]
    return decode_cases.made(new, rows, keys, integers="int4", **options)


def changed(plan, change):
    """The plan with other tensors."""
    tensors, *rest = plan.leaves()
    return DecodePlan.of_leaves([None if t is None else change(t) for t in tensors], *rest)


def in_float64(plan):
    return changed(plan, lambda t: t if t.dtype == torch.int8 else t.double())


def as_dtype(step, dtype):
    return step._replace(caches=[t.to(dtype) for t in step.caches], cross=[t.to(dtype) for t in step.cross])


def results(plan, step, backend):
    with running(backend):
        logits, chosen = run(plan, step)
    return [logits, chosen, *decode_cases.written(step)]


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_a_step(name, backend, dtype):
    seeds = iter(range(100))

    def once():
        plan, step = case(name, dtype, next(seeds))
        plan.check()
        truth = results(in_float64(plan), as_dtype(step, torch.float64), "reference")
        plain, found = results(plan, step, "reference"), results(plan, step, backend)
        assert torch.equal(found[1], found[0].argmax(-1))
        return {str(i): (found[i], plain[i], truth[i]) for i in range(len(found)) if i != 1}

    check(once, 20)


def with_matrices(plan, change):
    """The plan with other matrices: change(name, matrix)."""
    layers = [
        layer._replace(
            **{n: change(n, m) for n, m in layer._asdict().items() if isinstance(m, Matrix) and m.weight is not None}
        )
        for layer in plan.layers
    ]
    table = change("table", plan.token_embedding)
    return replace(plan, layers=tuple(layers), token_embedding=table, head=table)


def test_the_reference_computes_what_the_integers_stand_for():
    """In float64, beside a plan of the dequantised weights."""
    plan, step = case("gated", torch.float32)
    plan, step = in_float64(plan), as_dtype(step, torch.float64)
    plain = with_matrices(plan, lambda _, m: Matrix(dequantized(m.weight, m.scale, torch.float64), m.bias))
    for found, expected in zip(results(plan, step, "reference"), results(plain, step, "reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def int8(n, k):
    weight, scale = FORMATS["int8"].quantized(torch.randn(n, k) * k**-0.5)
    return Matrix(weight, None, scale)


@pytest.mark.cpu_kernels
def test_formats_may_be_mixed(dtype):
    """Layers in int4 beside a table in int8, as quantize_ makes them. A gate and an inner matrix must be alike."""
    plan, step = case("gated", dtype)
    plan = with_matrices(plan, lambda name, m: int8(*sizes(m)) if name in ("table", "output") else m)
    truth = results(in_float64(plan), as_dtype(step, torch.float64), "reference")
    plain, found = results(plan, step, "reference"), results(plan, step, BACKENDS[-1])
    for i in (0, *range(2, len(found))):
        assert_close(found[i], plain[i], truth[i])
    other = with_matrices(plan, lambda name, m: int8(*sizes(m)) if name == "inner" else m)
    reason = dispatch.kernel("cpu", "decode").unsupported_forward(plan.dtype_and_device, other, step)
    assert reason == "takes gate and inner weights that are stored alike"


def test_cuda_says_that_it_takes_none():
    from pyfused.kernels.cuda import decode

    plan, _ = case("one row", torch.float32)
    assert decode._layout(plan) == "takes no int4 weights"


def test_registration():
    plan, step = case("one row", torch.float32)
    test_utils = "test_schema", "test_faketensor"
    torch.library.opcheck(torch.ops.pyfused.decode, (*plan.leaves(), *step), test_utils=test_utils)


def test_a_plan_checks_its_integers():
    plan, _ = case("one row", torch.float32)
    assert sizes(plan.layers[0].inner) == (160, 96)
    for change, message in [
        (lambda m: m._replace(scale=None), r"inner of layer 0 has shape \(160, 48\); it takes \(160, 96\)"),
        (lambda m: m._replace(scale=m.scale.half()), "the scale of inner of layer 0 is torch.float16"),
        (lambda m: m._replace(scale=m.scale[:, :2]), r"the scale of inner of layer 0 has shape \(160, 2\)"),
        (
            lambda m: m._replace(weight=m.weight[:, :32]),
            r"inner of layer 0 has shape \(160, 64\); it takes \(160, 96\)",
        ),
    ]:
        layer = plan.layers[0]._replace(inner=change(plan.layers[0].inner))
        with pytest.raises(ValueError, match=message):
            replace(plan, layers=(layer, *plan.layers[1:])).check()
