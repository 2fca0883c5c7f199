"""Does dispatch choose the backend that its table names, and can a user force and understand the choice?"""

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import pyfused
from pyfused import dispatch, extensions
from pyfused.ops.explain import verdicts

X, W = torch.ones(2, 8), torch.ones(8)


def test_explain_names_every_backend():
    said = pyfused.explain("layer_norm", X, W)
    assert {v.backend for v in said.verdicts} == set(dispatch.BACKENDS)
    assert sum(v.runs for v in said.verdicts) == 1
    assert all(v.reason for v in said.verdicts)
    assert said.backend in str(said)
    assert said.backend == "cpu"
    assert pyfused.explain("layer_norm", X.double(), W.double()).backend == "reference"


@pytest.fixture
def ran(monkeypatch):
    """Which backend ran layer_norm: (its name, "forward" or "backward"), in order."""
    found = []
    for name in ("reference", "cpu"):
        module = dispatch.kernel(name, "layer_norm")
        for function in ("forward", "backward"):
            original = getattr(module, function)
            noted = name, function
            monkeypatch.setattr(module, function, lambda *a, noted=noted, f=original: found.append(noted) or f(*a))
    dispatch.forget()
    yield found
    dispatch.forget()


def test_explain_agrees_with_what_runs(ran):
    pyfused.layer_norm(X, W)
    assert ran[-1] == (pyfused.explain("layer_norm", X, W).backend, "forward")
    for forced in ("reference", "cpu"):
        with pyfused.backend(forced):
            pyfused.layer_norm(X, W)
            assert ran[-1] == (forced, "forward")
            assert pyfused.explain("layer_norm", X, W).backend == forced


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="name='gpu' is not a backend"), pyfused.backend("gpu"):
        pass
    with pytest.raises(ValueError, match="operator='conv' is unknown"):
        pyfused.explain("conv", X)
    with pytest.raises(ValueError, match="isa 'mmx'"), dispatch.use_isa("mmx"):
        pass


def test_forced_backend_gives_way_visibly_and_strictly_raises():
    wide = X.double(), W.double()
    with pyfused.backend("cpu"):
        assert pyfused.explain("layer_norm", *wide).backend == "reference"
        pyfused.layer_norm(*wide)
    with pyfused.backend("cpu", strict=True), pytest.raises(pyfused.BackendError, match="not float64"):
        pyfused.layer_norm(*wide)


def test_backend_nests_and_restores():
    with pyfused.backend("reference"):
        with pyfused.backend("cpu"):
            assert pyfused.explain("layer_norm", X, W).backend == "cpu"
        assert pyfused.explain("layer_norm", X, W).backend == "reference"
    assert pyfused.explain("layer_norm", X, W).backend == "cpu"


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("PYFUSED_BACKEND", "reference", "reference"),
        ("PYFUSED_BACKEND", "gpu", "PYFUSED_BACKEND='gpu' is not a backend"),
        ("PYFUSED_ISA", "baseline", "baseline"),
        ("PYFUSED_ISA", "neon2", "PYFUSED_ISA='neon2'"),
    ],
)
def test_environment_variables(name, value, said):
    code = (
        "import torch, pyfused; from pyfused import extensions; x = torch.ones(2, 8); w = torch.ones(8);"
        "pyfused.layer_norm(x, w); print(pyfused.explain('layer_norm', x, w).backend, extensions.isa())"
    )
    environment = os.environ | {name: value}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert said in out.stdout + out.stderr


def test_the_best_instruction_set_is_used(monkeypatch):
    """The extension lists the weakest first."""
    monkeypatch.delenv("PYFUSED_ISA", raising=False)
    for supported in ([], ["baseline"], ["baseline", "avx2"], ["baseline", "avx2", "avx512"]):
        monkeypatch.setattr(extensions, "cpu_supported", lambda found=supported: found)
        assert extensions._default_isa.__wrapped__() == (supported[-1] if supported else None)


def test_a_backend_without_a_backward_is_no_candidate_for_it(monkeypatch):
    """Even if forced strictly, its forward runs and the next backend's backward."""
    monkeypatch.delattr(dispatch.kernel("cpu", "layer_norm"), "backward")
    dispatch.forget()
    try:
        x = X.clone().requires_grad_()
        with pyfused.backend("cpu", strict=True):
            assert pyfused.explain("layer_norm", X, W).backend == "cpu"
            rows = verdicts("layer_norm", "backward", (X, None, X, W, None, None, False))
            assert next((v.backend, v.reason) for v in rows) == ("cpu", "has no backward of this operator")
            assert next(v.backend for v in rows if v.runs) == "reference"
            pyfused.layer_norm(x, W).sum().backward()
        assert x.grad is not None
    finally:
        dispatch.forget()


