"""What does each item of gpu.py do? One function for each; it yields rows, which gpu_commands.show() prints."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import gpu_correct
import torch
from gpu_device import DEVICE, DRY, Row, error_row, synchronize
from gpu_models import OneStep, compile, decode, generate, transformers
from gpu_peers import attention_shapes, flex, heads, peers
from gpu_session import ROOT

import pyfused
from pyfused import dispatch, evidence, extensions
from pyfused.testing import running

# ---- the machine -------------------------------------------------------------------------------------------------------


def environment(start: int) -> Iterator[Row]:
    """Versions and tools, whether the extensions and backends load, and this GPU's limits."""
    packages = ("torch", "triton", "transformers", "numpy", "pytest")
    versions = {"pyfused": pyfused.__version__, "python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    device = "dry run" if DRY else torch.cuda.get_device_name()
    kind = "cuda_dry_run" if DRY else evidence.kind("cuda")
    tools = {tool: shutil.which(tool) for tool in ("nvcc", "ncu", "compute-sanitizer")}
    yield {"device": device, "kind": kind, "versions": versions, "tools": tools, "commit": _commit()}
    for name in ("_cpu", "_cuda"):
        reason = extensions.missing(name)
        yield {"extension": name, "ok": not reason, "error": reason}
    for name in ("triton", "cuda", "cudnn", "gluon"):
        reason = dispatch.missing(name)
        yield {"backend": name, "ok": not reason, "error": reason}
    from pyfused.bench.measure import ceilings

    yield {"ceilings": {"copy_gb_per_s": 1.0} if DRY else ceilings(DEVICE, (torch.bfloat16, torch.float16))}


def _commit() -> str | None:
    """None where there is no git, or no repository."""
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


# ---- correctness --------------------------------------------------------------------------------------------------------


def correct(start: int, operators: str, backend: str) -> Iterator[Row]:
    """Every case of comma-separated operators on one backend. A row announces each case, so that the parent knows which one
    ended this process. A CUDA error ends it: no later call would work."""
    for number, (operator, dtype, case) in enumerate(gpu_correct.every(operators, tiny=DRY)):
        if number < start:
            continue
        about = {"operator": operator, "backend": backend, "dtype": evidence.name_of(dtype), "case": case.name}
        yield {"begun": number, **about}
        try:
            verdict = gpu_correct.check(case, backend, dtype, DEVICE)
            synchronize()
        except Exception as error:
            verdict = {"ratio": None, "seconds": 0.0, **error_row(error)}
        yield {**about, **verdict}


# ---- CPU time of a call -------------------------------------------------------------------------------------------


def host(start: int) -> Iterator[Row]:
    """Microseconds of CPU time for a call of each operator, on tensors so small that the GPU keeps up."""
    small = {
        "layer_norm": gpu_correct.norm("layer_norm", 1, 8, True),
        "rms_norm": gpu_correct.norm("rms_norm", 1, 8, True),
        "linear": gpu_correct.linear(1, 64, 64),
        "ffn": gpu_correct.ffn(1, 64, 64),
        "gated_ffn": gpu_correct.gated_ffn(1, 64, 64),
        "fourier_mix": gpu_correct.fourier_mix(1, 2, 8),
        "relative_bias": gpu_correct.relative_bias(2, 1, 8, True),
        "attention": gpu_correct.attend(1, 2, 2, 1, 8, 16),
        "decode": gpu_correct.decode(1, 4, 16, 2, 16),
    }
    for operator, case in small.items():
        tensors = case.inputs(torch.bfloat16, DEVICE)
        for backend in (None, "triton", "cuda", "reference"):
            try:
                with running(backend) if backend else contextlib.nullcontext(), torch.no_grad():
                    seconds = _cpu_seconds(lambda case=case, tensors=tensors: case.own(tensors))
            except dispatch.BackendError:
                continue
            yield {"operator": operator, "backend": backend or "default", "us": seconds * 1e6}


def _cpu_seconds(call: Callable[[], Any]) -> float:
    calls, best = 2 if DRY else 200, float("inf")
    for _ in range(2 if DRY else 6):
        synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - began) / calls)
    return best


# ---- calls for Nsight Compute ----------------------------------------------------------------------------------------


def kernels(start: int) -> Iterator[Row]:
    """The six calls that `profile` measures, in Triton where that has them."""
    b, h, s, d = attention_shapes()[0]
    q, k, v = (t.requires_grad_() for t in heads(b, h, s, d))
    table = torch.randn(32, h, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(16 if DRY else 16384, 32 if DRY else 1024, device=DEVICE, dtype=torch.bfloat16)
    w_wide = torch.randn(48 if DRY else 50257, 32 if DRY else 768, device=DEVICE, dtype=torch.bfloat16)
    row, weight = torch.randn(1, w_wide.shape[1], device=DEVICE, dtype=torch.bfloat16), x[0].clone()
    with running("triton", strict=False):
        out = pyfused.attention(q, k, v)
    calls = {
        "attention": lambda: pyfused.attention(q.detach(), k.detach(), v.detach()),
        "attention with T5's bias": lambda: pyfused.attention(q, k, v, relative_bias=pyfused.RelativeBias(table, True)),
        "attention backward": lambda: torch.autograd.grad(out, (q, k, v), out.detach(), retain_graph=True),
        "layer_norm": lambda: pyfused.layer_norm(x, weight, weight, residual=x),
        "linear, one row": lambda: pyfused.linear(row, w_wide),
        "decode": OneStep("gpt2", 1),
    }
    for name, call in calls.items():
        with running("triton", strict=False):
            call()
            synchronize()
            with contextlib.nullcontext() if DRY else torch.cuda.profiler.profile():
                call()
                synchronize()
        yield {"called": name}


ITEMS: dict[str, Callable[..., Iterator[Row]]] = {
    f.__name__: f for f in (environment, compile, correct, decode, generate, transformers, flex, peers, host, kernels)
}
