"""Is a second call on a GPU only an allocation and a start? Checks facts from prepared_launches.py, a process in which Triton
compiles for an imaginary GPU, and the parts that need no compiler."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_cuda import Machine

from pyfused import dispatch, extensions, ops
from pyfused.kernels.shared import prepared
from pyfused.kernels.triton import _launch

TESTS = Path(__file__).parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def facts():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, str(TESTS / "prepared_launches.py")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_a_prepared_start_is_the_one_that_triton_makes(facts):
    """The first two starts go through Triton, and pyfused records the second. Later starts pass the launcher the same."""
    found = facts["starts"]
    assert found["through Triton until"] == [None, True, True, True]
    assert found["reaches C"], "Triton's launcher is not the one that pyfused knows: each start takes 1 us more"
    assert found["same"] == [True] * 4
    assert found["streams"] == [0, 1, 2, 3]
    assert found["results differ"] == 4


def test_a_call_is_a_few_functions(facts):
    """Bounds on the host's work for a call: the measured counts, with room for other Python versions. The cost of a GPU's
    driver and allocator is not yet measured."""
    for name, count in facts["counts"].items():
        starts = count["starts"]
        assert starts == (2 if name in ("attention chunks", "ffn", "gated_ffn") else 1), name
        assert count["call"] <= 9 + 6 * starts, name
        assert count["c_call"] <= 5 + 3 * starts, name
        assert count["opcode"] <= 120 + 150 * starts, name


def test_who_watches_triton_sees_every_start(facts):
    assert facts["watched"] == {"hook": ["forward_kernel"], "all": ["forward_kernel", "pre-run"]}


def test_tiles_are_asked_for_again_after_forget(facts):
    assert facts["forgotten"] == [[1, 1, 1], [1, 1, 1], [5, 1, 1]]


def test_no_launch_keeps_a_tensor(facts):
    assert facts["held"] == {"layer_norm": 0, "attention": 0}


def test_a_kernel_has_one_key_on_disk(facts):
    """What one process compiles another finds, whatever either has used before."""
    functions, different = facts["cache_keys"]
    assert functions > 40
    assert different == []


def test_the_kernel_for_hopper_starts(facts):
    """As many programs as the imaginary GPU has multiprocessors, or blocks, behind the bias by distance."""
    (first, _, _), (second, grid, arguments) = facts["by_hand"]
    assert (first, second, grid) == ("spread_kernel", "forward_kernel", [4, 1, 1])
    assert arguments == ["TensorDescriptor"] * 3


def test_every_kernel_starts_on_the_device_of_its_tensors():
    """A kernel starts on the current device, and new tensors are made there; prepares_launch sets it. decode's launcher passes
    its device on."""
    kernels = [dispatch.kernel(backend, name) for backend in ("triton", "cuda", "cudnn", "gluon") for name in ops.MODULES]
    functions = [getattr(module, name) for module in kernels for name in ("forward", "backward") if hasattr(module, name)]
    assert len(functions) > 20
    unprepared = [function.__module__ for function in functions if not hasattr(function, "prepare")]
    assert unprepared == ["pyfused.kernels.cuda.decode"]


def test_a_text_that_grows_compiles_nothing_again(facts):
    """Triton compiles anew if a size is 1 or a multiple of 16, unless the kernel declares that the size does not matter."""
    most = {
        "growing keys": {"forward_kernel": 2, "combine_kernel": 0},
        "growing cache": {"forward_kernel": 2, "combine_kernel": 0},
        "growing prefill": {"forward_kernel": 1},
        "chunks": {"forward_kernel": 1, "combine_kernel": 2},
        "rows": {"forward_kernel": 1, "_stream_kernel": 3, "stream_kernel": 1},
        "many rows": {"forward_kernel": 1, "_linear_kernel": 2, "gate_kernel": 1},
    }
    for case, kernels in facts["variants"].items():
        assert kernels, case
        for kernel, count in kernels.items():
            assert count <= most[case].get(kernel, 0), (case, kernels)


# ---- without a compiler ---------------------------------------------------------------------------------------------
class Compiled:
    """A compiled kernel; `hand_over` gives its launcher's calling convention."""

    function, packed_metadata = 5, (4, 1, 0)

    def __init__(self):
        self.started = []
        self._run = lambda *args: self.started.append(args)

    @property
    def run(self):
        return self._run


def tritons(grid, place, hooks, rest):
    """The order of Triton's arguments."""
    return (*grid, *place, *hooks, *rest)