def test_a_backward_in_another_thread_runs_on_the_forwards_backend(ran):
    """As autograd does for a GPU."""
    for forward in ("reference", "cpu"):
        with pyfused.backend(forward):
            y = pyfused.layer_norm(X, W.clone().requires_grad_())
        thread = threading.Thread(target=y.sum().backward)
        thread.start()
        thread.join()
        assert ran[-1] == (forward, "backward")
    y = pyfused.layer_norm(X, W.clone().requires_grad_())
    with pyfused.backend("reference"):
        y.sum().backward()
    assert ran[-1] == ("reference", "backward")


def test_what_a_forced_backward_computes_again_is_not_forced():
    """A checkpoint's block runs again while the backward unpacks its tensors."""
    wide = W.double()

    def block(x):
        h = pyfused.layer_norm(x, wide)
        with pyfused.backend("cpu", strict=True):
            return pyfused.layer_norm(h.float(), W)

    x = X.double().requires_grad_()
    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert x.grad is not None


def test_the_profiler_changes_no_backend(ran):
    with torch.profiler.profile():
        with pyfused.backend("reference"):
            y = pyfused.layer_norm(X, W.clone().requires_grad_())
        y.sum().backward()
    assert ran[-1] == ("reference", "backward")


def test_threads_follow_torch():
    """The kernels use torch's OpenMP pool and honour torch.set_num_threads; the answer stays the same."""
    x, w = torch.randn(2048, 1024), torch.randn(1024)
    torch.set_num_threads(1)
    one = pyfused.layer_norm(x, w)
    torch.set_num_threads(2)
    assert torch.equal(one, pyfused.layer_norm(x, w))


def test_one_openmp_runtime():
    """The extension brings no OpenMP of its own. Runs in a separate process: other tests' packages may bring theirs."""
    code = "import torch, pyfused; pyfused.layer_norm(torch.ones(64, 8), torch.ones(8)); print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert len({line.split()[-1] for line in maps.splitlines() if "libgomp" in line}) == 1


def test_tensor_subclasses_go_through_the_registered_operator():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        x, w = mode.from_tensor(torch.ones(2, 8)), mode.from_tensor(torch.ones(8))
        y = pyfused.layer_norm(x, w)
    assert type(y).__name__ == "FakeTensor"
    assert y.shape == (2, 8)


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((8, 0), "80-real 90a-real", True),
        ((8, 9), "80-real 90a-real", True),  # machine code serves later minor versions
        ((9, 0), "80-real 90a-real", True),
        ((12, 0), "80-real 90a-real", False),
        ((12, 0), "80-real 90a-real 90-virtual", True),  # PTX serves all later chips
        ((9, 1), "90a-real 90a-virtual", False),  # "a" means that chip alone
        ((10, 3), "100f-real", True),
        ((12, 0), "100f-real", False),
        ((7, 5), "80-real 90-virtual", False),
        ((8, 6), "80", True),
        ((13, 0), "80", True),
    ],
)
def test_cuda_is_held_to_the_cards_that_are_there(monkeypatch, capability, built, runs):
    """For a card without machine code, explain() gives the reason and no launch fails."""
    extension = type("Extension", (), {"architectures": built})
    monkeypatch.setattr(extensions, "_emulated", None)
    monkeypatch.setattr(extensions, "_load", lambda name: (extension, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card: capability)
    said = dispatch.missing.__wrapped__("cuda")
    assert (said == "") == runs
    if not runs:
        number = "".join(map(str, capability))
        assert f"no code for sm_{number}; it was built for {built.replace(' ', ', ')}" in said


def test_a_device_without_kernels_runs_plain_pytorch():
    """The meta device stands for any device that is neither a CPU nor CUDA, such as mps."""
    x, w = torch.empty(3, 8, device="meta"), torch.empty(16, 8, device="meta")
    assert pyfused.layer_norm(x, x[0], x[0]).shape == x.shape
    assert pyfused.ffn(x, w, None, w.t(), None, activation="gelu").shape == x.shape
    assert pyfused.attention(*[x[None, None]] * 3).device.type == "meta"
