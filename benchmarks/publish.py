"""Writes what was measured into the README and benchmarks/results: `python benchmarks/publish.py [--run]`.

--run measures first, with one CPU thread and with all (`make bench` does). Every number and picture there comes from the files
that `pyfused bench --json` wrote; tests/test_publish.py holds that.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from pyfused.bench import report

RESULTS = Path(__file__).parent / "results"
README = RESULTS.parents[1] / "README.md"
BEGIN, END = "<!-- measured -->\n", "<!-- /measured -->\n"
DTYPES = "float32", "bfloat16", "float16"

# What the README shows of the operators: a label, the benchmark, and its cases.
OPERATORS = [
    ("layer_norm + residual, 1, 128, 512 rows of 768", "layer_norm", [f"{n}x768 residual" for n in (1, 128, 512)]),
    ("rms_norm + residual, the same", "rms_norm", [f"{n}x768 residual" for n in (1, 128, 512)]),
    ("layer_norm, rms_norm, forward and backward, 512 rows of 768", ("layer_norm", "rms_norm"), ["train 512x768"]),
    (
        "attention 1x12x512x64: plain, causal, dense bias",
        "attention",
        ["1x12x512x64" + v for v in ("", " causal", " dense bias")],
    ),
    ("the same with T5's bias, half padding", "attention", ["1x12x512x64" + v for v in (" T5 bias", " half padding")]),
    ("attention, packed: half of the batch were padding", "attention", ["packed 8 texts, 512 of 1024 tokens, 12x64"]),
    ("attention, one query of 12x64 on 160, 1024 keys", "attention", [f"one query 1x12x{n}x64" for n in (160, 1024)]),
    (
        "attention 1x12x512x64, forward and backward: plain, causal, T5's bias",
        "attention",
        ["train 1x12x512x64" + v for v in ("", " causal", " T5 bias")],
    ),
    ("linear 768 to 768, 1, 4, 16, 128 rows", "linear", [f"{n}x768 -> 768" for n in (1, 4, 16, 128)]),
    ("linear 768 to 50257, the same", "linear", [f"{n}x768 -> 50257" for n in (1, 4, 16, 128)]),
    ("ffn 768-3072-768, 1, 4, 16, 128, 512 rows", "ffn", [f"{n}x768x3072" for n in (1, 4, 16, 128, 512)]),
    ("gated_ffn 768-2048-768, the same", "gated_ffn", [f"{n}x768x2048" for n in (1, 4, 16, 128, 512)]),
    ("fourier_mix 2x512x768, 1x509x768", "fourier_mix", ["2x512x768", "1x509x768"]),
    ("relative_bias, 12 heads of 512x512", "relative_bias", ["12x512x512"]),
]
MODELS = "gpt2", "t5", "albert", "fnet", "fuse"


def results() -> list[dict]:
    """Every run, by the name of its file."""
    return [json.loads(path.read_text()) | {"file": path.name} for path in sorted(RESULTS.glob("*.json"))]


def rows_of(found: dict, benchmark: str) -> dict[tuple[str, str], dict]:
    """By case and dtype."""
    return {(r["case"], r["dtype"]): r for r in found["rows"] if r["benchmark"] == benchmark}


def ratio(row: dict | None) -> str:
    if row is None or row.get("baseline") not in row.get("ratio", {}):
        return "-"
    return f"{row['ratio'][row['baseline']]:.2f}{'~' if row['noisy'] else ''}"


def operators(found: dict) -> list[str]:
    lines = ["| work | " + " | ".join(DTYPES) + " |", "|---" * (len(DTYPES) + 1) + "|"]
    for label, names, cases in OPERATORS:
        cells = []
        for dtype in DTYPES:
            tables = [rows_of(found, name) for name in ([names] if isinstance(names, str) else names)]
            cells.append(", ".join(ratio(table.get((case, dtype))) for table in tables for case in cases))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def models(found: dict) -> list[str]:
    """A line for each case of a model; on a GPU, whose operators have other sizes, of an operator too."""
    lines = ["| work | dtype | pyfused, ms | times as fast as |", "|---|---|---|---|"]
    for name in MODELS if found["device"] == "cpu" else dict.fromkeys(row["benchmark"] for row in found["rows"]):
        for (case, dtype), row in rows_of(found, name).items():
            if "seconds" in row:
                peers = ", ".join(
                    f"{'transformers' if peer == 'eager' else peer} {value:.2f}" for peer, value in row["ratio"].items()
                )
                label = f"{name} {case}" if name != "fuse" else f"transformers' {case}, after `fuse_`"
                mark = "~" if row["noisy"] else ""
                lines.append(f"| {label} | {dtype} | {row['seconds']['pyfused'] * 1e3:.1f}{mark} | {peers} |")
    return lines


def others(found: dict) -> list[str]:
    """Compiled programs, host time, import, memory."""
    lines = []
    compiled = [
        r["ratio"]["not compiled"] for r in rows_of(found, "compile").values() if "not compiled" in r.get("ratio", {})
    ]
    if compiled:
        lines.append(
            f"- Compiled beside eager, {len(compiled)} models: {min(compiled):.2f} to {max(compiled):.2f}, "
            f"median {statistics.median(compiled):.2f}."
        )
    host = [r for r in rows_of(found, "host_overhead").values() if "undisturbed" in r]
    if host:
        own, plain = ([1e6 * r["undisturbed"][name] for r in host] for name in ("pyfused", "eager"))
        lines.append(
            f"- Host time of a call, undisturbed, {len(host)} kinds of call: {min(own):.1f} to {max(own):.1f} us "
            f"(plain PyTorch {min(plain):.1f} to {max(plain):.1f})."
        )
    for name in ("import", "memory"):
        for row in rows_of(found, name).values():
            if "values" in row:
                values = ", ".join(f"{provider} {value:.0f}" for provider, value in row["values"].items())
                lines.append(f"- {row['case']}, {row['unit']}: {values}.")
    return lines


def verdict(found: dict) -> str:
    """Which rows are below plain PyTorch."""
    checked = [r for r in found["rows"] if r.get("interval")]
    slow = [r for r in checked if r["slow"]]
    cut = f" ({found['left']} more were cut off)" if found["left"] else ""
    text = f"Of {len(checked)} rows{cut} beside plain PyTorch in the same dtype "
    if not slow:
        return text + "none is slower (below 0.97 with 95% confidence)."
    named = ", ".join(f"{r['benchmark']} {r['case']} {r['dtype']} ({ratio(r)})" for r in slow)
    return text + f"these are slower (below 0.97 with 95% confidence): {named}."


def block(runs: list[dict]) -> str:
    """What stands between the README's two marks."""
    lines = []
    for found in runs:
        threads = f"{found['threads']} thread{'s' * (found['threads'] > 1)}"
        limits = found["ceilings"]
        lines += [
            f"### Measured: {found['kind']}, {threads}, {found['date']}",
            "",
            f"torch {found['versions']['torch']}; this machine reads {limits['read_gb_per_s']:.0f} GB/s and multiplies "
            f"{limits['float32_gflop_per_s']:.0f} GFLOP/s in float32. Medians of interleaved runs, outputs checked; ~ noise, "
            f"- not measured. "
            f"Every row: [benchmarks/results](benchmarks/results/README.md).",
            "",
            verdict(found),
            "",
            "Times as fast as plain PyTorch in the same dtype (attention: scaled_dot_product_attention):",
            "",
            *([*operators(found), ""] if found["device"] == "cpu" else []),
            *models(found),
            "",
            *others(found),
            "",
        ]
    return "\n".join(lines)


