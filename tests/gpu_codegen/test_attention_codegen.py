"""Does attention compile for its target GPUs: no spills, shared memory that fits, matrix instructions, no gathers?"""

import collections
import dataclasses
import inspect
import re

import pytest
import torch

from pyfused import tiles
from pyfused.kernels.triton import (
    _attention_forward,
    _attention_grad_key_value,
    _attention_grad_query,
    _attention_grad_table,
    _attention_tiles,
)
from pyfused.kernels.triton._attention_configs import block_d, config
from pyfused.testing.triton_compile import TARGETS, Case, check_resources, compile_cases

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
KERNELS = {
    "forward": (_attention_forward, "forward_kernel"),
    "few": (_attention_forward, "forward_kernel"),
    "decode": (_attention_forward, "forward_kernel"),
    "grad_query": (_attention_grad_query, "grad_query_kernel"),
    "grad_key_value": (_attention_grad_key_value, "grad_key_value_kernel"),
    "grad_table": (_attention_grad_table, "grad_table_kernel"),
}
UNALIGNED = ("threshold", "span", "center", "query_length", "key_length", "heads", "key_heads", "sequences", "chunk")
UNALIGNED += ("table_rows", "first_table_row", "first_corner", "count", "parts", "visits")
FLOATS = ("lse_ptr", "stats_ptr", "correction_ptr", "spread_ptr", "tile_ptr", "table_sum_ptr")


def case(kernel, d, kind, target, given="causal"):
    """One kernel with the launcher's options; `given` names those that are on: causal, mask, bias, dropout, relative (T5's
    bias), table (its gradient too) and packed (sequences)."""
    module, function = KERNELS[kernel]
    c = config(
        {"grad_table": "grad_query"}.get(kernel, kernel),
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
    constants["MASKED_STAGES"] = stages if kernel == "few" else _attention_tiles.MASKED_STAGES.value
    constants["BUCKETS"] = 32 if "table" in given else 1
    constants["FEW"] = 0 if kind == "fp32" or ("table" in given and d > 64) else 32
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
    PER_THREAD[title, target] = numbers["BLOCK_M"] * numbers["BLOCK_N"] // (32 * warps)
    BLOCK[title, target] = 32 * warps
    LEAST[title, target] = tiles.least_shared(c.row) if d == c.row.up_to else 0
    return Case(title, f"{module.__name__}:{function}", types, constants, warps, stages, sass=reads_in_place(title))


def reads_in_place(title):
    """Whether the machine code of this case is looked at: reading it takes a second."""
    return "D=64 causal mask relative table" in title and "bf16" in title


PER_THREAD: dict[tuple[str, str], int] = {}  # scores of a tile
BLOCK: dict[tuple[str, str], int] = {}  # threads
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
    yield case("grad_table", 64, "bf16", target, "causal mask relative table")
    yield case("grad_table", 64, "bf16", target, EVERYTHING + " relative table")
    if target == "sm_80":  # sm_90 runs float32 with the same tiles
        yield case("grad_query", 64, "fp32", target, "causal mask dropout relative table")
        yield case("decode", 64, "bf16", target, "causal relative")


@pytest.mark.parametrize("given", ["causal", "causal packed"])
def test_row_stats_come_in_one_copy(given):
    """Without a mask a tile's log-sum-exps and deltas, 64 each, take one copy of each of the 128 threads. They took 32."""
    one = dataclasses.replace(case("grad_key_value", 64, "bf16", "sm_90", given), sass=True)
    compiled = compile_cases([one], "sm_90")[one.name]
    check_resources(compiled, one.name, "sm_90")
    step = loops(compiled.asm["sass"])[0]
    copies = {name: n for name, n in step.items() if name.startswith("LDG") and name != "LDGDEPBAR;"}
    of_rows = 2 * 64 * 64 * 2 // 16 // 128  # of queries and grad_out, 16 bytes a thread
    assert sum(copies.values()) == of_rows + 1, copies
    assert sum(n for name, n in copies.items() if name.endswith("128")) == of_rows, copies


def test_few_blocks_take_short_steps():
    """A warp has fewer instructions a tile than with the forward's tile, and masked tiles come by asynchronous copies too, so
    that a text of two tiles waits for memory once."""
    pair = [case(kernel, 64, "bf16", "sm_90", "causal") for kernel in ("few", "forward")]
    pair.append(case("few", 128, "bf16", "sm_90", "causal mask relative"))
    compiled = compile_cases([dataclasses.replace(each, sass=True) for each in pair], "sm_90")
    for name, each in compiled.items():
        check_resources(each, name, "sm_90")
    few, many = (loops(compiled[each.name].asm["sass"]) for each in pair[:2])
    assert sum(few[0].values()) < 0.7 * sum(many[0].values())
    assert len(few) == 2
    for counts in few:
        assert count(counts, "BAR") <= 2, counts
        assert count(counts, "LDGSTS"), counts
        assert not count(counts, "LDG.E."), counts
        assert count(counts, "HGMMA"), counts


def packed_cases(target):
    yield case("forward", 64, "bf16", target, "causal packed")
    yield case("forward", 64, "bf16", target, "relative packed")
    yield case("grad_query", 64, "bf16", target, "relative table packed")
    yield case("grad_table", 64, "bf16", target, "relative table packed")
    yield case("grad_key_value", 64, "bf16", target, "causal packed")


def loops(sass):
    """{instruction: count} of each innermost loop with a matrix product."""
    return [collections.Counter(line.split()[0] for line in code) for code in bodies(sass)]


def bodies(sass):
    """The instructions, without predicates, of each innermost loop with a matrix product."""
    code, labels, found = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"\s*(LBB\d+):", line):
            labels[label[1]] = len(code)
        elif "\t" in line:
            code.append(re.sub(r"^@!?U?P\w+\s+", "", line.split("\t", 1)[1].strip()))
    for end, line in enumerate(code):
        back = re.match(r"BRA\b.*\b(LBB\d+)", line)
        if back and labels.get(back[1], end) < end:
            found.append((labels[back[1]], end))
    inner = [a for a in found if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in found)]
    return [code[first : end + 1] for first, end in inner if any("MMA" in line for line in code[first : end + 1])]


