"""Does the built pyfused._cuda have no spills, code for every chip, and no need of a driver?"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyfused.extensions import _load, cuda_lacks, missing
from pyfused.testing.cuda_compile import ARCHITECTURES
from pyfused.testing.triton_compile import cuobjdump

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None and bool(missing("_cuda")), reason="needs nvcc")


@pytest.fixture(scope="module")
def extension():
    module, reason = _load("_cuda")
    assert module is not None, f"nvcc is here, and yet: {reason}"
    return module.__file__


def test_imports_without_torch_or_a_driver(extension):
    code = "import importlib.util as u; s = u.spec_from_file_location('_cuda', {!r}); m = u.module_from_spec(s); "
    code += "s.loader.exec_module(m); print(m.layer_norm_backward_parts(1000, 768, 132))"
    done = subprocess.run([sys.executable, "-c", code.format(extension)], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) <= 264


def test_an_error_names_operator_shape_and_device(extension):
    """No machine has a device 99, and most have no driver."""
    with pytest.raises(RuntimeError, match=r"^layer_norm forward of shape \(4, 8\) on cuda:99: "):
        _load("_cuda")[0].layer_norm_forward(0, 0, 0, 0, 0, 0, 0, 0, 4, 8, 8, 0, 1e-5, 0, 99, 0)


def listed(extension, option):
    done = subprocess.run([cuobjdump(), option, extension], capture_output=True, text=True, check=True)
    return set(re.findall(r"\.(sm_\w+)\.(?:cubin|ptx)", done.stdout))


def test_it_has_the_code_that_it_says_it_has(extension):
    built = [name.split("-") for name in _load("_cuda")[0].architectures.split()]
    machine, ptx = ({number.rstrip("a") for number, kind in built if kind == wanted} for wanted in ("real", "virtual"))
    assert {name.removeprefix("sm_").rstrip("a") for name in listed(extension, "--list-elf")} == machine
    assert {name.removeprefix("sm_") for name in listed(extension, "--list-ptx")} == ptx


def test_an_install_has_code_for_the_chips_of_today_and_tomorrow(monkeypatch):
    """Today's chips get machine code, later ones PTX, which a driver compiles. make test builds less."""
    text = (ROOT / "CMakeLists.txt").read_text()
    names = " ".join(re.findall(r"CMAKE_CUDA_ARCHITECTURES ([\w -]+)\)", text))
    assert names == "80-real 90a-real 100-real 120-real 90-virtual"
    monkeypatch.setattr(_load("_cuda")[0], "architectures", names)
    for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0)]:
        assert not cuda_lacks(capability)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills(extension, architecture):
    """What `make test` does not build is checked by the other tests of this folder, which compile it themselves."""
    if architecture.rstrip("a") not in listed(extension, "--list-elf"):
        assert architecture != "sm_90a"
        return
    command = [cuobjdump(), "--dump-resource-usage", "-arch", architecture, extension]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    assert len(usage) >= 30, f"{len(usage)} kernels for {architecture}"
    spilled = [row for row in usage if int(row[2]) or int(row[4])]
    assert not spilled
    reserved = 1024 if architecture == "sm_90a" else 0  # by the driver, in each block
    own = {name: int(shared) - reserved for name, _, _, shared, _ in usage}
    assert max(own.values()) <= 48 * 1024
    # Beside dynamic shared memory: what allow_shared() of csrc/include/pyfused/launch.h takes for granted
    beside = {name: size for name, size in own.items() if re.search("attention|decode|fourier_mix", name)}
    assert len(beside) >= 10
    assert max(beside.values()) <= 1024, beside