class Kernel:
    """A @triton.jit function of a Triton version with its own order of launcher arguments."""

    arg_names, pre_run_hooks = ["x", "n", "BLOCK"], []

    def __init__(self, order):
        self.order, self.compiled, self.through = order, Compiled(), 0

    def __getitem__(self, grid):
        def start(x, n, *, BLOCK, num_warps):
            self.through += 1
            runtime = _launch.knobs.runtime
            hooks = None, runtime.launch_enter_hook, runtime.launch_exit_hook
            places = 9, self.compiled.function, self.compiled.packed_metadata
            self.compiled.run(*self.order((*grid, 1, 1), places, hooks, (x, n, BLOCK)))
            return self.compiled

        return start


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(_launch, "on_gpu", lambda device: True)
    monkeypatch.setattr(_launch, "current_device", lambda: 0)
    monkeypatch.setattr(_launch, "current_stream", lambda index: 9)
    monkeypatch.setattr(_launch, "_hands_over", None)
    monkeypatch.setattr(_launch, "_reaches_c", False)


def started_four_times(order, launcher=None):
    kernel = Kernel(order)
    if launcher is not None:
        launcher.launch, kernel.compiled._run = kernel.compiled._run, launcher
    start = _launch.starter(kernel, (3,), CPU, 7, BLOCK=16, num_warps=4)
    tensors = [torch.empty(1) for _ in range(4)]
    for tensor in tensors:
        start(tensor)
    assert len(kernel.compiled.started) == 4
    return kernel, tensors


def test_another_triton_starts_its_kernels_itself(on_gpu):
    kernel, tensors = started_four_times(tritons)
    assert _launch._hands_over is True
    assert kernel.through == 2
    assert kernel.compiled.started[3][:6] == (3, 1, 1, 9, Compiled.function, Compiled.packed_metadata)
    assert kernel.compiled.started[3][6:9] == (None, None, None)
    assert kernel.compiled.started[3][9] is tensors[3]
    assert kernel.compiled.started[3][10:] == (7, 16)
    for order in (
        lambda grid, place, hooks, rest: (*grid, *place, *hooks, *rest[:-1]),  # constants left out
        lambda grid, place, hooks, rest: (*place, *grid, *hooks, *rest),
        lambda grid, place, hooks, rest: (*grid, *place, *rest),
    ):
        _launch._hands_over = None
        kernel, _ = started_four_times(order)
        assert _launch._hands_over is False
        assert kernel.through == 4


class InPython:
    """A launcher as Triton's: an object that adds four arguments for its C function."""

    profile_scratch_size, launch_cooperative_grid, launch_pdl = 0, False, True

    def __init__(self, scratch=0, added=lambda self: (self.launch_cooperative_grid, self.launch_pdl, None, None)):
        self.global_scratch_size, self.added, self.called = scratch, added, 0

    def __call__(self, x, y, z, stream, function, *args):
        self.called += 1
        self.launch(x, y, z, stream, function, *self.added(self), *args)


def test_a_start_calls_the_c_function_of_the_launcher(on_gpu):
    """Where the launcher does no more than to call it, and calls it so."""
    launcher = InPython()
    kernel, tensors = started_four_times(tritons, launcher)
    assert (kernel.through, launcher.called) == (2, 2)
    first, *others = kernel.compiled.started
    for started, tensor in zip(others, tensors[1:]):  # from 11 on: two hooks, the tensor
        assert started[13] is tensor
        assert started[:11] + started[14:] == first[:11] + first[14:]
    assert others[-1][11:13] == (None, None)
    for other in (InPython(scratch=8), InPython(added=lambda self: (self.launch_pdl, False, None, None))):
        _launch._hands_over = None
        kernel, _ = started_four_times(tritons, other)
        assert (kernel.through, other.called) == (2, 4)


def test_a_triton_without_these_names_starts_its_kernels_itself(on_gpu):
    class Other:
        arg_names, pre_run_hooks, through = [], [], 0

        def __getitem__(self, grid):
            def start(tensor, **options):
                self.through += 1
                return object()

            return start

    kernel = Other()
    start = _launch.starter(kernel, (3,), CPU, num_warps=4)
    for _ in range(4):
        start(torch.empty(1))
    assert _launch._hands_over is False
    assert kernel.through == 4


