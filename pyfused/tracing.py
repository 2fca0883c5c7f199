"""Is a call being traced? A trace must not depend on the values in the tensors, and every operator must appear in it."""

import torch

_is_compiling = torch.compiler.is_compiling
jit_is_tracing = torch._C._get_tracing_state  # torch.jit.trace's state, or None
modes = torch._C._len_torch_dispatch_stack  # the number of active dispatch modes, such as make_fx's or FakeTensor's
profiler_is_on = torch._C._autograd._profiler_enabled


def tracing() -> bool:
    """Whether torch.compile, torch.export, torch.jit.trace or a dispatch mode such as make_fx's is active."""
    return _is_compiling() or jit_is_tracing() is not None or modes() > 0