def page(runs: list[dict]) -> str:
    """benchmarks/results/README.md: every row of every run."""
    lines = [
        "# Results",
        "",
        "Written by `python benchmarks/publish.py` from the files here; `pyfused bench --json` made those.",
        "",
    ]
    for found in runs:
        stem = Path(found["file"]).stem
        lines += [
            f"## {stem}",
            "",
            f"![bars and roofline]({stem}.png)",
            "",
            "```",
            report.head(found),
            report.table(found),
        ]
        lines += ["", report.summary(found, checked=True), "```", ""]
    return "\n".join(lines)


def with_block(text: str, new: str) -> str:
    """The README with a new block.

    Raises:
        ValueError: it has no marks.
    """
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"README.md lacks {BEGIN.strip()} or {END.strip()}")
    return f"{before}{BEGIN}{new}{END}{after}"


def run() -> None:
    """Measures this machine, a file for each number of threads."""
    from pyfused import evidence

    for threads in dict.fromkeys((1, os.cpu_count() or 1)):
        path = RESULTS / f"{evidence.kind()}_{threads}thread.json"
        command = [
            sys.executable,
            "-m",
            "pyfused.cli",
            "bench",
            "--device",
            "cpu",
            "--threads",
            str(threads),
            "--check",
        ]
        subprocess.run([*command, "--json", str(path)], check=False)


def main() -> None:
    from pyfused.bench.plot import plot

    if "--run" in sys.argv[1:]:
        run()
    runs = results()
    README.write_text(with_block(README.read_text(), block(runs)))
    (RESULTS / "README.md").write_text(page(runs))
    for found in runs:
        plot(found, RESULTS / f"{Path(found['file']).stem}.png")
    print(f"wrote {README.name} and benchmarks/results from {', '.join(found['file'] for found in runs)}")


if __name__ == "__main__":
    main()
