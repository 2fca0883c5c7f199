"""Does ffn compile for its target GPUs: no spills, tensor cores, 16-byte loads of the streamed weights?"""

import pytest
import torch

from pyfused import tiles
from pyfused.kernels.triton._product import stream_options
from pyfused.testing.triton_compile import TARGETS, Case, check_resources, compile_cases

MODULE = "pyfused.kernels.triton._product"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLAGS = {"HAS_BIAS": True, "HAS_RESIDUAL": True, "SAVE": True, "HAS_SCALE": False, "scale_ptr": None}


def options(kernel, target, kind="bf16", size=0):
    """The launcher's options, with warps and stages."""
    return dict(tiles.find(kernel, target, DTYPES[kind], size).options)


def product(name, kernel, kind, tile, scalars, pointers="", **constants):
    """A case of one of the two product kernels; weights are laid out as in nn.Linear, so w_stride_k is 1."""
    types = {f"{p}_ptr": f"*{kind}:16" for p in ("x", "w", "bias", "residual", "y", "pre")}
    types |= {f"{p}_ptr": "*fp32:16" for p in pointers.split()}
    types |= dict.fromkeys(("n", "k", "x_stride", "w_stride_n", "residual_stride", *scalars), "i32:16")
    types["rows"] = "i32"
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    constants |= {**FLAGS, **tile, "w_stride_k": 1}
    return Case(name, f"{MODULE}:{kernel}", types, constants, warps, stages)


def linear(kind, activation, target):
    tile = options("ffn_linear", target, kind)
    return product(
        f"linear {kind}", "_linear_kernel", kind, tile, (), ACTIVATION=activation, EVEN_K=True, step_ptr=None
    )


def stream(kind, rows, split, activation, target):
    tile = stream_options(rows, tiles.find("ffn_stream", target, DTYPES[kind], rows))
    name = f"stream {kind} {rows}"
    constants = {"SPLIT": split, "ACTIVATION": activation}
    return product(name, "_stream_kernel", kind, tile, ("share",), "partial", **constants)


def others(target):
    tile = options("ffn_combine", target)
    warps = tile.pop("num_warps")
    types = {"partial_ptr": "*fp32:16"} | {f"{p}_ptr": "*bf16:16" for p in ("bias", "residual", "y", "pre")}
    types |= {"parts": "i32", "rows": "i32", "n": "i32:16", "residual_stride": "i32:16"}
    constants = {"ACTIVATION": "none", **FLAGS, "SAVE": False, **tile}
    yield Case("combine", f"{MODULE}:_combine_kernel", types, constants, warps)
    types = {f"{p}_ptr": "*bf16:16" for p in ("pre", "grad", "inner")}
    types |= {"sums_ptr": "*fp32:16", "rows": "i32", "columns": "i32:16"}
    tile = options("ffn_activation_backward", target)
    warps = tile.pop("num_warps")
    yield Case(
        "slope", "pyfused.kernels.triton.ffn:_activation_backward_kernel", types, {"ACTIVATION": "gelu", **tile}, warps
    )


@pytest.mark.parametrize("target", TARGETS)
def test_triton_ffn(target):
    cases = [
        linear("bf16", "gelu_tanh", target),
        linear("fp32", "tanh", target),
        stream("bf16", 1, False, "gelu", target),
        stream("fp32", 1, True, "none", target),
        stream("fp16", 16, True, "none", target),
        stream("fp32", 16, False, "silu", target),
        *others(target),
    ]
    compiled = compile_cases(cases, target)
    for name, result in compiled.items():
        check_resources(result, name, target)
    row = tiles.find("ffn_linear", target, torch.bfloat16).row
    assert compiled["linear bf16"].shared >= tiles.least_shared(row) > 0
    if target == "gfx942":
        assert "v_mfma" in compiled["linear bf16"].asm["amdgcn"]
        return
    tensor_core = "HGMMA" if target == "sm_90" else "HMMA"
    assert tensor_core in compiled["linear bf16"].asm["sass"]
    assert "HMMA" in compiled["stream fp16 16"].asm["sass"]
    for name in ("stream bf16 1", "stream fp32 1", "stream fp16 16", "slope"):
        loads = [line for line in compiled[name].asm["sass"].splitlines() if "LDG" in line]
        assert any(".128" in line for line in loads), f"{name} on {target}: no 16-byte load"
    for name in ("linear fp32", "stream fp32 16"):
        assert "HMMA" not in compiled[name].asm["sass"], f"{name} on {target} multiplies in TF32"
