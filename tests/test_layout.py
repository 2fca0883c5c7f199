"""Does every folder have every operator, and do imports go one way?"""

import ast
import re
from pathlib import Path

import layout
import pytest

import pyfused

# The files that import modules by name, and which modules.
LATE = {
    "pyfused/families.py",  # a family's classes and files
    "pyfused/__init__.py",  # pyfused.nn
    "pyfused/fuse.py",  # the integration of a library that is in use
    "pyfused/dispatch.py",  # a backend's kernels
    "pyfused/ops/__init__.py",  # the operators' own files
    "pyfused/extensions.py",  # the compiled ones
    "pyfused/compile_ahead.py",  # a Triton kernel that was noted down
    "pyfused/checkpoints/hub_hugging_face.py",  # the client of a hub
    "pyfused/checkpoints/hub_kaggle.py",  # the same
    "pyfused/bench/run.py",  # benchmarks/
    "pyfused/testing/triton_compile.py",  # the kernels whose code is looked at
}
ROOT = Path(__file__).resolve().parents[1]

# Places that lack an operator, each with the reason.
EXCEPTIONS = {
    "kernels/triton/decode.py": "a whole step in one kernel needs a barrier of the whole grid, which Triton has not",
    "csrc/cuda/relative_bias.cu": "the materialised bias is a gather: Triton's kernel serves every GPU",
}


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


def test_every_file_has_a_layer():
    modules = layout.files().keys() - {"pyfused"}
    assert [m for m in modules if layout.layer_of(m) is None] == []
    names = [name for names in layout.LAYERS.values() for name in names]
    assert [n for n in names if not any(m.split(".")[1] == n for m in modules)] == []
    assert len(names) == len(set(names))


def test_imports_go_one_way():
    order = list(layout.LAYERS)
    wrong = [
        f"{module} imports {other}"
        for module, imported in layout.imports().items()
        for other in imported
        if module != "pyfused"
        and other != "pyfused"
        and order.index(layout.layer_of(module)) < order.index(layout.layer_of(other))
    ]
    assert wrong == []
    assert layout.circles() == []


def test_nothing_is_imported_by_name_behind_the_layers():
    """importlib and pkgutil load only optional modules, families in the table, and kernels."""
    uses = {p for m, p in layout.files().items() if re.search(r"import_module\(|resolve_name\(", p.read_text())}
    assert {p.relative_to(ROOT).as_posix() for p in uses} == LATE


def test_the_drawing():
    lines = layout.drawing().splitlines()
    assert lines[0].startswith("tools: ")
    assert "operators: " in "\n".join(lines)


# Names for a tile's size and launch options; pyfused/tiles.py reads them from evidence.
TILE = re.compile(
    r"(\w+_)?(num_warps|num_stages|(BLOCK|TILE|ROWS|COLUMNS|INNER|PARTS|GROUP|PROGRAM|WARP|STAGE|CHUNK)S?(_\w+)?)",
    re.IGNORECASE,
)
CHIP = re.compile(r"sm_\d+|gfx\d+|[AHBV]\d00|MI\d+|RTX", re.IGNORECASE)
# Constants that limit a kernel on every machine.
CAPABILITIES = {
    "kernels/triton/_attention_tiles.py": {"MASKED_STAGES"},  # the latency its loops can hide; see the file
    "kernels/triton/attention.py": {"_PACK_ROWS", "_MOST_CHUNKS"},  # decode's tile; the parts that combine_kernel adds up
    "kernels/triton/_attention_grad_table.py": {"_LEAST_TILES", "_MOST_PROGRAMS"},  # the same sums on every chip
    "kernels/triton/_product.py": {"FEW_ROWS"},
    "kernels/cpu/decode.py": {"MOST_ROWS"},  # whose activations stay in L1 and L2
    "kernels/cuda/decode.py": {"MOST_ROWS"},  # compiled into csrc/cuda/decode.cu
    "kernels/shared/int8.py": {"FEW_ROWS"},  # torch._int_mm takes more rows on every GPU
    "kernels/cuda/linear.py": {"FEW_ROWS", "FEW_ROWS_BY_COLUMNS"},  # kFewRows of few_rows.cuh, kFewRowsByColumns
    "kernels/gluon/attention.py": {"num_warps"},  # the 4 of a warpgroup, which a product of Hopper takes
    "kernels/gluon/_attention_backward.py": {"num_warps"},  # so here
    "kernels/cuda/attention.py": {
        "_ROWS",
        "_TILE",
        "_TILES",
        "_CHUNK",
        "_MAX_CHUNKS",
    },  # compiled into csrc/cuda/attention*.cu
}


