"""Which files does a run on a GPU turn into, and does a wrong backend get no evidence?"""

import json
import re

import pytest
from gpu_results import gpu_publish

from pyfused import evidence


def a_run(folder):
    """Results with two operators tuned: ffn's CUDA kernel is wrong in one case, rms_norm was judged in Triton alone."""

    def judged(item, operator, backend, *oks, status="ok"):
        rows = [{"item": item, "operator": operator, "backend": backend, "dtype": "float32", "ok": ok} for ok in oks]
        return [*rows, {"item": item, "status": status, "seconds": 1.0, "said": ""}]

    def tuned(operator):
        line = {"operator": operator, "function": "forward", "dtype": "bfloat16", "shapes": "large", "threads": 1}
        speed = {"reference": {"16": 1.1}, "triton": {"16": 2.0}, "cuda": {"16": 3.0}}
        line |= {"date": "2026-11-26", "torch": "2.11.0", "speed": speed}
        return {"item": "tune", "line": line}

    about = {
        "item": "environment",
        "device": "NVIDIA H100",
        "kind": "cuda_nvidia_h100",
        "versions": {"torch": "2.11.0"},
    }
    rows = [
        about,
        {"item": "environment", "ceilings": {"copy_gb_per_s": 3000.0}},
        {"item": "environment", "status": "ok"},
        *judged("correct ffn triton", "ffn", "triton", True, True, None),
        *judged("correct ffn cuda", "ffn", "cuda", True, False, status="failed"),
        *judged("correct rms_norm triton", "rms_norm", "triton", True),
        *judged("correct rms_norm cuda", "rms_norm", "cuda", True, status="timeout"),
        tuned("ffn"),
        tuned("rms_norm"),
        tuned("linear"),
        {"item": "tune", "status": "ok"},
        {
            "item": "tune",
            "tile": {"kernel": "attention_forward", "dtype": "half", "case": "", "tile": {"BLOCK_M": 128}},
        },
        {"item": "bench", "cases": 1, "bench": {"rows": [{"case": "16x768", "ratio": {"torch": 1.5}}]}},
        {"item": "bench", "status": "ok"},
        {"item": "generate gpt2", "model": "gpt2", "us_per_token": 230.0, "at": 100.0},
        {"item": "generate gpt2", "status": "ok"},
    ]
    folder.mkdir()
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_what_was_wrong_or_not_judged_gets_no_evidence(tmp_path):
    before = tmp_path / "benchmarks" / "results" / "cuda_nvidia_h100.json"
    before.parent.mkdir(parents=True)
    kept, replaced = ({"benchmark": name, "case": case} for name, case in (("gpt2", "token"), (None, "16x768")))
    before.write_text(json.dumps({"rows": [kept, replaced], "left": 3}))
    made, items, benchmarks = gpu_publish.publish([a_run(tmp_path / "run")], tmp_path)
    assert made == tmp_path / "pyfused" / "evidence" / "cuda_nvidia_h100.json"
    content = json.loads(made.read_text())
    assert content["kind"] == "cuda_nvidia_h100"
    assert content["checked"] == {"ffn": {"triton": 2}, "rms_norm": {"triton": 1}}
    assert [tile["kernel"] for tile in content["tiles"]] == ["attention_forward"]
    assert [line["operator"] for line in content["lines"]] == ["ffn", "rms_norm"]
    for line in content["lines"]:
        assert evidence.line_from(line, "a file").at(16) == {"reference": 1.1, "triton": 2.0}
    assert benchmarks == before
    assert json.loads(before.read_text()) == {"rows": [kept, {"case": "16x768", "ratio": {"torch": 1.5}}], "left": 0}
    found = json.loads(items.read_text())
    assert found["ceilings"] == {"copy_gb_per_s": 3000.0}
    assert found["items"]["generate gpt2"] == [{"model": "gpt2", "us_per_token": 230.0}]


def test_a_second_run_adds_to_the_first(tmp_path):
    """Once ffn's CUDA kernel is right, its line has both backends; lines that were not run again stay."""
    run = a_run(tmp_path / "run")
    gpu_publish.publish([run], tmp_path)
    text = (run / "results.jsonl").read_text()
    again = [line for line in text.splitlines() if not re.search("rms_norm|generate|bench|tile", line)]
    (run / "results.jsonl").write_text("\n".join(again).replace("false", "true").replace("failed", "ok") + "\n")
    made, items = gpu_publish.publish([run], tmp_path)
    content = json.loads(made.read_text())
    lines = {line["operator"]: sorted(line["speed"]) for line in content["lines"]}
    assert lines == {"ffn": ["cuda", "reference", "triton"], "rms_norm": ["reference", "triton"]}
    assert content["tiles"]
    assert "generate gpt2" in json.loads(items.read_text())["items"]


def test_runs_of_two_kinds_are_not_mixed(tmp_path):
    one = a_run(tmp_path / "one")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "results.jsonl").write_text((one / "results.jsonl").read_text().replace("_h100", "_h200"))
    with pytest.raises(ValueError, match="cuda_nvidia_h200"):
        gpu_publish.publish([one, tmp_path / "two"], tmp_path)
