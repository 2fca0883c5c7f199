"""Is a trace being recorded? It must neither hold what the tensors at hand happen to contain nor miss an operator."""

import torch

_is_compiling = torch.compiler.is_compiling
jit_is_tracing = torch._C._get_tracing_state  # torch.jit.trace's state, or None
modes = torch._C._len_torch_dispatch_stack  # how many modes see every operator: of make_fx, of FakeTensor, of a counter
profiler_is_on = torch._C._autograd._profiler_enabled


def tracing() -> bool:
    """Whether torch.compile, torch.export, torch.jit.trace or a dispatch mode such as make_fx's follows what runs."""
    return _is_compiling() or jit_is_tracing() is not None or modes() > 0
