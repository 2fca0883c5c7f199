"""Does docs/hidden_state.md list everything that a module keeps beyond a call?"""

import ast
import re
from pathlib import Path

import layout

PAGE = layout.ROOT / "docs" / "hidden_state.md"
KEEPERS = {"ContextVar", "Lock", "RLock", "Library", "WeakKeyDictionary", "local"}


def kept(path: Path) -> set[str]:
    """A file's module-level names that hold state between calls: caches, empty tables, context variables, locks."""
    tree, found = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            found |= set(node.names)
        elif isinstance(node, ast.FunctionDef):
            if any(re.search("cache|remembered|kept_on_device", ast.unparse(d)) for d in node.decorator_list):
                found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            variables = (
                n for n in node.body if isinstance(n, ast.AnnAssign) and "ClassVar" in ast.unparse(n.annotation)
            )
            found |= {f"{node.name}.{n.target.id}" for n in variables}
    for node in tree.body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        value = getattr(node, "value", None)
        empty = isinstance(value, ast.Dict | ast.List) and not ast.unparse(value).strip("{}[]")
        called = ast.unparse(value.func).split(".")[-1] if isinstance(value, ast.Call) else ""
        if empty or called in KEEPERS or (called in ("set", "dict") and not value.args) or called == "kept_on_device":
            found |= {t.id for t in targets if isinstance(t, ast.Name)}
    return found


def test_the_page_is_the_code():
    listed = set(re.findall(r"`([\w.]+\.\w+)`", PAGE.read_text()))
    code = {
        f"{module.removeprefix('pyfused.')}.{name}"
        for module, path in layout.files().items()
        if not module.startswith(("pyfused.testing", "pyfused.bench"))  # for tests and measurements
        for name in kept(path)
    }
    assert code - listed == set(), "kept, and not on the page"
    modules = {module.removeprefix("pyfused.") for module in layout.files()}
    stale = {name for name in listed if name.rpartition(".")[0].removesuffix(".Launches") in modules} - code
    known = {
        "pyfused.backend",
        "dispatch.use_isa",
        "tiles.trying",
        "tiles.recorded",
        "compile_ahead.recording",
        "evidence.one_way",
    }
    assert stale - known == set(), "on the page, and not kept"


def test_what_keeps_is_found(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "import functools, threading\n_a = {}\n_b: set = set()\n_c = ContextVar('c')\n_d = threading.Lock()\n_e = {1: 2}\n"
        "@functools.cache\ndef f(): pass\ndef g():\n    global _h\nclass K:\n    all: ClassVar[list] = []\n"
    )
    assert kept(file) == {"_a", "_b", "_c", "_d", "f", "_h", "K.all"}
