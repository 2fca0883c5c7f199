"""What do the site's pages say about GPUs? The page docs/performance/gpus.md, made of benchmarks/results/gpu/*.json."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "gpu"
BACKENDS = "triton", "cuda", "cudnn", "gluon"


def results() -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def page(found: list[dict]) -> str:
    """The page about every GPU that has run benchmarks/gpu.py."""
    lines = [
        "# GPUs",
        "",
        "This page is written by `python benchmarks/publish.py` from the files in `benchmarks/results/gpu`, which `make gpu` "
        "and `make gpu-publish` wrote. Attention's speed, and that of other operators as far as it was measured, is among "
        "[all results](index.md). What is on neither page is not yet measured: [Proving GPU code](../guides/gpu.md).",
    ]
    for gpu in found:
        versions, limits = gpu["versions"], gpu["ceilings"]
        lines += [
            "",
            f"## {gpu['device']}",
            "",
            f"pyfused {versions['pyfused']}, torch {versions['torch']}, triton {versions['triton']}. It copies "
            f"{limits['copy_gb_per_s'] / 1e3:.2f} TB/s and multiplies {limits['bfloat16_gflop_per_s'] / 1e3:.0f} TFLOP/s in "
            "bfloat16.",
        ]
        for part in (_checked, _attention, _backends, _texts, _steps, _kernels, _host):
            lines += part(gpu["items"])
    return "\n".join([*lines, ""])


def _of(items: dict[str, list[dict]], *names: str) -> Iterator[dict]:
    return (row for item, rows in items.items() if item.split()[0] in names for row in rows)


def _table(title: str, words: str, head: Iterable[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return ["", f"### {title}", "", words, "", *(f"| {' | '.join(line)} |" for line in lines)]


def _checked(items: dict[str, list[dict]]) -> list[str]:
    cases = [row for row in _of(items, "correct") if row.get("ok") is not None]
    rows = []
    for backend in BACKENDS:
        mine = [row for row in cases if row["backend"] == backend]
        wrong = [
            f"{row['operator']} {row['dtype']} {row['case']} ({_how_wrong(row)})" for row in mine if not row["ok"]
        ]
        if mine:
            rows.append([f"`{backend}`", str(len(mine) - len(wrong)), "; ".join(wrong) or "none"])
    words = (
        "Each case runs in float32, float16 and bfloat16, with gradients, beside plain PyTorch and float64. In brackets: the "
        "error over what the [tolerance rule](../guides/benchmarking.md) allows."
    )
    return _table("Right and wrong", words, ("backend", "right", "wrong"), rows)


def _how_wrong(row: dict) -> str:
    return f"{row['ratio']:.2f}" if row.get("ratio") else "did not run"


def _attention(items: dict[str, list[dict]]) -> list[str]:
    found: dict[str, dict[str, float]] = {}
    for row in _of(items, "peers"):
        if "tflops" in row:
            found.setdefault(row["case"], {})[row["provider"]] = row["tflops"]
    ways = list(dict.fromkeys(how for each in found.values() for how in each))
    rows = [[how, *(f"{each[how]:.0f}" if how in each else "" for each in found.values())] for how in ways]
    words = (
        "TFLOP/s in bfloat16 (B x H x S x D), with a cold cache; a causal mask halves the FLOPs. `pyfused` is what dispatch "
        "took before these numbers: now it takes `gluon` where that is the fastest of pyfused's. The H200 ran an older one."
    )
    return _table("Attention", words, ("", *found), rows)


def _backends(items: dict[str, list[dict]]) -> list[str]:
    """What was timed before there was evidence, when pyfused took another backend than it takes now."""
    found = {row["case"]: row["us"] for row in _of(items, "backends")}
    ways = list(dict.fromkeys(how for each in found.values() for how in each))
    rows = [[case, *(f"{each[how]:.0f}" if how in each else "" for how in ways)] for case, each in found.items()]
    words = "Microseconds in bfloat16, with a cold cache. Dispatch follows these. `eager` and `sdpa` are plain PyTorch."
    return _table("Backends beside plain PyTorch", words, ("", *ways), rows)


def _texts(items: dict[str, list[dict]]) -> list[str]:
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in _of(items, "generate", "transformers"):
        if "us_per_token" in row:
            how = row.get("backend") or f"transformers, {row['how']}"
            found.setdefault((row["model"], row["shape"]), {})[how] = row["us_per_token"]
    ways = list(dict.fromkeys(how for each in found.values() for how in each))
    rows = [[*key, *(f"{each[how]:.0f}" if how in each else "" for how in ways)] for key, each in found.items()]
    words = (
        "Microseconds for a token, in bfloat16, with random weights; a shape is texts x tokens of each x new tokens. pyfused's "
        "step is a CUDA graph; `cuda` has the kernel for a whole step in it. On the H200 `default` was timed before evidence "
        "chose that kernel for up to four rows, and the kernel is another by now."
    )
    return _table("Generating text", words, ("model", "shape", *ways), rows)


def _steps(items: dict[str, list[dict]]) -> list[str]:
    rows = [
        [row["model"], str(row["rows"]), f"{row['us_graph']:.0f}", f"{row['gb_per_s']:.0f}"]
        for row in _of(items, "decode")
        if "us_graph" in row
    ]
    words = "The CUDA kernel for a whole step, in a graph: microseconds on the device, and the weights' bytes in that time."
    return _table("A step in one kernel", words, ("model", "rows", "us", "GB/s"), rows)


def _kernels(items: dict[str, list[dict]]) -> list[str]:
    rows = [[row["kernel"], row["metrics"].get("Duration", "")] for row in _of(items, "profile")]
    return _table("Kernels by themselves", "By Nsight Compute, in bfloat16.", ("kernel", "duration"), rows)


def _host(items: dict[str, list[dict]]) -> list[str]:
    found: dict[str, dict[str, float]] = {}
    for row in _of(items, "host"):
        found.setdefault(row["operator"], {})[row["backend"]] = row["us"]
    ways = list(dict.fromkeys(how for each in found.values() for how in each))
    rows = [[f"`{name}`", *(f"{each[how]:.0f}" if how in each else "" for how in ways)] for name, each in found.items()]
    words = "Microseconds of CPU time for a call, on tensors so small that the GPU keeps up."
    return _table("The host", words, ("operator", *ways), rows)
