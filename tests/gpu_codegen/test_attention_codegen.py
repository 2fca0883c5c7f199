"""Does attention compile for its target GPUs: no spills, shared memory that fits, matrix instructions?"""

import inspect

import pytest
import torch

from pyfused import tiles
from pyfused.kernels.triton import (
    _attention_forward,
    _attention_grad_key_value,
    _attention_grad_query,
    _attention_grad_table,
)
from pyfused.kernels.triton._attention_configs import block_d, config
from pyfused.testing.triton_compile import TARGETS, Case, check_resources, compile_cases

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
KERNELS = {
    "forward": (_attention_forward, "forward_kernel"),
    "decode": (_attention_forward, "forward_kernel"),
    "grad_query": (_attention_grad_query, "grad_query_kernel"),
    "grad_key_value": (_attention_grad_key_value, "grad_key_value_kernel"),
    "grad_table": (_attention_grad_table, "grad_table_kernel"),
}
UNALIGNED = ("threshold", "span", "center", "query_length", "key_length", "heads", "key_heads", "sequences", "chunk")
UNALIGNED += ("table_rows", "first_table_row", "first_corner", "count", "parts", "visits")
FLOATS = ("lse_ptr", "delta_ptr", "correction_ptr", "spread_ptr", "tile_ptr", "table_sum_ptr")


def case(kernel, d, kind, target, given="causal"):
    """One kernel with the launcher's options; `given` names those that are on: causal, mask, bias, dropout, relative (T5's
    bias), table (its gradient too) and packed (sequences)."""
    module, function = KERNELS[kernel]
    c = config(
        "grad_query" if kernel == "grad_table" else kernel,
        d,
        DTYPES[kind],
        target,
        ("bias" in given) + ("dropout" in given),
        "relative" in given,
    )
    numbers = dict(c.options)
    warps, stages = numbers.pop("num_warps"), numbers.pop("num_stages")
    constants = {"D": d, "BLOCK_D": block_d(d), **numbers, "GROUP": 1, "stride_bk": 1}
    constants |= {"IS_CAUSAL": "causal" in given, "SCALE_FIRST": "bias" in given.split(), "PACKED": kernel == "decode"}
    constants["START_AT_BIAS"] = "relative" in given and kind != "fp32"
    constants["BUCKETS"] = 32 if "table" in given else 1
    absent = {
        "mask_ptr": "mask" not in given,
        "bias_ptr": "bias" not in given,
        "grad_bias_ptr": "bias" not in given,
        "spread_ptr": "relative" not in given,
        "buckets_ptr": "table" not in given,
        "table_sum_ptr": "table" not in given,
        "seed_ptr": "dropout" not in given,
        "cu_seqlens_ptr": "packed" not in given,
        "sequences": "packed" not in given,
        "correction_ptr": kind != "fp32",
    }
    types = {}
    names = list(inspect.signature(getattr(module, function).fn).parameters)
    for name in names:
        if absent.get(name):
            constants[name] = None
        elif name.endswith("_ptr"):
            special = {"mask_ptr": "*i1:16", "seed_ptr": "*i64:16", "buckets_ptr": "*i32:16"}
            special["cu_seqlens_ptr"] = "*i32:16"
            special |= dict.fromkeys(FLOATS, "*fp32:16")
            types[name] = special.get(name, f"*{kind}:16")
        elif name not in constants:
            types[name] = "i32" if name in UNALIGNED else "i32:16" if name.startswith("stride_") else "fp32"
    constants = {name: value for name, value in constants.items() if name in names}
    title = f"{kernel} {kind} D={d} {given}"
    LEAST[title, target] = tiles.least_shared(c.row) if d == c.row.up_to else 0
    return Case(title, f"{module.__name__}:{function}", types, constants, warps, stages)


LEAST: dict[tuple[str, str], int] = {}  # the least bytes of shared memory for a case, by pyfused.tiles
EVERYTHING = "causal mask bias dropout"


def cases(target):
    yield case("forward", 64, "bf16", target)
    yield case("forward", 128, "fp16", target, EVERYTHING)
    yield case("decode", 64, "bf16", target, "causal mask")
    yield case("grad_query", 64, "bf16", target)
    yield case("grad_key_value", 64, "bf16", target)
    yield case("grad_key_value", 128, "bf16", target, "causal dropout")
    if target == "sm_80":  # sm_90 runs float32 with the same tiles
        yield case("forward", 256, "fp32", target, EVERYTHING)
        yield case("grad_key_value", 64, "fp32", target, EVERYTHING)
    else:
        yield case("forward", 256, "bf16", target, "mask")
        yield case("grad_query", 128, "bf16", target, EVERYTHING)


def relative_cases(target):
    """Cases with T5's bias: an encoder's training, and all options at once."""
    yield case("forward", 64, "bf16", target, "causal mask relative table")
    yield case("grad_query", 64, "bf16", target, "causal mask relative table")
    yield case("grad_key_value", 64, "bf16", target, "causal mask relative table")
    yield case("grad_query", 128, "bf16", target, EVERYTHING + " relative table")
    if target == "sm_80":  # sm_90 runs float32 with the same tiles
        yield case("grad_query", 64, "fp32", target, "causal mask dropout relative table")
        yield case("decode", 64, "bf16", target, "causal relative")


def packed_cases(target):
    yield case("forward", 64, "bf16", target, "causal packed")
    yield case("forward", 64, "bf16", target, "relative packed")
    yield case("grad_query", 64, "bf16", target, "relative table packed")
    yield case("grad_key_value", 64, "bf16", target, "causal packed")


@pytest.mark.parametrize("target", TARGETS)
def test_relative_bias_compiles(target):
    for name, compiled in compile_cases(list(relative_cases(target)), target).items():
        check_resources(compiled, name, target)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_packed_sequences_compile(target):
    for name, compiled in compile_cases(list(packed_cases(target)), target).items():
        check_resources(compiled, name, target)
        on_hopper = target == "sm_90" and "table" not in name
        assert ("wgmma.mma_async" if on_hopper else "mma") in compiled.asm["ptx"], name


@pytest.mark.parametrize("target", TARGETS)
def test_attention_compiles(target):
    for name, compiled in compile_cases(list(cases(target)), target).items():
        check_resources(compiled, name, target)
        assert compiled.shared >= LEAST[name, target]
        if target == "gfx942":
            assert "v_mfma" in compiled.asm["amdgcn"], name
        elif " fp32 " not in name:
            on_hopper = target == "sm_90" and not name.startswith("decode") and "128" not in name
            assert ("wgmma.mma_async" if on_hopper else "mma") in compiled.asm["ptx"], name
