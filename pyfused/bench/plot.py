"""What does a run look like? A picture with bars (every peer's time over pyfused's) and this machine's roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

OWN, PLAIN = "#1f6fb4", "#c05a28"
COLOURS = (PLAIN, "#5b9e5b", "#8a6bb1", "#b8933a", "#4fa3a5", "#b0567f", "#777777")


def plot(result: dict[str, Any], path: str | Path, title: str = "") -> None:
    """Writes the picture. The path's ending gives the format.

    Args:
        result: what bench() returns.
        path: a file for the picture, such as "bench.png".

    Raises:
        ValueError: matplotlib is not installed, there is no row to draw, or the format is unknown.
    """
    pyplot = _pyplot()
    rows = [row for row in result["rows"] if row.get("ratio")]
    if not rows:
        raise ValueError("--plot: there is no row to draw")
    peers = list(dict.fromkeys(name for row in rows for name in row["ratio"]))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(peers)}
    height = max(5.0, 0.16 * sum(len(row["ratio"]) for row in rows) + 0.1 * len(rows) + 1.5)
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(17, min(height, 300)), gridspec_kw={"width_ratios": [3, 2]}, layout="constrained"
    )
    _bars(left, rows, colour)
    _roofline(right, rows, result["ceilings"])
    threads = f"{result['threads']} thread{'s' * (result['threads'] > 1)}"
    figure.suptitle(
        title or f"pyfused {result['versions']['pyfused']} on {result['kind']}, {threads}, {result['date']}"
    )
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def drawable(path: str | Path) -> None:
    """Checks before the measurements that plot() will be able to write this file.

    Raises:
        ValueError: matplotlib is not installed or does not know the format.
    """
    kinds = _pyplot().figure().canvas.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in kinds:
        raise ValueError(f"--plot is {str(path)!r}; it takes a name that ends in one of {', '.join(sorted(kinds))}")
    _pyplot().close("all")


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install 'pyfused[bench]'") from None
    matplotlib.use("agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def _bars(axes: Any, rows: list[dict[str, Any]], colour: dict[str, str]) -> None:
    """A group of bars for each row: how many times as fast as each peer pyfused is."""
    place, ticks, labels = 0.0, [], []
    longest = 6.0
    for row in rows:
        first = place
        for name, ratio in row["ratio"].items():
            axes.barh(place, min(ratio, longest), 0.9, color=colour[name])
            axes.text(min(ratio, longest) + 0.03, place, f"{ratio:.2f}", va="center", fontsize=7)
            place += 1
        ticks.append((first + place - 1) / 2)
        labels.append(f"{row['benchmark']} {row['case']} {row['dtype']}")
        place += 0.7
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.set_ylim(place, -1)
    axes.set_xlim(0, longest + 0.6)
    axes.axvline(1, color=OWN, linewidth=1.5)
    axes.set_xlabel("time of the peer / time of pyfused (right of the line: pyfused is faster)")
    for name, shade in colour.items():
        axes.barh([-9], [0], color=shade, label=name)
    axes.legend(loc="upper right", fontsize=8)


def _roofline(axes: Any, rows: list[dict[str, Any]], limits: dict[str, float]) -> None:
    """GFLOP/s over FLOPs per byte, of pyfused and plain PyTorch, below the limits measured in the same run."""
    drawn = [row for row in rows if row.get("flops") and row.get("bytes")]
    for row in drawn:
        at = row["flops"] / row["bytes"]
        own, plain = row["seconds"]["pyfused"], row["seconds"].get(row["baseline"])
        if plain:
            axes.plot(
                [at, at], [row["flops"] / t / 1e9 for t in (own, plain)], color="#bbbbbb", linewidth=0.6, zorder=1
            )
            axes.plot(at, row["flops"] / plain / 1e9, "o", color=PLAIN, markersize=3, zorder=2)
        axes.plot(at, row["flops"] / own / 1e9, "o", color=OWN, markersize=4, zorder=3)
    bandwidth = max(limits["read_gb_per_s"], limits["copy_gb_per_s"])
    ends = [row["flops"] / row["bytes"] for row in drawn] or [1.0]
    low, high = min(ends) / 2, max(max(ends) * 2, 100.0)
    for name, rate in limits.items():
        if name.endswith("_gflop_per_s"):
            knee = rate / bandwidth
            axes.plot([low, knee, high], [low * bandwidth, rate, rate], "--", color="#444444", linewidth=1)
            axes.text(
                high, rate * 1.05, f"{name.removesuffix('_gflop_per_s')}: {rate:.0f} GFLOP/s", ha="right", fontsize=8
            )
    axes.text(low, low * bandwidth * 1.3, f"{bandwidth:.0f} GB/s", fontsize=8)
    axes.plot([], [], "o", color=OWN, markersize=4, label="pyfused")
    axes.plot([], [], "o", color=PLAIN, markersize=3, label="plain PyTorch")
    axes.set(
        xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="GFLOP/s", title="roofline (above it: in caches)"
    )
    axes.legend(loc="lower right", fontsize=8)
