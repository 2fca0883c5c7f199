"""Does gated_ffn compile for its target GPUs: no spills, tensor cores, 16-byte loads of the streamed weights?"""

import pytest
import torch

from pyfused import tiles
from pyfused.kernels.triton._product import stream_options
from pyfused.testing.triton_compile import TARGETS, Case, check_resources, compile_cases

MODULE = "pyfused.kernels.triton.gated_ffn"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def tensors(kind, names, wide=""):
    """Aligned pointers to the tensors' dtype and to float32."""
    return {f"{p}_ptr": f"*{kind}:16" for p in names.split()} | {f"{p}_ptr": "*fp32:16" for p in wide.split()}


def options(kernel, target, kind="bf16", size=0):
    """(the launcher's options without the warps, the warps)"""
    tile = dict(tiles.find(kernel, target, DTYPES[kind], size).options)
    return tile, tile.pop("num_warps")


def stream(kind, rows, split, activation, target):
    """Weights are laid out as in nn.Linear: strides along k are 1. float16 keeps gate and up; other dtypes keep hidden."""
    tile = stream_options(rows, tiles.find("gated_ffn_stream", target, DTYPES[kind], rows))
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    types = tensors(kind, "x w_gate w_up gate up hidden", "partial") | {"rows": "i32"}
    types |= dict.fromkeys(("n", "k", "share", "x_stride", "w_gate_stride_n", "w_up_stride_n"), "i32:16")
    constants = {"w_gate_stride_k": 1, "w_up_stride_k": 1, "ACTIVATION": activation, "SPLIT": split, **tile}
    constants |= {
        "FACTORS": kind == "fp16",
        "HIDDEN": kind != "fp16",
    }
    return Case(f"stream {kind} {rows}", f"{MODULE}:stream_kernel", types, constants, warps, stages)


def product(target):
    """The fused product of T5-base, if the chip has a tile for it."""
    if found := tiles.find("gated_ffn_product", target, torch.bfloat16, 768):
        types = tensors("bf16", "x w_gate w_up gate up hidden") | {"rows": "i32"}
        types |= dict.fromkeys(("n", "k", "x_stride", "w_gate_stride_n", "w_up_stride_n"), "i32:16")
        tile = dict(found.options)
        warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
        constants = {"w_gate_stride_k": 1, "w_up_stride_k": 1, "ACTIVATION": "gelu_tanh", "FACTORS": False}
        constants |= {"EVEN_K": True, **tile}
        kernel = f"{MODULE.replace('gated_ffn', '_gated_product')}:gated_product_kernel"
        yield Case("product", kernel, types, constants, warps, stages)


def others(target):
    tile, warps = options("gated_ffn_combine", target)
    types = tensors("bf16", "gate up hidden", "partial") | {"parts": "i32", "rows": "i32", "n": "i32:16"}
    constants = {"ACTIVATION": "gelu_tanh", "FACTORS": True, "HIDDEN": True, **tile}
    yield Case("combine", f"{MODULE}:combine_kernel", types, constants, warps)
    tile, warps = options("gated_ffn_gate", target)
    types, constants = {"size": "i32:16"}, {"ACTIVATION": "gelu_tanh", **tile}
    yield Case("gate", f"{MODULE}:gate_kernel", tensors("bf16", "gate up hidden") | types, constants, warps)
    tile, warps = options("gated_ffn_gradients", target)
    constants = {"ACTIVATION": "gelu_tanh", **tile}
    names = "gate up grad_hidden hidden grad_gate grad_up"
    yield Case("gradients bf16", f"{MODULE}:gradients_kernel", tensors("bf16", names) | types, constants, warps)
    narrow = tensors("fp16", "gate up grad_gate grad_up", "grad_hidden hidden")
    yield Case(
        "gradients fp16", f"{MODULE}:gradients_kernel", narrow | types, {**constants, "ACTIVATION": "gelu"}, warps
    )
    types = tensors("fp16", "gate up hidden", "scale") | {"n": "i32:16"}
    tile, warps = options("gated_ffn_gate_scaled", target, size=10240)
    yield Case("scaled", f"{MODULE}:gate_scaled_kernel", types, {"ACTIVATION": "gelu_tanh", **tile}, warps)
    tile, warps = options("gated_ffn_unscale", target)
    types = tensors("fp16", "residual y", "sums scale") | {"n": "i32:16", "residual_stride": "i32:16"}
    yield Case("unscale", f"{MODULE}:unscale_kernel", types, {"HAS_RESIDUAL": True, **tile}, warps)


@pytest.mark.parametrize("target", TARGETS)
def test_triton_gated_ffn(target):
    cases = [
        stream("bf16", 1, False, "gelu_tanh", target),
        stream("fp32", 1, True, "relu", target),
        stream("fp16", 16, False, "silu", target),
        stream("bf16", 16, True, "gelu", target),
        stream("fp32", 16, False, "tanh", target),
        *others(target),
        *product(target),
    ]
    compiled = compile_cases(cases, target)
    for name, result in compiled.items():
        check_resources(result, name, target)
    if target == "gfx942":
        return
    tensor_core = "HGMMA" if target == "sm_90" else "HMMA"
    assert tensor_core in compiled["product"].asm["sass"], f"product on {target}"
    for name in ("stream fp16 16", "stream bf16 16"):
        assert "HMMA" in compiled[name].asm["sass"], f"{name} on {target} uses no tensor core"
    assert "HMMA" not in compiled["stream fp32 16"].asm["sass"], f"stream fp32 on {target} multiplies in TF32"
    for name in set(compiled) - {"combine", "unscale", "stream fp32 16", "stream bf16 16"}:
        loads = [line for line in compiled[name].asm["sass"].splitlines() if "LDG" in line]
        assert any(".128" in line for line in loads), f"{name} on {target}: no 16-byte load"
