"""Do `pyfused presets` and `pyfused download` say what there is, and where?"""

import json
from pathlib import Path

import pytest

from pyfused import Backbone
from pyfused.checkpoints import progress
from pyfused.cli import main
from pyfused.families import FAMILIES


@pytest.fixture
def cache(monkeypatch, tmp_path, golden):
    """Kaggle's cache, with one preset in it."""
    root = tmp_path / "models" / "keras" / "gpt2" / "keras" / "gpt2_base_en"
    root.mkdir(parents=True)
    (root / "3").symlink_to(golden / "ckpt" / "keras_gpt2")
    (root / "3.complete").touch()
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path))
    return root / "3"


def bytes_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def test_presets_as_json(capsys, cache):
    assert main(["presets", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["presets"]}
    assert rows.keys() == Backbone.presets.keys()
    published = {preset.name: preset for family in FAMILIES.values() for preset in family.presets}
    for name, row in rows.items():
        where = "cached" if name == "gpt2_base_en" else "remote" if name in published else "bundled"
        assert row["where"] == where, name
        assert (row["directory"] is None) == (row["bytes"] is None) == (where == "remote")
        if name in published:
            assert row["parameters"] == published[name].parameters
            assert row["source"].startswith("kaggle://keras/")
            assert row["hf_repo"] == published[name].hf_repo
        else:
            model = Backbone.from_preset(name)
            assert row["parameters"] == sum(parameter.numel() for parameter in model.parameters())
            assert row["source"] == "pyfused"
    assert rows["gpt2_base_en"]["directory"] == str(cache)
    assert rows["gpt2_base_en"]["bytes"] == bytes_of(cache)


def test_presets_as_a_table(capsys, cache):
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["preset", "family", "parameters", "size", "where", "source"]
    assert len(lines) == 1 + len(Backbone.presets)
    (line,) = (line for line in lines if line.startswith("f_net_large_en "))
    assert line.split() == ["f_net_large_en", "fnet", "236,945,408", "~948", "MB", "remote",
                            "kaggle://keras/f_net/keras/f_net_large_en/3"]  # fmt: skip
    assert any(line.split()[5:6] == ["cached"] for line in lines)


def test_download(capsys, cache):
    assert main(["download", "gpt2_base_en"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(str(cache))
    assert out.rstrip().endswith(f"in {len(list(cache.iterdir()))} files")
    assert main(["download", "t5_tiny_en", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["preset"] == "t5_tiny_en"
    assert facts["bytes"] == bytes_of(Path(facts["directory"]))
    assert main(["download", "no_such_preset"]) == 2
    assert "no preset has this name" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["download", "gpt2_tiny_en"], ["encode", "albert_tiny_en", "--text", "a"]])
def test_quiet(capsys, monkeypatch, arguments):
    seen = []
    monkeypatch.setattr(progress, "_FROM_BYTES", 1)
    monkeypatch.setattr("pyfused.checkpoints.presets.bundled_presets", watched(seen))
    for options in ([], ["--quiet"]):
        assert main([*arguments, *options]) == 0
    assert set(seen[: len(seen) // 2]) == {False}
    assert set(seen[len(seen) // 2 :]) == {True}
    assert capsys.readouterr().err == ""


def watched(seen):
    """The function that finds presets; it notes whether quiet is in force."""
    from pyfused.checkpoints.presets import bundled_presets

    def found():
        seen.append(progress._quiet.get())
        return bundled_presets()

    return found