def count(counts, prefix):
    return sum(n for name, n in counts.items() if name.startswith(prefix))


def check_reads_the_bias_in_place(compiled, name, target):
    """A tile of the bias comes by loads of pairs, at most one for two scores, and no score or exponential is computed twice.
    The gather that this replaced took 33 barriers, a two-byte load a score, and twice the exponentials."""
    found = loops(compiled.asm["sass"])
    assert found, name
    for counts in found:
        assert not count(counts, "LDG.E.U16"), (name, counts)
        assert count(counts, "LDG.E.64") <= PER_THREAD[name, target] // 2, (name, counts)
        assert count(counts, "MUFU.EX2") <= PER_THREAD[name, target] + 4, (name, counts)  # 4: of each row's maximum
        assert count(counts, "BAR") <= 8, (name, counts)
    assert any(count(counts, "LDG.E.64") >= 4 and count(counts, "LDGSTS") for counts in found) or "grad_table" in name
    if target == "sm_90" and name.startswith(("forward", "grad_query")):
        assert 2 * BLOCK[name, target] * compiled.registers <= 65536, (name, compiled.registers)  # two blocks fit
        assert 2 * compiled.shared <= 227 * 1024


@pytest.mark.parametrize("target", TARGETS)
def test_relative_bias_compiles(target):
    for name, compiled in compile_cases(list(relative_cases(target)), target).items():
        check_resources(compiled, name, target)
        if target != "gfx942" and reads_in_place(name):
            check_reads_the_bias_in_place(compiled, name, target)


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
