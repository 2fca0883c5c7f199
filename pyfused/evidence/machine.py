"""What kind of machine is this? Evidence of one kind holds for every machine of that kind."""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path

import torch

from .. import extensions
from .cache import remembered


@remembered
def kind(device: str = "cpu") -> str:
    """The name of a kind, for "cpu", a GPU such as "cuda:0", or "interpreter" (Triton's, on a CPU). Other devices, such as
    "meta" and "mps", run plain PyTorch and have no evidence; theirs is the device's own name.

    A CPU's name has its vendor and the instruction set of our kernels; then the one that torch uses, if it is another; then the
    half-precision dtypes that the processor multiplies itself; then "amx", if it has instructions for whole matrices:
    "cpu_amd_avx2", "cpu_amd_baseline_torch_avx2", "cpu_intel_avx512_bfloat16_amx". A GPU's name is "cuda_" and its model. The
    interpreter's name is "triton_interpreter".
    """
    if device == "interpreter":
        return "triton_interpreter"
    if device != "cpu":
        if not device.startswith("cuda"):
            return device.partition(":")[0]
        name = torch.cuda.get_device_name(device).lower()
        return f"{device.partition(':')[0]}_{re.sub('[^a-z0-9]+', '_', name)}"
    ours = extensions.base_isa() or "none"
    torchs = torch.backends.cpu.get_cpu_capability().lower()
    parts = ["cpu", _vendor(), ours]
    if torchs != {"baseline": "default"}.get(ours, ours):
        parts.append(f"torch_{torchs}")
    parts += [name_of(dtype) for dtype in (torch.bfloat16, torch.float16) if multiplies_itself(dtype)]
    if torch.cpu._is_amx_tile_supported():  # torch's products of bfloat16 and int8 are many times as fast there
        parts.append("amx")
    return "_".join(parts)


@functools.cache
def _vendor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    for word, vendor in (("AuthenticAMD", "amd"), ("GenuineIntel", "intel")):
        if word in text:
            return vendor
    return platform.machine().lower() or "unknown"


def multiplies_itself(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for products of a half-precision dtype. torch then uses them, through oneDNN."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype == torch.float16 and torch.cpu._is_amx_fp16_supported()


def name_of(dtype: torch.dtype) -> str:
    """A dtype as people write it: float32, not torch.float32."""
    return str(dtype).removeprefix("torch.")
