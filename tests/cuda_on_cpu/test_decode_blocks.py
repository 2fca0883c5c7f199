"""Does decode's persistent kernel give the same bits with any number of blocks, in any order, and the right ones?"""

import ctypes
import dataclasses

import decode_cases
import operator_calls
import pytest
import shim
import torch
from draws import check

from pyfused import dispatch, extensions
from pyfused.decode_plan import DecodePlan
from pyfused.kernels.cuda import decode
from pyfused.kernels.shared.decode_plan import CCall, CPlan
from pyfused.ops.decode import run
from pyfused.testing import assert_close, running

if not extensions.emulating_cuda():
    pytest.skip("this machine has a GPU: the kernels run there", allow_module_level=True)


def results(plan, step, backend="cuda", blocks=4, threads=64):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(decode, "multiprocessors", lambda device: blocks)
        patched.setattr(decode, "threads", lambda device: threads)
        plan.prepared.clear()
        with running(backend):
            logits, chosen = run(plan, step)
    return [logits, chosen, *decode_cases.written(step)]


def case(name, dtype, seed=7):
    new = operator_calls.Numbers("cpu", dtype)
    new.generator.manual_seed(seed)
    (rows, keys), options = decode_cases.CASES[name]
    return decode_cases.made(new, rows, keys, **options)


@pytest.mark.parametrize("name", decode_cases.CASES)
def test_any_number_of_blocks_gives_the_same_bits(name):
    plan, step = case(name, torch.bfloat16)
    expected = results(plan, step)
    for blocks, order in [(1, 0), (3, 1), (7, 2), (7, 3)]:
        with shim.order(shim.load(), order):
            for one, other in zip(expected, results(plan, step, blocks=blocks), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0)


def in_dtype(plan, dtype):
    tensors, *rest = plan.leaves()
    return DecodePlan.of_leaves([t if t is None or t.dtype == torch.int8 else t.to(dtype) for t in tensors], *rest)


def as_dtype(step, dtype):
    return step._replace(caches=[t.to(dtype) for t in step.caches], cross=[t.to(dtype) for t in step.cross])


