"""Is every number of speed in the README and in benchmarks/results from a results file, and none typed by hand?"""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("publish", ROOT / "benchmarks" / "publish.py")
publish = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(publish)

# A time, a rate, a size in memory, or a ratio of speeds
UNITS = "us|µs|ms|seconds|MiB|GiB|GB/s|GFLOP/s|TFLOP/s|tokens/s|tok/s"
MEASURED = re.compile(rf"\d[\d.,]*\s*({UNITS})\b|\b\d[\d.]* times (as fast|faster|slower)|\bx\d\.\d")


def test_the_readme_shows_the_results_files():
    """Where this fails: python benchmarks/publish.py."""
    runs = publish.results()
    assert runs
    readme = publish.README.read_text()
    assert publish.with_block(readme, publish.block(runs)) == readme
    assert (publish.RESULTS / "README.md").read_text() == publish.page(runs)
    for found in runs:
        assert (publish.RESULTS / found["file"]).with_suffix(".png").is_file()


def test_no_number_of_speed_is_typed_by_hand():
    readme = publish.with_block(publish.README.read_text(), "")
    assert [m.group() for m in MEASURED.finditer(readme)] == []


@pytest.mark.parametrize("text", ["it takes 3.2 us", "1.5 times as fast", "14 GB/s", "peak 300 MiB", "x1.35"])
def test_such_a_number_is_found(text):
    assert MEASURED.search(text)


def test_a_changed_number_is_found():
    runs = publish.results()
    readme = publish.README.read_text()
    row = next(r for r in runs[0]["rows"] if r["benchmark"] == "attention" and r["case"] == "1x12x512x64")
    row["ratio"][row["baseline"]] += 0.5
    assert publish.with_block(readme, publish.block(runs)) != readme


def test_a_readme_without_marks_is_refused():
    with pytest.raises(ValueError, match="lacks"):
        publish.with_block("no marks", "")


def test_every_published_case_is_one_that_runs():
    from pyfused.bench import Setup
    from pyfused.bench.run import cases

    for _, names, wanted in publish.OPERATORS:
        for name in [names] if isinstance(names, str) else names:
            assert set(wanted) <= {case.name for case in cases(name, Setup())}
