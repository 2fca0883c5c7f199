"""Over which axes does every operator's test run?"""

import pathlib

import pytest
import torch

from pyfused import dispatch, extensions, ops
from pyfused.testing import available, running

HERE = pathlib.Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=available(DEVICE))
def each_backend(request):
    """Runs the test once on every backend of this machine, strictly: no silent fall-through."""
    with running(request.param):
        yield request.param


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture
def device():
    return DEVICE


def operator_of(item, parameters):
    """The operator of the test's file, or of the case's name; None if neither begins with one."""
    texts = item.path.stem.removeprefix("test_"), str(parameters.get("name"))
    return max((name for name in ops.NAMES if any(text.startswith(name) for text in texts)), key=len, default=None)


def runs_kernels_again(item, parameters):
    """Whether this is a set for dot products without kernels of its own for the operator: then its base's run, again."""
    isa = (parameters.get("each_backend") or parameters.get("backend") or "").partition(":")[2]
    operator = operator_of(item, parameters)
    if isa not in extensions.DOT_PRODUCTS or operator is None:
        return False
    return not any(name.startswith(operator) for name in dir(extensions.cpu(isa)))


def lacks(item, backend):
    """Whether csrc/cuda lacks the operator, or test_backward would run another backend's backward after this forward. On the
    shim that would be the CPU kernels' backward, which never follows a GPU's forward."""
    if backend != "cuda":
        return False
    module = dispatch.kernel(backend, operator_of(item, {}))
    if module is None:
        return True
    return DEVICE == "cpu" and item.originalname == "test_backward" and not hasattr(module, "backward")


def left_to_plain_pytorch(item, parameters):
    """Whether these are attention's float32 gradients of up to 8 queries. On the CPU only plain PyTorch computes them
    (declined_backward of kernels/cpu/attention.py)."""
    if DEVICE != "cpu" or (item.path.name, item.originalname) != ("test_attention.py", "test_backward"):
        return False
    few = parameters["case"].sizes[3] <= 8 and parameters["dtype"] == torch.float32
    return few and parameters["each_backend"] != "reference"


def of_the_other_half(item, parameters):
    """Whether a case of attention, or of large sizes, leaves this half precision to other cases. In Triton's interpreter a case
    runs in float32 and, in turn, in float16 or bfloat16; attention's backward has the half that its forward lacks."""
    attention = item.path.name.startswith("test_attention") and item.originalname in ("test_forward", "test_backward")
    axis = "case" if attention else "rows" if item.originalname == "test_large_sizes" else None
    if DEVICE != "cpu" or parameters.get("each_backend") != "triton" or axis not in parameters:
        return False
    turn = item.callspec.indices[axis] + (item.originalname == "test_backward")
    return parameters["dtype"] == (torch.float16, torch.bfloat16)[turn % 2]


def pytest_collection_modifyitems(config, items):
    """Leaves out cases marked seldom in Triton's interpreter, which would take minutes, and one half precision of others there;
    operators and gradients that a backend lacks; tests of the CPU kernels on other backends; and kernels of a base set under
    the names of the sets that extend it. pytest passes the whole suite's tests: those of other folders are kept."""
    kept, dropped = [], []
    for item in items:
        if HERE not in item.path.parents:
            kept.append(item)
            continue
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        backend = parameters.get("each_backend", "")
        slow = DEVICE == "cpu" and backend == "triton" and getattr(parameters.get("case"), "seldom", False)
        foreign = item.get_closest_marker("cpu_kernels") is not None and backend and not backend.startswith("cpu")
        left = left_to_plain_pytorch(item, parameters) or of_the_other_half(item, parameters)
        left = left or runs_kernels_again(item, parameters)
        (dropped if slow or foreign or lacks(item, backend) or left else kept).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept
