"""Whom is an operator measured beside? On the CPU plain PyTorch; on a GPU each of pyfused's own backends, torch.compile
and, for attention, every backend of scaled_dot_product_attention by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyfused
from pyfused.testing import running

Call = Callable[[], Any]


def beside(device: str, call: Call, plain: Call, *, compiled: bool = False) -> dict[str, Call]:
    """Providers for a Case: "pyfused" as it dispatches and "torch"; on a GPU also "pyfused triton", "pyfused cuda" where
    they have the case, and "torch.compile" where `compiled` asks for it (it takes seconds to compile)."""
    providers = {"pyfused": call, "torch": plain}
    if device == "cuda":
        for backend in ("triton", "cuda"):
            forced = _forced(call, backend)
            if forced is not None:
                providers[f"pyfused {backend}"] = forced
        if compiled:
            providers["torch.compile"] = torch.compile(plain, dynamic=False)
    return providers


def _forced(call: Call, backend: str) -> Call | None:
    """The call on one backend, or None where that backend lacks it."""

    def run():
        with running(backend):
            return call()

    try:
        run()
    except (pyfused.dispatch.BackendError, ValueError):
        return None
    return run


def sdpa(device: str, query, key, value, **options) -> dict[str, Call]:
    """scaled_dot_product_attention as PyTorch chooses ("torch"), and on a GPU by each of its backends that takes the case."""

    def plain():
        return F.scaled_dot_product_attention(query, key, value, **options)

    providers = {"torch": plain}
    if device == "cuda":
        names = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
        names["efficient"] = SDPBackend.EFFICIENT_ATTENTION
        for name, backend in names.items():

            def by_name(backend=backend):
                with sdpa_kernel(backend):
                    return plain()

            try:
                by_name()
            except RuntimeError:  # this backend lacks the case
                continue
            providers[f"sdpa {name}"] = by_name
    return providers
