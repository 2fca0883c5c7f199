"""What holds for every test? Poisoned memory and a fixed number of threads. Without a GPU, Triton runs in its interpreter and
csrc/cuda on the host shim.

PYFUSED_TEST_THREADS is the number of threads, 1 by default. PYFUSED_TEST_PRODUCTS=library or kernels computes every product
that way, as on a processor where it is faster. By default this processor decides.
"""

import gc
import os

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it decorates a kernel, so set it before importing any
# The tests assume that these are unset, and that `pyfused tune` has found nothing.
for name in ("PYFUSED_BACKEND", "PYFUSED_CHECK"):
    os.environ.pop(name, None)
os.environ["PYFUSED_EVIDENCE"] = os.devnull
os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# torch.compile looks up cached programs by operator name, so it would reuse a stale one after an operator changes.
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")
# torch.compile starts processes that compile Triton kernels for a GPU; each imports torch first, and none has work here.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# torch.compile tries the compiler with a large program for each instruction set of the processor. Every g++ knows these.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import pytest  # noqa: E402
import shim  # noqa: E402

from pyfused import evidence, extensions  # noqa: E402
from pyfused.testing.triton_interpreter import repair_interpreter  # noqa: E402

for name in ("_cpu", "_cuda"):
    if "build it again" in extensions.missing(name):
        pytest.exit(extensions.missing(name), returncode=3)  # most tests would pass without their kernels
if not HAS_GPU:
    repair_interpreter()
    extensions.emulate_cuda(shim.load)
THREADS = int(os.environ.get("PYFUSED_TEST_THREADS", "1"))
if faster := os.environ.get("PYFUSED_TEST_PRODUCTS"):  # applies if no backend is forced
    evidence._by_library.set(faster == "library")


@pytest.fixture(autouse=True)
def threads():
    """A test may change the number."""
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN, so an output that a kernel forgot to write fails the comparison."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    """Without a GPU torch.manual_seed would keep three tracebacks of each call for the devices that are not there: a quarter
    of a short test's time."""
    (torch.manual_seed if HAS_GPU else torch.default_generator.manual_seed)(1234)


# These take longest. They start first, the longest at the head, so that no worker runs one alone at the end.
LONG = (
    "test_kernels.py",
    "test_attention_codegen.py",
    "test_compile.py",
    "test_gpu_script_dry.py",
    "test_packaging.py",
    "test_cuda_attention_codegen.py",
    "test_machines.py",
    "test_memory.py",
    "test_export.py",
    "test_tensor_parallel.py",
    "test_examples.py",
    "test_fine_tuning.py",
    "test_training.py",
    "test_warm.py",
    "test_speed.py",
)
ON_THE_DEVICE = ("tests/ops/", "tests/models/", "tests/nn/", "tests/test_generation.py")


def left_out_of_interpreter(item):
    """Whether an `interpreted` marker leaves this Triton case to a GPU. The interpreter would take seconds for it, and the
    remaining cases run the same kernel."""
    marker, case = item.get_closest_marker("interpreted"), getattr(item, "callspec", None)
    if HAS_GPU or marker is None or case is None or case.params.get("each_backend") != "triton":
        return False
    return any(case.params[name] != value for name, value in marker.kwargs.items())


def pytest_collection_finish():
    """Python's collector walks through all objects again and again. Those of the imported packages, more than a million, stay
    anyway. It starts after 700 new objects, and a call of Triton's interpreter makes thousands: start a tenth as often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(7000, 10, 10)


def pytest_collection_modifyitems(config, items):
    """Runs the long files first. On a machine with a GPU, a test that uses conftest's device or every backend also gets the
    marker `gpu`."""
    if dropped := [item for item in items if left_out_of_interpreter(item)]:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if not left_out_of_interpreter(item)]
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))
    for item in items:
        if HAS_GPU and str(item.path.relative_to(item.config.rootpath)).startswith(ON_THE_DEVICE):
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
