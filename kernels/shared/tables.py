"""How does a lookup table reach a device? It is copied once, the copy ends before anyone reads it, and it is never freed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

_making = threading.Lock()


def kept_on_device(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Returns table(*key, device): make(*key), a CPU tensor, copied to `device`. All callers get the same tensor, so a
    captured CUDA graph may hold its address.

    The first call of a key waits for the copy, because later calls may come from any stream.

    Raises:
        RuntimeError: the first call of a key is inside a CUDA graph capture. A capture cannot wait, and its allocations
            belong to the graph.
    """
    held: dict[Any, torch.Tensor] = {}

    def table(*key: Any, device: torch.device) -> torch.Tensor:
        found = held.get((key, device))
        if found is None:
            with _making:
                found = held.get((key, device))
                if found is None:
                    found = held[key, device] = _on_device(make, key, device)
        return found

    return table


def _on_device(make: Callable[..., torch.Tensor], key: tuple[Any, ...], device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        if device.type != "cuda":
            return make(*key).to(device)
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"a CUDA graph is being captured, and a table of {make.__name__.strip('_')}{key} is not on {device} yet; "
                    "run the same call once before the capture"
                )
            made = make(*key).to(device)
            torch.cuda.current_stream(device).synchronize()
            return made