def machine_numbers(tree):
    """(line, name) of each tile size or count that launcher code writes as a number, and of each chip that it names. Numbers
    inside a @triton.jit function are part of the kernel and do not count."""

    def is_jit(node):
        return isinstance(node, ast.FunctionDef) and any("jit" in ast.dump(d) for d in node.decorator_list)

    def is_number(node):
        if isinstance(node, ast.IfExp):
            return is_number(node.body) or is_number(node.orelse)
        if isinstance(node, ast.BinOp):
            return is_number(node.left) and is_number(node.right)
        if isinstance(node, ast.Call):
            return getattr(node.func, "id", "") in ("min", "max") and any(map(is_number, node.args))
        return isinstance(node, ast.Constant) and type(node.value) is int and node.value > 1

    def assigned(target, value):
        """(name, value) one by one."""
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            return [pair for each in zip(target.elts, value.elts) for pair in assigned(*each)]
        return [(target.id, value)] if isinstance(target, ast.Name) else []

    nodes, waiting, prose = [], [tree], set()
    while waiting:
        node = waiting.pop()
        if is_jit(node):
            continue
        nodes.append(node)
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose.add(id(node.value))
    for node in nodes:
        given = []
        if isinstance(node, ast.keyword) and node.arg:
            given = [(node.arg, node.value)]
        elif isinstance(node, ast.Dict):
            given = [(k.value, v) for k, v in zip(node.keys, node.values) if isinstance(getattr(k, "value", 0), str)]
        elif isinstance(node, ast.Assign):
            given = [pair for target in node.targets for pair in assigned(target, node.value)]
        elif isinstance(node, ast.NamedExpr):
            given = [(node.target.id, node.value)]
        for name, value in given:
            if TILE.fullmatch(name) and is_number(value):
                yield node.lineno if hasattr(node, "lineno") else value.lineno, name
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in prose
            and CHIP.search(node.value)
        ):
            yield node.lineno, node.value


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda path: "/".join(path.parts[-2:]))
def test_kernels_have_no_number_of_a_machine(path):
    """Tiles, warps, stages and crossovers are evidence: measured, and different on each chip."""
    found = {name for _, name in machine_numbers(ast.parse(path.read_text()))}
    assert found - CAPABILITIES.get(str(path.relative_to(ROOT)), set()) == set()


def test_a_number_of_a_machine_is_found():
    source = """
FORWARD_BLOCK = 16384
@triton.jit
def kernel(x, BLOCK: tl.constexpr):
    for i in tl.range(0, 8, num_stages=1):
        pass
def launcher(x):
    "About an H100."
    launch(kernel, BLOCK=4096, num_warps=8 if x else 4, num_stages=stages, ROWS=tile.rows)
    options = {"num_warps": 4, "ROWS": rows}
    rows, columns = 16, x.shape[1]
    return "sm_90"
"""
    found = [name for _, name in sorted(machine_numbers(ast.parse(source)))]
    assert found == ["FORWARD_BLOCK", "BLOCK", "num_warps", "num_warps", "rows", "sm_90"]


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
    """torch.compile finds its programs on disk by the version."""
    assert f'\nversion = "{pyfused.__version__}"\n' in (ROOT / "pyproject.toml").read_text()
