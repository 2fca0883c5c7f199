"""Does pyfused install? A wheel from an sdist, in a fresh environment away from the source, and without a compiler."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The environment without variables that lead to another pyfused or choose the installed one's kernels
SHELL = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("PYFUSED_")}

CALL = """
import torch, pyfused, pathlib
x = torch.randn(3, 40); w = torch.randn(40); b = torch.randn(40)
y = pyfused.layer_norm(x, w, b)
assert torch.allclose(y, torch.nn.functional.layer_norm(x, (40,), w, b), atol=1e-5)
q = torch.randn(1, 2, 5, 8)
assert torch.allclose(pyfused.attention(q, q, q), torch.nn.functional.scaled_dot_product_attention(q, q, q), atol=1e-5)
from pyfused import evidence
assert all(path.exists() for path in evidence.files()[-1:]) and evidence.lines()
print(pyfused.explain("layer_norm", x, w, b).backend, pathlib.Path(pyfused.__file__).parent)
"""


COMPILER = """#!{python} -IS
# Compiles without optimisation, and a source of csrc once: the builds have copies of one tree. A kernel whose csrc is that of
# the tests is taken from their own build, if that is newer than its sources.
import os, shutil, subprocess, sys
from pathlib import Path

given = sys.argv[1:]
command = [{compiler!r}, *given, "-O0"]
option = lambda name: Path(given[given.index(name) + 1])
if "-c" not in given or "csrc" not in option("-c").parts:
    os.execv(command[0], command)
source = option("-c")
defined = "".join(sorted(word for word in given if word.startswith("-D")))
kept = Path({folder!r}) / (defined.replace("/", "") + source.name + ".o")

def files(csrc):
    return {{path.relative_to(csrc): path.read_bytes() for path in csrc.rglob("*") if path.is_file()}}

def built():
    csrc, mine = next(path for path in source.parents if path.name == "csrc"), Path({root!r}) / "csrc"
    pattern = f"build/temp*/cmake/CMakeFiles/pyfused_cpu_baseline.dir/csrc/{{source.relative_to(csrc)}}.o"
    changed = max(path.stat().st_mtime for path in mine.rglob("*"))
    new = [path for path in Path({root!r}).glob(pattern) if path.stat().st_mtime > changed]
    return new[0] if new and files(csrc) == files(mine) else None

if not kept.exists():
    if found := built():
        shutil.copy(found, kept)
    elif subprocess.run(command).returncode:
        sys.exit(1)
    else:
        shutil.copy(option("-o"), kept)
shutil.copy(kept, option("-o"))
option("-MF").write_text("")
"""


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Settings for a build in a few seconds: no CUDA, one instruction set, no compiler optimisation, and no source compiled
    twice. These tests check packaging only."""
    folder = tmp_path_factory.mktemp("compiler")
    compiler, real = folder / "c++", shutil.which(os.environ.get("CXX", "c++"))
    compiler.write_text(COMPILER.format(python=sys.executable, compiler=real, folder=str(folder), root=str(ROOT)))
    compiler.chmod(0o755)
    return {"PYFUSED_BUILD_CUDA": "0", "PYFUSED_BUILD_ISAS": "baseline", "CXX": str(compiler)}


def run(*command, cwd, **env):
    result = subprocess.run(command, cwd=cwd, env=SHELL | env, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the tracked and untracked files, so that builds leave nothing in the tree under test."""
    target = tmp_path_factory.mktemp("source") / "pyfused"
    skip = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, target, ignore=skip)
    return target


@pytest.fixture(scope="module")
def wheel(source, quick, tmp_path_factory):
    """Built as users build it: sdist first, then the wheel from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    # Uses this environment's build tools: an isolated build would download the same ones again.
    run(
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        out,
        source,
        cwd=out,
        PYFUSED_REQUIRE_EXTENSIONS="1",
        **quick,
    )
    assert len(list(out.glob("*.tar.gz"))) == 1
    (path,) = out.glob("*.whl")
    return path


def environment(path, *packages, **env):
    """A fresh environment that sees this one's torch, with the packages installed from files, offline."""
    run(sys.executable, "-m", "venv", "--without-pip", path, cwd=ROOT)
    python = path / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True
    )
    # The outer environment supplies pip and torch. It comes last in the path, so a pyfused installed there does not win.
    target = Path(site.stdout.strip())
    (target / "outer.pth").write_text(f"import sys; sys.path.append({str(outer_site())!r})\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile", "--no-deps"]
    run(*pip, "--no-build-isolation", *packages, cwd=path, **env)
    return python


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of an environment with the wheel."""
    path = tmp_path_factory.mktemp("installed") / "env"
    environment(path, wheel)
    return path


def outer_site():
    import torch

    return Path(torch.__file__).parents[1]


def test_wheel_away_from_the_source(wheel, installed, tmp_path):
    names = zipfile.ZipFile(wheel).namelist()
    for need in (
        "pyfused/kernels/reference/attention.py",
        "pyfused/kernels/triton/attention.py",
        "pyfused/py.typed",
        "pyfused/presets/gpt2_tiny_en/model.safetensors",
        "pyfused/bench/benchmarks/bench_attention.py",
    ):
        assert need in names
    assert "pyfused/bench/benchmarks/publish.py" not in names  # only for a source tree
    assert any(n.startswith("pyfused/_cpu") for n in names)
    assert not any(n.startswith("kernels/") for n in names), "a top-level `kernels` would shadow another package"
    backend, where = run(installed / "bin" / "python", "-c", CALL, cwd=tmp_path).split()
    assert backend == "cpu"
    assert Path(where).is_relative_to(installed)
    command = installed / "bin" / "pyfused"
    assert run(command, "env", cwd=tmp_path).startswith("versions")
    assert "15 rows" in run(command, "bench", "host_overhead", "--seconds", "0", cwd=tmp_path)


def test_installs_and_runs_without_a_compiler(source, tmp_path):
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    python = environment(tmp_path / "env", copy, CXX="/nonexistent/c++", CC="/nonexistent/cc", PYFUSED_BUILD_CUDA="0")
    backend, _ = run(python, "-c", CALL, cwd=tmp_path).split()
    assert backend == "reference"
    said = run(python, "-m", "pyfused", "env", cwd=tmp_path)
    assert "the extension pyfused._cpu is not built" in said
    assert "slower" in said


def test_editable_without_isolation(source, quick, tmp_path):
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    python = environment(tmp_path / "env", "-e", copy, **quick)
    backend, where = run(python, "-c", CALL, cwd=tmp_path).split()
    assert backend == "cpu"
    assert Path(where).is_relative_to(copy)


def test_broken_extension_is_a_warning(installed, tmp_path):
    (extension,) = installed.rglob("_cpu*.so")
    whole = extension.read_bytes()
    extension.write_bytes(b"not a shared object")
    try:
        code = "import warnings; warnings.showwarning = lambda *given: print(given[0])\n" + CALL
        *said, last = run(installed / "bin" / "python", "-c", code, cwd=tmp_path).splitlines()
    finally:
        extension.write_bytes(whole)
    assert any("pyfused._cpu cannot be loaded" in line for line in said)
    assert last.split()[0] == "reference"
