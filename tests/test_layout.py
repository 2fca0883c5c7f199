"""Is every operator findable in every folder, and does data flow one way?"""

import ast
from pathlib import Path

import pytest

import pyfused

ROOT = Path(__file__).resolve().parents[1]

# Places an operator does without, each for a reason.
EXCEPTIONS = {
    "kernels/triton/linear.py": "on a GPU it is csrc/cuda/linear.cu for a few rows, cuBLAS for more",
    "csrc/cuda/relative_bias.cu": "the materialised bias is a gather: Triton's kernel serves every GPU",
}

# A layer may import itself and what stands to its right.
LAYERS = ["models", "nn", "ops", "dispatch", "kernels"]


@pytest.mark.parametrize("name", pyfused.ops.NAMES)
def test_operator_has_its_places(name):
    places = [
        f"pyfused/ops/{name}.py",
        f"kernels/reference/{name}.py",
        f"kernels/cpu/{name}.py",
        f"kernels/triton/{name}.py",
        f"csrc/cpu/{name}.cpp",
        f"csrc/cuda/{name}.cu",
        f"tests/ops/test_{name}.py",
        f"benchmarks/bench_{name}.py",
    ]
    assert [p for p in places if not (ROOT / p).exists() and p not in EXCEPTIONS] == []
    assert callable(getattr(pyfused, name)), f"pyfused.{name} is public"


def test_exceptions_are_still_exceptions():
    assert [p for p in EXCEPTIONS if (ROOT / p).exists()] == []


def imports_of(path: Path) -> set[str]:
    """Absolute names of the pyfused modules that a file imports anywhere in it."""
    package = path.relative_to(ROOT).with_suffix("").parts
    if package[0] == "kernels":
        package = ("pyfused", *package)
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level]) if node.level else ""
            module = ".".join(p for p in (base, node.module) if p)
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return {n for n in names if n.startswith("pyfused.")}


def test_imports_go_one_way():
    wrong = []
    for i, layer in enumerate(LAYERS):
        files = [ROOT / "pyfused" / f"{layer}.py", *(ROOT / "pyfused" / layer).rglob("*.py")]
        files += (ROOT / "kernels").rglob("*.py") if layer == "kernels" else []
        above = {f"pyfused.{name}" for name in LAYERS[:i]}
        for path in filter(Path.exists, files):
            for name in imports_of(path):
                if any(name == a or name.startswith(a + ".") for a in above):
                    # explain() looks the operators up by name when it is called: no import at load time.
                    if layer == "dispatch" and name == "pyfused.ops":
                        continue
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_extensions_know_nothing_of_torch():
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".cpp", ".cu", ".h", ".cuh"}]
    assert sources
    assert [str(p) for p in sources if "torch/" in p.read_text() or "ATen" in p.read_text()] == []


def test_top_level_kernels_is_no_package():
    """A package called `kernels` would shadow the Hugging Face one of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_import_is_light():
    """`import pyfused` must not pull in triton, transformers, tokenizers, h5py or the models' readers."""
    import subprocess
    import sys

    code = "import sys, pyfused; print([m for m in ('triton','transformers','tokenizers','h5py','keras') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_the_version_is_one():
    """What torch.compile keeps on disk is found by it."""
    assert f'\nversion = "{pyfused.__version__}"\n' in (ROOT / "pyproject.toml").read_text()
