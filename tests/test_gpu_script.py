"""Does the sanitizer's part of the GPU script look at every kernel, one allocation a tensor?"""

import subprocess
import sys

import pytest

from benchmarks import gpu
from pyfused import _extensions


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Every command that the script starts, with its environment; none is run."""
    started = []

    def run(command, env, **options):
        started.append((command, env))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(sys, "argv", ["gpu", "--part", "sanitize"])
    return started


def test_the_sanitizer_sees_each_tensor_by_itself(runs):
    """torch's allocator would give it one large allocation, inside which nothing is out of bounds."""
    assert gpu.main() == 0
    assert [command[2] for command, _ in runs] == ["memcheck", "racecheck"]
    for command, environment in runs:
        assert environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        assert "pytest" not in command
        assert command[-2:] == gpu.CUDA_CALLS


@pytest.mark.skipif(not _extensions.emulating_cuda(), reason="runs under the sanitizer there")
def test_the_script_runs_calls_of_the_cuda_kernels():
    """Two here; tests/cuda_on_cpu/test_kernels.py runs them all."""
    done = subprocess.run([*gpu.CUDA_CALLS, "rms_norm 37", "relative_bias"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3 calls ran on cpu; left to other backends: relative_bias\n"
