"""Is pyfused right with the releases of transformers and torch that people have? `python tests/versions.py [NAME ...]` installs
each into the environment's folder `versions`, once, and runs its tests. With --install it stops there.

A release of transformers goes into a folder that comes first on Python's path; torch, the kernels and everything else are
shared. A release of torch gets an environment of its own, with the extensions that are built already.
"""

import os
import subprocess
import sys
from pathlib import Path

import version_left_out

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(sys.prefix) / "versions"
PRESETS = "gpt2_tiny_en", "t5_tiny_en", "albert_tiny_en", "fnet_tiny_en"

# Release -> its companions, in the releases that it takes. "installed" is the environment's own.
_COMPANIONS = ("huggingface_hub>=1.5,<2", "tokenizers>=0.22,<=0.23.0", "httpx", "httpcore", "anyio", "h11")
TRANSFORMERS = {
    "4.57.6": ("huggingface_hub>=0.34,<1", "tokenizers>=0.22,<=0.23.0"),
    "5.0.0": _COMPANIONS,
    "5.5.4": _COMPANIONS,
    "5.10.4": _COMPANIONS,
    "5.15.1": _COMPANIONS,
    "installed": (),
}
TORCH = "2.10.0"  # pyproject.toml's oldest
# What runs with it, beside `pyfused verify`: a part, as all of tests/ops would take far longer.
TORCH_TESTS = (
    *(f"tests/ops/test_{name}.py" for name in ("layer_norm", "rms_norm", "linear", "attention", "ffn")),
    "tests/test_compile.py::test_inductor_agrees_with_eager[t5]",
)
TORCH_CASES = "not triton and not cuda and not baseline"
PACKAGES = ("numpy<2.4", "safetensors", "packaging", "pytest>=8", "scipy", "hypothesis>=6", "triton==3.6.0")


def folder_of(name):
    """Where a release is installed; its file `complete` says that it is. The installed one has no folder."""
    return None if name == "transformers-installed" else FOLDER / name


def environment(name=None):
    """Environment variables under which Python finds a release first, then this checkout and its tests."""
    folder = folder_of(name) if name else None
    path = [*([folder] if folder else []), ROOT, ROOT / "tests"]
    release = {"PYFUSED_TEST_TRANSFORMERS": name.partition("-")[2]} if folder else {}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1", **release}


def install(name):
    """Installs a release, unless it is there."""
    folder, (library, _, release) = folder_of(name), name.partition("-")
    if folder is None or (folder / "complete").exists():
        return
    if library == "torch":
        _run(sys.executable, "-m", "venv", folder)
        _run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", f"torch=={release}", *PACKAGES)
    else:
        wanted = [f"transformers=={release}", *TRANSFORMERS[release]]
        options = ["--quiet", "--no-compile", "--no-deps", "--upgrade"]
        _run(sys.executable, "-m", "pip", "install", *options, "--target", folder, *wanted)
    (folder / "complete").touch()


def tested(name):
    """Runs a release's tests; returns whether they pass. Those of torch are `pyfused verify` and TORCH_TESTS."""
    library, _, release = name.partition("-")
    if library == "transformers":
        files = version_left_out.files(release)
        left_out = [f"--deselect={test}" for test in version_left_out.tests(release)]
        return _pytest(sys.executable, environment(name), "tests/version_cases.py", *files, *left_out)
    python = folder_of(name) / "bin" / "python"
    failed = [_run(python, "-m", "pyfused", "verify", p, env=environment(), check=False) for p in PRESETS]
    return _pytest(python, environment(), *TORCH_TESTS, "-k", TORCH_CASES) and not any(failed)


def _pytest(python, environment, *arguments):
    return not _run(python, "-m", "pytest", "-p", "no:cacheprovider", *arguments, env=environment, check=False)


def _run(*command, check=True, **options):
    print("+", *command, flush=True)
    return subprocess.run(list(map(str, command)), cwd=ROOT, check=check, **options).returncode


def main(arguments):
    known = [*(f"transformers-{release}" for release in TRANSFORMERS), f"torch-{TORCH}"]
    names = [name for name in arguments if name != "--install"] or known
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"names: {', '.join(unknown)}; known are {', '.join(known)}")
    for name in names:
        install(name)
    passed = {} if "--install" in arguments else {name: tested(name) for name in names}
    print(*(f"{name}: {'ok' if ok else 'FAILED'}" for name, ok in passed.items()), sep="\n")
    sys.exit(not all(passed.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