@pytest.mark.parametrize("index", [0, 1])
def test_a_launch_runs_on_its_tensors_device(monkeypatch, index):
    machine = Machine(monkeypatch)
    monkeypatch.setattr(prepared, "current_device", lambda: machine.device)
    launch = prepared.on_device(lambda *args: (machine.device, args), index)
    assert launch(1, 2) == (index, (1, 2))
    assert machine.device == 0


# ---- signatures of GPU tensors --------------------------------------------------------------------------------------
class View(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("dimensions", ctypes.c_int32),
        ("kind", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


SIGNATURES = """
import ctypes, sys
sys.path.insert(0, {tests!r})
import torch
from pyfused import _cpu
from test_prepared_launches import View, Tensor

VIEW = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(View))
class Exchange(ctypes.Structure):
    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("previous", ctypes.c_void_p)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("allocate", "from_tensor", "to_tensor")]
    _fields_ += [("view", VIEW), ("stream", ctypes.c_void_p)]

def view(tensor, out):
    out[0] = tensor.view
    return 0

table = Exchange(major=1, minor=0, view=VIEW(view))
capsule = ctypes.pythonapi.PyCapsule_New
capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_cpu.use_tensors(capsule(ctypes.addressof(table), b"dlpack_exchange_api", None), Tensor, Tensor)
found = [
    _cpu.signature(Tensor(*arguments))
    for arguments in [(1, 0, 64), (1, 0, 4), (2, 0, 64), (2, 0, 128), (2, 0, 68), (2, 1, 64), (10, 0, 64), (8, 0, 64)]
]
assert found[0] == found[1], "a CPU kernel takes any address"
assert found[2] == found[3], "the address itself does not matter"
assert len(set(found[1:2] + found[3:7])) == 5, "device type, device and alignment do"
assert found[7] is None, "another kind of device"
"""


class Tensor:
    """A tensor of shape (5,) on some device, as C sees it."""

    def __init__(self, device_type, device_id, address):
        self.sizes = (ctypes.c_int64 * 1)(5), (ctypes.c_int64 * 1)(1)
        at = [ctypes.cast(size, ctypes.POINTER(ctypes.c_int64)) for size in self.sizes]
        self.view = View(address, device_type, device_id, 1, 2, 32, 1, *at, 0)


@pytest.mark.skipif(bool(extensions.missing("_cpu")), reason="needs the extension")
def test_a_signature_tells_devices_and_alignment_apart():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    code = SIGNATURES.format(tests=str(TESTS))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


class OnGPU:
    """The attributes that Python reads from a GPU tensor."""

    is_cuda, dtype = True, torch.float32

    def __init__(self, index=0, address=64, shape=(5,), stride=(1,), negated=False):
        self.get_device, self.data_ptr = lambda: index, lambda: address
        self.shape, self.stride, self.is_neg = shape, lambda: stride, lambda: negated


def test_without_the_extension_calls_on_a_gpu_have_signatures(monkeypatch):
    monkeypatch.setattr(extensions, "_TENSORS", frozenset({OnGPU, torch.Tensor}))
    sign = extensions.gpu_signature
    assert sign(OnGPU(), 1, None) == sign(OnGPU(address=128), 1, None)
    others = [OnGPU(1), OnGPU(address=68), OnGPU(shape=(6,)), OnGPU(stride=(2,))]
    found = [
        sign(OnGPU(), 1, None),
        *(sign(t, 1, None) for t in others),
        sign(OnGPU(), True, None),
        sign(OnGPU(), 1.0, None),
    ]
    assert len(set(found)) == len(found)
    assert sign(torch.empty(1)) is sign(OnGPU(negated=True)) is None
    assert sign(OnGPU(), [1]) is None


@pytest.mark.parametrize(("count", "expected"), [(0, (1, 2, 3)), (1, 1), (2, (1, 2))])
def test_without_the_extension_prepared_launches_are_found(monkeypatch, count, expected):
    from pyfused import dispatch

    monkeypatch.setattr(extensions, "_TENSORS", frozenset({OnGPU}))
    watched = []
    launches = {(None, extensions.gpu_signature(OnGPU(), 5)): lambda *args: (1, 2, 3)}
    run = extensions.gpu_prepared(
        launches, dispatch._forced, (lambda: bool(watched),), lambda *args, **names: "checked", count
    )
    assert run(OnGPU(), 5) == expected
    assert run(OnGPU(), 6) == "checked"
    assert run(OnGPU(), 5, some=1) == "checked"
    watched.append(1)
    assert run(OnGPU(), 5) == "checked"
