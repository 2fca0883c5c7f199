"""How does a Triton kernel start? Triton compiles and runs the first call. Later calls use the compiled kernel's own launcher.

`kernel[grid](...)` binds, checks and describes every argument at every start; attention has 50. For calls of one signature
the launcher then gets the same arguments, except for the addresses and the stream. Triton compiles separately for numbers that
are 1 or multiples of 16 and for addresses that are multiples of 16. The signature of pyfused.ops holds the numbers and the
alignment of each given tensor. torch's allocator aligns new tensors to 256 bytes.
"""

import torch
from triton import knobs
from triton.runtime.jit import JITFunction

from pyfused.kernels.shared.prepared import current_device, current_stream, recorder

GRID_LIMITS = (2**31 - 1, 65535, 65535)

_hands_over = None  # whether this Triton calls a launcher as `start` does; None until _watch() found out
_NO_SCRATCH = None, None  # the memory that a launcher makes for a kernel that uses none
_reaches_c = False  # whether its launcher then calls its C function as `start` does


def on_gpu(device):
    """Whether kernels on this device are compiled. Elsewhere they run in Triton's interpreter."""
    return device.type == "cuda"


def settle_cache_key(function):
    """Gives a kernel the same key in Triton's cache on disk in every process.

    The key has the constants that the kernel's helpers read. Triton 3.6 leaves out those of a helper whose own key is not known
    yet, so the key depended on which kernels a process had used before, and what another process had compiled was not found.
    """
    if function.hash is None:
        for name in function.fn.__code__.co_names:
            helper = function.__globals__.get(name)
            if isinstance(helper, JITFunction):
                settle_cache_key(helper)
        function.cache_key  # noqa: B018 - computes the key


def starter(kernel, grid, device, *numbers, **options):
    """Prepares kernel[grid](*tensors, *numbers, **options) and returns it as a function of the tensors.

    Tensors may be None. Their shapes, strides, dtypes and alignment must be the same each time. `device` holds the tensors
    and must be the current device when the function runs.

    Raises:
        ValueError: the grid is beyond GRID_LIMITS. A GPU would refuse it without naming the kernel.
    """
    for blocks, most in zip(grid, GRID_LIMITS):
        if blocks > most:
            raise ValueError(f"{kernel.fn.__name__}: a grid of {tuple(grid)} programs; a GPU takes {GRID_LIMITS}")

    if isinstance(kernel, JITFunction):  # the interpreter's functions have no key
        settle_cache_key(kernel)

    def through_triton(*tensors):
        return kernel[grid](*tensors, *numbers, **options)

    if (record := recorder.get()) is not None:
        return lambda *tensors: record(kernel, grid, (*tensors, *numbers), options)
    if not on_gpu(device):
        return through_triton
    sizes = (*grid, 1, 1)[:3]
    rest = (*numbers, *(options[name] for name in kernel.arg_names if name in options))
    compiled = run = function = described = None

    def start(*tensors):
        nonlocal compiled, run, function, described
        if run is not None and not _is_watched(kernel):
            run(*sizes, current_stream(current_device()), function, *described, *tensors, *rest)
        elif compiled is None or _hands_over is not None:
            compiled = through_triton(*tensors)
        else:
            _watch(compiled, lambda: through_triton(*tensors), sizes, (*tensors, *rest))
        if run is None and _hands_over and compiled is not None:
            function = compiled.function
            run, described = _function_of(compiled)

    return start


def _function_of(compiled):
    """What starts a compiled kernel, and its arguments between the function and the kernel's own. The launcher is an object in
    Python, which takes 0.7 us to call its C function."""
    run, described = compiled.run, (compiled.packed_metadata, None, None, None)
    if _reaches_c and not run.global_scratch_size and not run.profile_scratch_size:
        return run.launch, (*_in_front(run), *described)
    return run, described


def _in_front(run):
    """What a launcher puts in front of the metadata for its C function."""
    return run.launch_cooperative_grid, run.launch_pdl, *_NO_SCRATCH


def _is_watched(kernel):
    """Whether hooks must run at each start, such as those of Triton's profiler. Only a start through Triton runs them."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or kernel.pre_run_hooks


def _watch(compiled, begin, sizes, arguments):
    """Calls begin(), which starts `compiled`, and checks how Triton calls the launcher.

    That call is no public interface; `start` imitates Triton 3.6's. If this Triton differs, every start goes through Triton, or
    through the launcher.
    """
    global _hands_over, _reaches_c
    seen, inside = (), ()

    def watching(*args):
        nonlocal seen
        seen = args
        return run(*args)

    def watching_inside(*args):
        nonlocal inside
        inside = args
        return launch(*args)

    launch = None
    try:
        run, hooks = compiled.run, (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
        place = current_stream(current_device()), compiled.function
        described = (compiled.packed_metadata, None, *hooks, *arguments)
        compiled._run = watching
    except AttributeError:
        _hands_over = False
        begin()
        return
    try:
        in_front = _in_front(run)
        launch, run.launch = run.launch, watching_inside
    except AttributeError:  # another launcher
        pass
    try:
        begin()
    finally:
        compiled._run = run
        if launch is not None:
            run.launch = launch
    _hands_over = _are_alike(seen, (*sizes, *place, *described), 6)
    _reaches_c = launch is not None and _are_alike(inside, (*sizes, *place, *in_front, *described), 10)


def _are_alike(found, hoped, metadata):
    """Whether two lists of arguments are. The one at `metadata` differs: it is Triton's metadata for its hooks."""
    pairs = zip(found[:metadata] + found[metadata + 1 :], hoped[:metadata] + hoped[metadata + 1 :])
    return len(found) == len(hoped) and all(a is b or _equal(a, b) for a, b in pairs)


def _equal(a, b):
    return not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor) and a == b
