"""Does every speed in the documents come from a results file, and is none typed by hand?"""

import importlib.util
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
_spec = importlib.util.spec_from_file_location("publish", ROOT / "benchmarks" / "publish.py")
publish = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(publish)
import publish_chart  # noqa: E402
import publish_rows  # noqa: E402

# A time, a rate, a size in memory, or a ratio of speeds
UNITS = "us|µs|ms|seconds|MiB|GiB|GB/s|GFLOP/s|TFLOP/s|tokens/s|tok/s"
MEASURED = re.compile(rf"\d[\d.,]*\s*({UNITS})\b|\b\d[\d.]* times (as fast|faster|slower)|\bx\d\.\d")

PREDICTED = {ROOT / "docs" / "performance" / f"{name}_predicted.md" for name in ("h100", "amx")}  # no measurements, they say
GENERATED = {publish.SITE / name for name in ("index.md", "rows.md", "gpus.md")}
BY_HAND = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")),
    *sorted(set((ROOT / "docs").rglob("*.md")) - GENERATED - PREDICTED),
]


@pytest.fixture
def runs():
    found = publish.results()
    assert found
    return found


def test_the_documents_show_the_results_files(runs):
    """If this fails, run python benchmarks/publish.py."""
    for path, text in publish.written(runs).items():
        assert path.read_text() == text, path
    for found in runs:
        assert (publish.SITE / found["file"]).with_suffix(".png").is_file()


@pytest.mark.parametrize("path", BY_HAND, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_number_of_speed_is_typed_by_hand(path):
    text = path.read_text()
    if path == publish.README:
        text = publish.with_block(text, "")
    assert [m.group() for m in MEASURED.finditer(text)] == []


@pytest.mark.parametrize("text", ["it takes 3.2 us", "1.5 times as fast", "14 GB/s", "peak 300 MiB", "x1.35"])
def test_such_a_number_is_found(text):
    assert MEASURED.search(text)


def test_a_changed_number_is_found(runs):
    front = publish.front(runs)
    row = next(r for r in front["rows"] if r["benchmark"] == "attention" and r["case"] == "1x12x512x64 causal")
    row["ratio"][row["baseline"]] += 0.5
    changed = [path.name for path, text in publish.written(runs).items() if path.read_text() != text]
    assert changed == ["README.md", "index.md", "rows.md", "speed.svg"]


def test_a_readme_without_marks_is_refused():
    with pytest.raises(ValueError, match="lacks"):
        publish.with_block("no marks", "")


def test_the_front_page_is_of_the_quietest_run():
    """One CPU thread comes before several, and a CPU before a GPU, whatever the files' names."""

    def run(device, threads, rows):
        return {"device": device, "threads": threads, "rows": [{}] * rows}

    first = run("cpu", 1, 5)
    assert publish.front([run("cuda", 1, 9), run("cpu", 2, 9), run("cpu", 1, 3), first]) is first


def test_a_slow_row_is_named(runs):
    front = publish.front(runs)
    row = next(r for r in front["rows"] if r.get("interval"))
    name = f"{row['benchmark']} {row['case']} {row['dtype']}"
    row["ratio"][row["baseline"]], row["slow"] = 0.5, True
    assert name in publish.verdict(front).partition("not with that confidence")[0]
    assert name in publish.block(runs)
    row["slow"] = False  # its interval reaches further
    assert name in publish.verdict(front).partition("not with that confidence")[2]


def test_a_row_is_slow_below_what_bench_says():
    from pyfused.bench.run import LEAST

    assert publish_rows.LEAST == LEAST


def test_the_picture_has_a_bar_for_each_ratio(runs):
    front = publish.front(runs)
    bars = sum(len(by_dtype) for _, by_dtype in publish.charted(front))
    assert bars > 5
    picture = ElementTree.fromstring(publish.chart(front))
    rectangles = picture.findall("{http://www.w3.org/2000/svg}rect")
    assert len(rectangles) == bars + 3  # the background, and two colours of the legend


def test_the_readme_has_room_for_every_headline(runs):
    """Even with headlines for models not measured yet, it stays within the length that tests/test_documents.py allows."""
    readme = publish.README.read_text().splitlines()
    shown = sum(line.startswith("| ") for line in publish.block(runs).splitlines()) - 1
    assert len(readme) + len(publish.HEADLINES) - shown <= 130


def test_every_published_case_is_one_that_runs():
    from pyfused.bench import Setup
    from pyfused.bench.run import cases

    wanted = [(name, case) for _, name, case in publish_chart.CHART]
    for _, names, listed in publish.OPERATORS:
        wanted += [(name, case) for name in ([names] if isinstance(names, str) else names) for case in listed]
    for name in {name for name, _ in wanted}:
        assert {case for benchmark, case in wanted if benchmark == name} <= {c.name for c in cases(name, Setup())}
