"""Writes what was measured into the documents: `python benchmarks/publish.py [--run]`.

--run measures first, with one CPU thread and with all (`make bench` does). Written are the README's block and picture, and
the site's pages docs/performance/index.md (tables), rows.md (every row) and gpus.md. Every number and picture there comes from
the files that `pyfused bench --json` and `make gpu-publish` wrote; tests/test_publish.py holds that.
"""

import os
import statistics
import subprocess
import sys
from pathlib import Path

import gpu_page
from publish_chart import chart, charted
from publish_rows import DTYPES, RESULTS, about_bfloat16, front, ratio, results, rows_of, threads_of, verdict

from pyfused.bench import report

ROOT = RESULTS.parents[1]
README = ROOT / "README.md"
SITE = ROOT / "docs" / "performance"
BEGIN, END = "<!-- measured -->\n", "<!-- /measured -->\n"

# Which lines of the picture the README gives as numbers.
HEADLINES = 0, 3, 4, 5, 6, 8, 13, 15, 16

# What the site's page shows of the operators: a label, the benchmark, and its cases.
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
# transformers' models before and after fuse_, and what the page calls them.
FUSED = {
    "fuse": "transformers'",
    "t5_bias": "a layer of transformers' T5,",
    "embedding": "MiniLM's embeddings of",
    "answer": "transformers' answer,",
}
MODELS = "gpt2", "t5", "albert", "fnet", *FUSED


def after_fuse(row: dict) -> str:
    return f"{FUSED[row['benchmark']]} {row['case']}, after `fuse_`"


def operators(found: dict) -> list[str]:
    lines = ["| work | " + " | ".join(DTYPES) + " |", "|---" * (len(DTYPES) + 1) + "|"]
    for label, names, cases in OPERATORS:
        cells = []
        for dtype in DTYPES:
            tables = [rows_of(found, name) for name in ([names] if isinstance(names, str) else names)]
            cells.append(", ".join(ratio(table.get((case, dtype))) for table in tables for case in cases))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if seconds > 1e-3 else f"{seconds * 1e3:.3f}"


def models(found: dict) -> list[str]:
    """A line for each case of a model; on a GPU, whose operators have other sizes, of an operator too."""
    lines = []
    for name in MODELS if found["device"] == "cpu" else dict.fromkeys(row["benchmark"] for row in found["rows"]):
        for (case, dtype), row in rows_of(found, name).items():
            if "seconds" in row:
                eager = "transformers" if name in MODELS else "eager"
                peers = ", ".join(f"{eager if peer == 'eager' else peer} {value:.2f}" for peer, value in row["ratio"].items())
                label = f"{name} {case}" if name not in FUSED else after_fuse(row)
                mark = "~" if row["noisy"] else ""
                lines.append(f"| {label} | {dtype} | {_milliseconds(row['seconds']['pyfused'])}{mark} | {peers} |")
    return ["| work | dtype | pyfused, ms | times as fast as |", "|---|---|---|---|", *lines] if lines else []


def others(found: dict) -> list[str]:
    """Compiled programs, host time, import, memory."""
    lines = []
    compiled = [
        r["ratio"]["not compiled"] for r in rows_of(found, "compile").values() if "not compiled" in r.get("ratio", {})
    ]
    if compiled:
        lines.append(
            f"- {len(compiled)} compiled models compared with eager ones: {min(compiled):.2f} to {max(compiled):.2f}, "
            f"median {statistics.median(compiled):.2f}."
        )
    host = [r for r in rows_of(found, "host_overhead").values() if "undisturbed" in r]
    if host:
        own, plain = ([1e6 * r["undisturbed"][name] for r in host] for name in ("pyfused", "eager"))
        lines.append(
            f"- Host time of a call, undisturbed, {len(host)} kinds of call: {min(own):.1f} to {max(own):.1f} us "
            f"(plain PyTorch {min(plain):.1f} to {max(plain):.1f})."
        )
    for row in found["rows"]:
        if "values" in row:
            label = after_fuse(row) if row["benchmark"] in FUSED else row["case"]
            values = ", ".join(f"{provider} {value:.0f}" for provider, value in row["values"].items())
            lines.append(f"- {label}, {row['unit']}: {values}.")
    return lines


