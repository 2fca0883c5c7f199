"""Which backends can be tested on this machine, and how does a test run on one of them?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from .. import dispatch, extensions


def available(device: str = "cpu") -> list[str]:
    """The names that running() takes here: "reference", "cpu:<isa>" for each instruction set of this processor, "triton" and
    "cuda"."""
    names = ["reference"]
    if device == "cpu":
        names += [f"cpu:{isa}" for isa in extensions.cpu_supported()]
    if not dispatch.missing("triton") and (device != "cpu" or dispatch.interpreting()):
        names.append("triton")
    if not dispatch.missing("cuda") and (device != "cpu" or extensions.emulating_cuda()):
        names.append("cuda")
    return names


@contextmanager
def running(name: str, *, strict: bool = True) -> Iterator[None]:
    """Forces one of available(). strict: raise BackendError for a case that the backend lacks, instead of using the next."""
    backend, _, isa = name.partition(":")
    with ExitStack() as stack:
        if isa:
            stack.enter_context(dispatch.use_isa(isa))
        stack.enter_context(dispatch.backend(backend, strict=strict))
        yield
