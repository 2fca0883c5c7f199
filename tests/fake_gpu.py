"""How much of a GPU does a launch need? A stand-in for Triton's driver and torch's streams, for processes without
TRITON_INTERPRET. Kernels compile for sm_90, CPU tensors pass as GPU tensors, and each start is recorded instead of run.

Triton's own code runs unchanged, so the launcher gets the same arguments at the same time as on a GPU.
"""

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher

from pyfused import dispatch, tiles
from pyfused.kernels.shared import prepared
from pyfused.kernels.triton import _launch


class Driver:
    """A GPU of compute capability 9.0. `started`: (kernel's name, grid, stream, other arguments) of each start."""

    def __init__(self):
        self.stream, self.started, self.loaded = 7, [], 0
        self.utils = self
        self.launcher_cls = self._launcher

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return self.stream

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name, kernel, shared, device):
        self.loaded += 1
        return f"module {self.loaded}", self.loaded, 32, 0, 1024

    def _launcher(self, source, metadata):
        return Launcher(self, source.name)


class Launcher(CudaLauncher):
    """Triton's own launcher, with another C function."""

    global_scratch_size = profile_scratch_size = 0
    global_scratch_align = profile_scratch_align = num_ctas = 1
    launch_cooperative_grid = launch_pdl = False

    def __init__(self, driver, name):
        def launch(x, y, z, stream, function, cooperative, pdl, scratch, profile, metadata, of_hooks, enter, leave, *arguments):
            assert (cooperative, pdl, scratch, profile) == (False, False, None, None)
            if enter is not None:
                enter(of_hooks)
            driver.started.append((name, (x, y, z), stream, arguments))
            if leave is not None:
                leave(of_hooks)

        self.launch = launch


def install():
    """Gives this process the fake GPU. Call it before any operator runs."""
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    dispatch.interpreting = lambda: True  # lets Triton's kernels take CPU tensors
    _launch.on_gpu = lambda device: True
    for module in (_launch, prepared):
        module.current_device, module.current_stream = lambda: 0, lambda index: driver.stream
    files = tiles.files
    tiles.files, tiles.multiprocessors = lambda where: files("sm_90"), lambda where: 132
    dispatch.forget()
    return driver


def compiled_by(kernel):
    """The number of variants of a kernel that this process has compiled."""
    return sum(len(caches[0]) for caches in kernel.device_caches.values())


def tensors(arguments):
    return [a for a in arguments if isinstance(a, torch.Tensor)]