@pytest.mark.parametrize("threads", [64, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", decode_cases.CASES)
def test_many_keys_and_all_threads_of_a_block(name, dtype, threads):
    """Beyond tests/ops/test_decode.py: several chunks of keys, sums that several warps share, rows of 1100 values."""
    seeds = iter(range(100))

    def once():
        plan, step = case(name, dtype, next(seeds))
        truth = results(in_dtype(plan, torch.float64), as_dtype(step, torch.float64), "reference")
        plain = results(plan, step, "reference")
        found = results(plan, step, threads=threads)
        assert torch.equal(found[1], found[0].argmax(-1))
        return {str(i): (found[i], plain[i], truth[i]) for i in range(len(found)) if i != 1}

    check(once, 20)


# More rows than a launch takes; then sources with 4 and with 11 rows each
MANY = {
    "rows": ((19, 20), {"uneven": True, "mask": True, "bias": True}),
    "beams": ((20, 10), {"relative": True, "rms": True, "sources": 5, "source_length": 9}),
    "many beams": ((22, 10), {"sources": 2, "source_length": 9}),
}


@pytest.mark.parametrize("name", MANY)
def test_more_rows_run_in_groups(name, monkeypatch):
    monkeypatch.setitem(decode_cases.CASES, name, MANY[name])
    plan, step = case(name, torch.float32)
    launches, launch = [], shim.load().decode_forward
    monkeypatch.setattr(shim.load(), "decode_forward", lambda *args: launches.append(args) or launch(*args))
    truth = results(in_dtype(plan, torch.float64), as_dtype(step, torch.float64), "reference")
    plain, found = results(plan, step, "reference"), results(plan, step)
    assert len(launches) == {"rows": 3, "beams": 3, "many beams": 4}[name]
    assert torch.equal(found[1], found[0].argmax(-1))
    for i in (0, *range(2, len(found))):
        assert_close(found[i], plain[i], truth[i], f"{name} {i}")


# GPT-2 124M and XL, T5 1.1 base: hidden, heads, inner
SIZES = {"gpt2": (768, 12, 3072), "gpt2 xl": (1600, 25, 6400), "t5 base": (768, 12, 2048)}
SIZES |= {f"{name} by columns": SIZES[name] for name in ("gpt2", "gpt2 xl")}


@pytest.mark.parametrize("dtype", [0, 2])
@pytest.mark.parametrize("name", SIZES)
def test_shared_memory_of_real_models(name, dtype):
    """How many rows fit into the 227 KB of a Hopper chip's block, and into the 163 KB of an A100's."""
    hidden, heads, inner = SIZES[name]
    plan = CPlan(layers=12, hidden=hidden, heads=heads, kv_heads=heads, head_size=64, intermediate=inner)

    def most(limit):
        def fits(rows):
            call = CCall(rows=rows, sources=rows if name == "t5 base" else 0)
            structs = ctypes.addressof(plan), ctypes.addressof(call)
            return shim.load().decode_shared(*structs, 256, name.endswith("columns"), dtype) <= limit * 1024

        return max(filter(fits, range(1, 9)))

    # By columns the sums take 14 KB more in 16 bits, 6 KB more in 32.
    expected = {"gpt2": (8, 6), "gpt2 xl": (4, 2), "t5 base": (8, 8), "gpt2 by columns": (8, 5)}
    expected["gpt2 xl by columns"] = expected["gpt2 xl"]
    assert (most(227), most(163)) == expected[name]


def test_a_graph_needs_no_number_of_the_host():
    """With `places` neither `place` nor `most` is read."""
    plan, step = case("uneven", torch.float32)
    expected = results(plan, step)
    for one, other in zip(expected, results(plan, step._replace(place=10**6, most=10**6)), strict=True):
        assert torch.equal(one, other)


def test_ids_out_of_range_read_the_nearest_row():
    plan, step = case("uneven", torch.float32)
    wild, near = (results(plan, step._replace(tokens=torch.tensor(ids))) for ids in ([-5, 3, 10**12], [0, 3, 202]))
    assert torch.equal(wild[0], near[0])


def reason(plan, step):
    with running("cuda", strict=False):
        args = plan.dtype_and_device, plan, step
        return next(why for row, why in dispatch.judged("decode", "forward", args) if row.backend == "cuda")


def test_what_it_refuses(monkeypatch):
    new = operator_calls.Numbers("cpu", torch.float32)
    assert reason(*decode_cases.made(new, 65, 3)) == "takes at most 64 rows"
    assert "a row of this model does not fit into a block's" in reason(*decode_cases.made(new, 1, 3, inner=65536))
    assert not reason(*decode_cases.made(new, 8, 3, inner=8192))  # in groups of fewer rows
    assert reason(*decode_cases.made(new, 1, 3, head_size=264)) == "takes heads of at most 256"
    plan, step = decode_cases.made(new, 1, 3)
    layer = plan.layers[0]

    def transposed(matrix):
        return matrix._replace(weight=matrix.weight.t().contiguous().t())

    apart = layer.outer._replace(weight=torch.randn(96, 320)[:, ::2])
    for changed, why in [
        (layer._replace(outer=apart), "takes weights whose rows or columns are contiguous"),
        (layer._replace(key=transposed(layer.key)), "query, key and value weights that are all stored by rows or all by"),
        (layer._replace(key=layer.key._replace(scale=torch.ones(96))), "query, key and value weights that are all int8 or"),
    ]:
        assert why in reason(dataclasses.replace(plan, layers=(changed, layer)), step)
    assert "a head whose rows are contiguous" in reason(dataclasses.replace(plan, head=transposed(plan.head)), step)
    many = step._replace(caches=step.caches[:2] * 101, cross=step.caches * 50)
    assert "takes at most 400 keys and values" in reason(dataclasses.replace(plan, layers=(layer,) * 101), many)
    plan, step = decode_cases.made(new, 1, 3)
    monkeypatch.setattr(shim.load(), "decode_blocks", lambda *args: 0)
    assert reason(plan, step) == "the device has no cooperative launch"


def test_only_the_choice_of_a_token_has_a_barrier():
    """Before it floats tell by themselves whether they have come: cooperative.cuh."""
    plan, step = case("relative", torch.float32)
    results(plan, step)
    assert shim.grid_barriers(shim.load()) == ["logits"]
    with running("cuda"):
        run(plan, step._replace(choose=False))
    assert shim.grid_barriers(shim.load()) == []


def test_the_plan_is_copied_once():
    plan, step = case("one row", torch.float32)
    results(plan, step)
    prepared = plan.prepared["cuda"]
    with running("cuda"):
        run(plan, step)
    assert plan.prepared["cuda"] is prepared
    assert prepared.c_plan.layer == prepared.layers.data_ptr()
    assert bytes(prepared.layers.numpy()) == bytes(prepared.c_plan.held[0])
    assert ctypes.sizeof(prepared.c_plan.held[0]) == prepared.layers.numel()
