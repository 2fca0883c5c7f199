"""What holds for every test: where there is no GPU, Triton in its interpreter and csrc/cuda on the host shim; poisoned
memory, and a number of threads.

PYFUSED_TEST_THREADS is that number, 1 by default. PYFUSED_TEST_PRODUCTS=library or kernels: as on a processor where that one
is faster at every product; which it is here, the processor decides.
"""

import os

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before any of them is imported
# The tests are about what happens without these, and without what `pyfused tune` found here.
for name in ("PYFUSED_BACKEND", "PYFUSED_CHECK"):
    os.environ.pop(name, None)
os.environ["PYFUSED_EVIDENCE"] = os.devnull
os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# torch.compile finds programs on disk by the names of our operators, which stay when an operator changes.
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

import pytest  # noqa: E402
import shim  # noqa: E402

from pyfused import evidence, extensions  # noqa: E402
from pyfused.testing.triton_interpreter import repair_interpreter  # noqa: E402

if not HAS_GPU:
    repair_interpreter()
    extensions.emulate_cuda(shim.load)
THREADS = int(os.environ.get("PYFUSED_TEST_THREADS", "1"))
if faster := os.environ.get("PYFUSED_TEST_PRODUCTS"):  # where nothing is forced
    evidence._by_library.set(faster == "library")


@pytest.fixture(autouse=True)
def threads():
    """A test may change the number."""
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN, so that an output a kernel forgot to write fails the comparison."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1234)


# What takes a minute or more in one piece: begun first, so that no worker is left with it in the end.
LONG = (
    "test_packaging.py",
    "test_gpu_script_dry.py",
    "test_kernels.py",
    "test_export.py",
    "test_examples.py",
    "test_fine_tuning.py",
    "test_compile.py",
)
ON_THE_DEVICE = ("tests/ops/", "tests/models/", "tests/nn/", "tests/test_generation.py")


def left_out_of_interpreter(item):
    """Whether an `interpreted` marker leaves this case of Triton's to a GPU: the interpreter takes seconds where one takes
    none, and the same kernel runs in the cases that stay."""
    marker, case = item.get_closest_marker("interpreted"), getattr(item, "callspec", None)
    if HAS_GPU or marker is None or case is None or case.params.get("each_backend") != "triton":
        return False
    return any(case.params[name] != value for name, value in marker.kwargs.items())


def pytest_collection_modifyitems(config, items):
    """The long files first. Where there is a GPU, what takes its device from conftest or runs every backend is a GPU test
    too: `-m gpu`."""
    if dropped := [item for item in items if left_out_of_interpreter(item)]:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if not left_out_of_interpreter(item)]
    items.sort(key=lambda item: item.path.name not in LONG)
    for item in items:
        if HAS_GPU and str(item.path.relative_to(item.config.rootpath)).startswith(ON_THE_DEVICE):
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
