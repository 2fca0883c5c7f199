"""Which peers is pyfused measured beside, and which packages does each need?

A peer of a Case is a function that makes the peer's call. If it raises, the row shows the error. This file has the peers for
single functions and modules, peers_models.py the engines that run whole models.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import dispatch
from .case import Function

# Peer -> packages that it needs. "eager" or "sdpa", plain PyTorch, is in every row.
PEERS: dict[str, tuple[str, ...]] = {
    "eager": (),
    "sdpa": (),
    "triton": ("triton",),
    "cuda": (),
    "compile": (),
    "flash": (),
    "cudnn": (),
    "efficient": (),
    "flex": (),
    "liger": ("liger_kernel",),
    "openvino": ("openvino",),
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "ctranslate2": ("ctranslate2",),
    "ctranslate2-int8": ("ctranslate2",),
    "llama.cpp": ("llama_cpp", "gguf"),
    "llama.cpp-q8_0": ("llama_cpp", "gguf"),
}
# Not in the extra "bench": llama.cpp has no wheel and compiles for many minutes. Package -> what pip installs.
COMPILED = {"llama_cpp": "llama-cpp-python", "gguf": "gguf", "liger_kernel": "liger-kernel"}
_ON_GPU = ("triton", "cuda", "flash", "cudnn", "efficient", "liger")
_ON_CPU = ("openvino", "onnxruntime", "ctranslate2", "ctranslate2-int8", "llama.cpp", "llama.cpp-q8_0")
_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def missing(name: str, device: str) -> str:
    """Why a peer cannot run here, or ""."""
    if name in _ON_GPU and device != "cuda":
        return "runs on a GPU"
    if name in _ON_CPU and device == "cuda":
        return "runs on the CPU here"
    lacking = [package for package in PEERS[name] if importlib.util.find_spec(package) is None]
    how = " ".join(dict.fromkeys(COMPILED.get(package, "'pyfused[bench]'") for package in lacking))
    return f"not installed: {', '.join(lacking)} (pip install {how})" if lacking else ""


def compiled(function: Function) -> dict[str, Callable[[], Function]]:
    """torch.compile of a function or module, for fixed sizes."""

    def make() -> Function:
        torch._dynamo.reset()
        return torch.compile(function, dynamic=False)

    return {"compile": make}


def backends(function: Function) -> dict[str, Callable[[], Function]]:
    """pyfused's own GPU backends, each forced. The call raises if the backend lacks the case."""

    def forced(name: str) -> Function:
        def run(*inputs: Any) -> Any:
            with dispatch.backend(name, strict=True):
                return function(*inputs)

        return run

    return {name: lambda name=name: forced(name) for name in ("triton", "cuda")}  # type: ignore[misc]


def sdpa(**options: Any) -> Function:
    """scaled_dot_product_attention with these options. PyTorch chooses the kernel."""

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *more: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, *more, **options)

    return run


def sdpa_by_name(function: Function) -> dict[str, Callable[[], Function]]:
    """scaled_dot_product_attention by each of PyTorch's kernels. The call raises if the kernel lacks the case."""

    def by_name(backend: SDPBackend) -> Function:
        def run(*inputs: Any) -> Any:
            with sdpa_kernel(backend):
                return function(*inputs)

        return run

    return {name: lambda backend=backend: by_name(backend) for name, backend in _SDPA.items()}  # type: ignore[misc]


def flex(variant: str, shape: tuple[int, ...], bias: Any, device: str) -> dict[str, Callable[[], Function]]:
    """FlexAttention, compiled: plain, causal with a block mask, or with T5's bias looked up by distance."""

    def make() -> Function:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        from ..kernels.shared.buckets import distance_buckets

        torch._dynamo.reset()
        length, mask, score_mod = shape[2], None, None
        if variant == " causal":
            mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=device)
        elif bias is not None:
            buckets = distance_buckets(bias.bidirectional, bias.table.shape[0], bias.max_distance, bias.table.device)
            span, table = buckets.shape[0] // 2, bias.table

            def score_mod(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
                return score + table[buckets[(k - q).clamp(-span, span) + span], h]

        run = torch.compile(flex_attention, dynamic=False)
        return lambda query, key, value, *_: run(query, key, value, score_mod=score_mod, block_mask=mask)

    return {"flex": make}


def liger(operator: str) -> dict[str, Callable[[], Function]]:
    """Liger-Kernel's Triton norm."""

    def make() -> Function:
        if operator == "layer_norm":
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction

            return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, 1e-5)
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return lambda x, weight: LigerRMSNormFunction.apply(x, weight, 1e-6)

    return {"liger": make}
