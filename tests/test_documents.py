"""Do the documents say what is true? Their code runs, their commands and names exist, and the site builds without a warning."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "examples/README.md")]
BLOCKS = [
    pytest.param(code, id=f"{path.relative_to(ROOT)}:{number}")
    for path in DOCUMENTS
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL), 1)
]
# The modules whose public names the reference lists.
PUBLIC = "pyfused", "pyfused.nn", "pyfused.bench", "pyfused.checkpoints", "pyfused.testing"


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    """A document's code writes into its own folder and shows no pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")


# ---- code ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", BLOCKS)
def test_block_runs(code, request):
    exec(compile(code, request.node.callspec.id, "exec"), {})


def test_every_use_has_a_block():
    readme = [block.id for block in BLOCKS if block.id.startswith("README")]
    guides = {block.id.partition(":")[0] for block in BLOCKS if "guides" in block.id}
    assert len(readme) >= 4
    assert len(guides) >= 8


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs_top_to_bottom(path):
    names = {}
    for place, cell in enumerate(json.loads(path.read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {place}", "exec"), names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_keeps_no_outputs(path):
    code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert code
    assert [cell for cell in code if cell["outputs"] or cell["execution_count"]] == []


# ---- what they name ------------------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130


def test_the_readme_names_both_commands():
    """CI's script runs the second one."""
    commands = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert commands[:2] == ["run", "test"]
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("path", [*DOCUMENTS, *OTHERS], ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_exist(path):
    """So do the files that a document links to and the repository files that it names."""
    text = path.read_text()
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", text, re.MULTILINE)) <= {*targets}
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (path.parent / link).exists()] == []
    named = re.findall(r"`((?:benchmarks|docs|examples|tests)/[\w./-]+\.(?:py|md|json|ipynb))`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_reference_has_every_public_name():
    """A new name needs a line `::: module.name` in docs/reference."""
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    listed = re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)
    public = {f"{module}.{name}" for module in PUBLIC for name in importlib.import_module(module).__all__}
    assert public - {"pyfused.__version__"} - {*listed} == set()
    assert {*listed} - public == set(), "these are no public names"


def test_the_reference_has_every_command(capsys):
    from pyfused import cli

    cli.main([])
    commands = re.findall(r"^    (\w[\w-]*) ", capsys.readouterr().out, re.MULTILINE)
    assert {"env", "bench"} <= {*commands}
    page = (ROOT / "docs" / "reference" / "cli.md").read_text()
    assert [name for name in commands if f"`pyfused {name}" not in page] == []


def test_every_example_is_described():
    page = (ROOT / "examples" / "README.md").read_text()
    found = [path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".ipynb")]
    assert [name for name in found if f"`{name}`" not in page] == []


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert {str(path.relative_to(ROOT / "docs")) for path in DOCUMENTS[1:]} - listed == set()


# ---- the site ------------------------------------------------------------------------------------------------------------


def test_the_site_builds_without_a_warning(tmp_path):
    """Builds as `make docs` does."""
    pytest.importorskip("mkdocs", reason="pip install --group docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "reference" / "operators" / "index.html").read_text()
    assert "additive bias of query" in page, "docstrings are in the reference"
