"""Does layer_norm compile for its target GPUs: no spills, 16-byte accesses, and a row of moderate length within a warp?"""

import re

import pytest
import torch

from pyfused import tiles
from pyfused.kernels.triton._row_norm import of_backward, of_forward
from pyfused.testing.triton_compile import SHARED_LIMIT, TARGETS, Case, check_resources, compile_cases

MODULE = "pyfused.kernels.triton._row_norm"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLAGS = {"HAS_BIAS": True, "HAS_RESIDUAL": True, "SAVE": True, "CENTRED": True}


def signature(pointers, kind, scalars):
    """Aligned pointers to the tensor's dtype (float32 for names that end in *), and scalars that are multiples of 16."""
    types = {f"{p.rstrip('*')}_ptr": "*fp32:16" if p.endswith("*") else f"*{kind}:16" for p in pointers.split()}
    return types | {s: "i32" if s in ("rows", "parts", "steps") else "i32:16" for s in scalars.split()}


def options(kernel, target, n=0):
    """(the launcher's options without the warps, the warps)"""
    tile = dict(tiles.find(f"row_norm_{kernel}", target, size=n).options)
    return tile, tile.pop("num_warps")


def tile_for(kernel, kind, n, target):
    return tiles.find(f"row_norm_{kernel}", target, DTYPES[kind], n)


def forward(kind, n, target):
    tile = of_forward(n, tile_for("forward", kind, n, target))
    warps = tile.pop("num_warps")
    types = signature("x residual weight bias y total mean* rstd*", kind, "rows n x_stride residual_stride")
    constants = {**FLAGS, **tile}
    return Case(f"forward {kind} {n}", f"{MODULE}:forward_kernel", types | {"eps": "fp32"}, constants, warps)


def backward(kind, n, target):
    tile = of_backward(n, DTYPES[kind], tile_for("backward", kind, n, target), tiles.lanes(target))
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    types = signature("grad_y grad_total x weight mean* rstd* grad_x partial*", kind, "rows n x_stride steps")
    constants = {"HAS_TOTAL": True, "HAS_BIAS": True, "CENTRED": True, **tile}
    exact = {"enable_fp_fusion": False}
    return Case(f"backward {kind} {n}", f"{MODULE}:backward_kernel", types, constants, warps, stages, options=exact)


def long_rows(target):
    tile, warps = options("forward_long", target)
    types = signature("x residual weight bias y total mean* rstd*", "fp32", "n x_stride residual_stride")
    yield Case("forward long", f"{MODULE}:forward_long_kernel", types | {"eps": "fp32"}, {**FLAGS, **tile}, warps)
    types = signature("grad_y grad_total x weight mean* rstd* grad_x", "fp32", "n x_stride")
    tile, warps = options("backward_long", target)
    flags = {"HAS_TOTAL": True, "CENTRED": True}
    yield Case("backward long", f"{MODULE}:backward_long_kernel", types, {**flags, **tile}, warps)
    types = signature("grad_y x mean* rstd* partial*", "fp32", "rows n x_stride steps")
    tile, warps = options("column_sums", target)
    flags = {"HAS_BIAS": True, "CENTRED": True}
    yield Case("columns", f"{MODULE}:column_sums_kernel", types, {**flags, **tile}, warps)


def reduce(kind, target):
    types = signature("partial* grad_weight grad_bias", kind, "parts n")
    tile, warps = options("reduce", target, 768)
    return Case("reduce", f"{MODULE}:reduce_kernel", types, {"HAS_BIAS": True, **tile}, warps)


def cases(target):
    return [
        forward("bf16", 768, target), forward("bf16", 4096, target), forward("bf16", 16384, target),
        backward("bf16", 256, target), backward("bf16", 768, target), backward("fp32", 1024, target),
        backward("fp32", 4096, target), backward("fp16", 8192, target),
        *long_rows(target), reduce("bf16", target),
    ]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_triton_layer_norm(target):
    for name, compiled in compile_cases(cases(target), target).items():
        check_resources(compiled, name, target)
        if target != "gfx942" and name != "reduce":  # LDG.E.128 or LDG.E.EF.128 and the like; LDGSTS copies to shared memory
            loads = [line for line in compiled.asm["sass"].splitlines() if "LDG" in line and ".128" in line]
            assert loads, f"{name} on {target}: no 16-byte load"
        if target != "gfx942" and name in WITHIN_A_WARP:
            ptx = compiled.asm["ptx"]
            assert "bar.sync" not in (ptx if name.startswith("forward") else loops(ptx)), f"{name} on {target}"
        if target != "gfx942" and name in AHEAD:
            check_copies(compiled, target, *AHEAD[name])


# Their rows are summed by shuffles alone. A backward adds its warps' sums after its loop.
WITHIN_A_WARP = ("forward bf16 768", "forward bf16 4096", "backward bf16 256")
# These copy the next rows to shared memory while they sum.
AHEAD = {"backward bf16 768": ("bf16", 768), "backward fp32 1024": ("fp32", 1024), "backward fp32 4096": ("fp32", 4096)}


def check_copies(compiled, target, kind, n):
    """A step's rows are all copied, none is loaded; and the programs that the tile starts fit on a multiprocessor."""
    loop = loops(compiled.asm["ptx"])
    assert "cp.async.cg.shared.global" in loop, f"{kind} {n} on {target}"
    assert "ld.global" not in loop, f"{kind} {n} on {target}"
    tile = tile_for("backward", kind, n, target)
    programs = tile.row.tile["PER_PROCESSOR"]
    registers = (compiled.registers + 7) // 8 * 8 * 32 * tile.options["num_warps"]
    assert programs * registers <= 65536, f"{kind} {n} on {target}: {compiled.registers} registers"
    assert programs * (compiled.shared + 1024) <= SHARED_LIMIT[target] + 1024, f"{kind} {n} on {target}"


def loops(ptx):
    """The text of a kernel's loops."""
    found = re.findall(r"^(\$L__BB\w+):(.*?\bbra(?:\.uni)?\s+\1;)", ptx, re.MULTILINE | re.DOTALL)
    assert found
    return "".join(body for _, body in found)