def block(runs: list[dict]) -> str:
    """What stands between the README's two marks."""
    found = front(runs)
    charts = charted(found)
    lines = [
        f"Measured on `{found['kind']}`, {threads_of(found)}, torch {found['versions']['torch']}, {found['date']}. Medians of "
        f"interleaved runs, outputs checked; ~ marks noise.{about_bfloat16(found)}",
        "",
        verdict(found) + ("" if any(run["device"] == "cuda" for run in runs) else " No GPU has been measured yet."),
        "",
        "| times as fast as plain PyTorch | float32 | bfloat16 |",
        "|---|---|---|",
    ]
    for label, row in (charts[place] for place in HEADLINES):
        if row:
            lines.append(f"| {label} | {ratio(row.get('float32'))} | {ratio(row.get('bfloat16'))} |")
    lines += ["", "![How many times as fast as plain PyTorch, by operator](docs/performance/speed.svg)", ""]
    return "\n".join(lines)


def tables(runs: list[dict]) -> str:
    """docs/performance/index.md."""
    lines = [
        "# Performance",
        "",
        "This page is written by `python benchmarks/publish.py` from the files in `benchmarks/results`. Nobody types a number "
        "here. `pyfused bench --json` wrote those files; [Benchmarking](../guides/benchmarking.md) says how it measures, and "
        "[Every row](rows.md) has all rows and the peers.",
        "",
        "A ratio is the time of plain PyTorch over the time of pyfused: above 1 pyfused is faster. Both ran in turn, in one "
        "process, on the same inputs, and the outputs were checked first. ~ marks noise; - was not measured.",
        "",
        "![How many times as fast as plain PyTorch](speed.svg)",
        "",
    ]
    for found in runs:
        limits = found["ceilings"]
        lines += [
            f"## {found['kind']}, {threads_of(found)}",
            "",
            f"{found['date']}, pyfused {found['versions']['pyfused']}, torch {found['versions']['torch']}. This machine reads "
            f"{limits['read_gb_per_s']:.0f} GB/s and multiplies {limits['float32_gflop_per_s']:.0f} GFLOP/s in float32."
            f"{about_bfloat16(found)}",
            "",
            verdict(found),
            "",
        ]
        if found["device"] == "cpu":
            lines += [
                "Operators, compared with plain PyTorch in the same dtype (attention: scaled_dot_product_attention):",
                "",
            ]
            lines += [*operators(found), ""]
        for part in models(found), others(found):
            lines += [*part, ""] if part else []
    if not any(found["device"] == "cuda" for found in runs):
        lines += [
            "## GPUs",
            "",
            "No GPU has been measured yet. What the CUDA kernels should take on an H100 is a [prediction](h100_predicted.md).",
            "",
        ]
    return "\n".join(lines)


def page(runs: list[dict]) -> str:
    """docs/performance/rows.md: every row of every run."""
    lines = [
        "# Every row",
        "",
        "This page is written by `python benchmarks/publish.py` from the files in `benchmarks/results`, which "
        "`pyfused bench --json` wrote.",
        "",
        "`spread` is the middle half of the times over their median, `one` a single round of more than 30 s. `ceiling` is the "
        "share of what this machine's memory and arithmetic allow; data that stays in caches gives more than 100%. `~` marks "
        "noise, `slow` a row below plain PyTorch.",
        "",
    ]
    for found in runs:
        stem = Path(found["file"]).stem
        lines += [f"## {stem}", "", f"![bars and roofline]({stem}.png)", "", "```text"]
        lines += [report.head(found), report.table(found), "", report.summary(found, checked=True), "```", ""]
    return "\n".join(lines)


def written(runs: list[dict]) -> dict[Path, str]:
    """Every document that follows from the results, and its text."""
    return {
        README: with_block(README.read_text(), block(runs)),
        SITE / "index.md": tables(runs),
        SITE / "rows.md": page(runs),
        SITE / "gpus.md": gpu_page.page(gpu_page.results()),
        SITE / "speed.svg": chart(front(runs)),
    }


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
    for path, text in written(runs).items():
        path.write_text(text)
    for found in runs:
        plot(found, SITE / f"{Path(found['file']).stem}.png")
    print(f"wrote {README.name} and {SITE.relative_to(ROOT)} from {', '.join(found['file'] for found in runs)}")


if __name__ == "__main__":
    main()
