"""Whom is an operator measured beside, and what judges it? On the CPU plain PyTorch; on a GPU each of pyfused's own backends,
torch.compile and, for attention, every backend of scaled_dot_product_attention by its name. The judge is plain PyTorch in
float64."""

from __future__ import annotations

import copy
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


def in_double(call: Callable[..., Any]) -> Call:
    """A Case's exact result: the call, whose tensors are the defaults of its arguments, on these in float64."""

    def exact():
        return call(*(_wide(argument) for argument in call.__defaults__))

    return exact


def _wide(argument):
    if isinstance(argument, tuple):
        return tuple(_wide(item) for item in argument)
    if isinstance(argument, torch.Tensor) and argument.is_floating_point():
        return argument.detach().double().requires_grad_(argument.requires_grad)
    return argument


def references(
    model: torch.nn.Module, call: Callable[[torch.nn.Module], Any], baseline: torch.dtype | None = torch.float32
) -> dict[str, Call]:
    """A Case's plain and exact results of a model: through the reference operators in its own dtype, and in float64.

    baseline: the dtype in which the Case's baseline is plain PyTorch; in it that is the plain result.
    """

    def plain(model=model):
        with running("reference", strict=False):
            return call(model)

    found = {"exact": lambda: plain(copy.deepcopy(model).double())}
    return found if next(model.parameters()).dtype == baseline else {**found, "plain": plain}


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
