"""Which layer does each pyfused file belong to, and what does it import? `python -m tests.layout` prints the drawing."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# From bottom to top. A file imports only its own layer and earlier ones. A name stands for a file or a folder.
LAYERS: dict[str, tuple[str, ...]] = {
    "facts": (
        *("_version", "published", "families", "activations", "arguments", "decode_plan", "weight_format"),
        *("notices", "tracing", "timing", "setting", "rules"),
        *("own_forward", "spread", "interface"),
    ),
    "this machine": ("extensions", "evidence", "tiles", "dispatch"),
    "kernels": ("kernels",),  # dispatch loads them by name, when an operator is first called
    "operators": ("ops", "compile_ahead"),
    "modules": ("nn", "quantize"),
    "checkpoints": ("checkpoints",),
    "models": ("models", "encoding", "generation"),
    "fused models": ("integrations", "fuse"),
    "tools": ("testing", "verify", "environment", "preset_facts", "tune", "bench", "cli", "__main__"),
}


def files() -> dict[str, Path]:
    """{module name: path} of every file in the package."""
    found = {}
    for path in [*(ROOT / "pyfused").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = ("pyfused", *parts) if parts[0] == "kernels" else parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def layer_of(module: str) -> str | None:
    """None for the package itself, pyfused, which users import."""
    name = module.split(".")[1] if "." in module else ""
    return next((layer for layer, names in LAYERS.items() if name in names), None)


def imports() -> dict[str, set[str]]:
    """Module -> the pyfused modules that it imports anywhere in its file, except for type checkers."""
    modules = files()
    return {name: _imported(name, path, modules.keys()) for name, path in modules.items()}


def _imported(name: str, path: Path, modules) -> set[str]:
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in modules else base for a in node.names}
    known = set()
    for module in found:
        while module and module not in modules:
            module = module.rpartition(".")[0]
        known.add(module)
    return known - {name, ""}


def circles() -> list[list[str]]:
    """Files that import each other, directly or through others."""
    graph = imports()
    reach = {name: set(imported) for name, imported in graph.items()}
    changed = True
    while changed:
        changed = False
        for reached in reach.values():
            more = set().union(*(reach[other] for other in reached)) - reached if reached else set()
            if more:
                reached |= more
                changed = True
    rings = {
        frozenset(other for other in reached if name in reach[other])
        for name, reached in reach.items()
        if name in reached
    }
    return sorted(map(sorted, rings))


def drawing() -> str:
    """The layers from the top, each with its files and the layers it imports."""
    graph, modules = imports(), files()
    lines = []
    for layer, names in reversed(LAYERS.items()):
        inside = [m for m in modules if layer_of(m) == layer]
        below = {layer_of(other) for m in inside for other in graph[m]} - {layer, None}
        lines.append(
            f"{layer}: {len(inside)} files" + (f"  -> {', '.join(n for n in LAYERS if n in below)}" if below else "")
        )
        for name in names:
            here = sorted(m.split(".", 2)[2] for m in inside if m.startswith(f"pyfused.{name}."))
            lines.append(f"    {name}" + (f": {', '.join(here)}" if here else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    print(drawing())
