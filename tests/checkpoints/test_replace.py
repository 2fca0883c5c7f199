"""Does a directory hold all of the old checkpoint or all of the new one, whatever happens while it is saved?"""

import json
import os
import resource
import signal
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

from pyfused import Backbone, FNetBackbone, GPT2Backbone, quantize_
from pyfused.checkpoints import open_checkpoint, replace

HERE = Path(__file__).parent
OLD = FNetBackbone(29, 2, 12, 20, max_sequence_length=16)
NEW = GPT2Backbone(29, 2, 3, 12, 20, max_sequence_length=16)


def content(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@pytest.fixture
def old(tmp_path):
    """A directory with an old checkpoint and files of the user's own."""
    OLD.save_to_preset(tmp_path / "model", tokenizer="fnet_tiny_en")
    (tmp_path / "model" / "logs").mkdir()
    (tmp_path / "model" / "logs" / "log.txt").write_text("a log")
    (tmp_path / "model" / "link").symlink_to("logs/log.txt")
    return tmp_path / "model"


@pytest.fixture(params=["exchange", "inside"])
def way(request, monkeypatch):
    """Both ways: exchanging directories, and moving files inside."""
    if request.param == "inside":
        monkeypatch.setattr(replace, "_exchange", lambda first, second: False)
    return request.param


@pytest.mark.parametrize("exchange", ["1", "0"])
def test_killed_at_any_line(tmp_path, exchange):
    command = [sys.executable, HERE / "kill_while_saving.py", tmp_path / "root", "24", exchange]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)["outcomes"]
    assert len(outcomes) == 24
    for outcome in outcomes:
        assert outcome["model"] == {"old": "fnet", "new": "gpt2"}.get(outcome["read"]), outcome
        assert outcome["raw"] in ("old", "new", *(["mixed"] * (exchange == "0"))), outcome
        assert outcome["left"] == [], outcome
        assert outcome["again"], outcome
    reached = Counter(outcome["read"] for outcome in outcomes)
    assert min(reached["old"], reached["new"]) >= 3


def test_what_stays_and_what_goes(old, way):
    held = content(old)
    (old / "generation_config.json").write_text("{}")
    NEW.save_to_preset(old, "keras")
    names = {name for name in content(old) if name != "tokenizer.json"}
    assert names == {
        "config.json",
        "metadata.json",
        "model.weights.h5",
        "logs/log.txt",
        "link",
        "generation_config.json",
    }
    assert content(old)["tokenizer.json"] == held["tokenizer.json"]  # there is no new one
    assert (old / "link").is_symlink()
    NEW.save_to_preset(old, "hf", tokenizer="gpt2_tiny_en", max_shard_size=5000)
    NEW.save_to_preset(old, "hf", max_shard_size=9000)
    index = json.loads((old / "model.safetensors.index.json").read_text())
    assert {path.name for path in old.glob("*.safetensors")} == set(index["weight_map"].values())
    assert not list(old.glob("*.h5"))
    assert [path.name for path in old.parent.iterdir()] == ["model"]
    assert isinstance(Backbone.from_preset(old), GPT2Backbone)


def test_weights_in_other_layouts_go_too(old, way):
    """A reader would take them: transformers pytorch_model.bin beside int8 weights, pyfused one of two variants."""
    names = [
        "model.fp16.safetensors",
        "model.fp16-00001-of-00002.safetensors",
        "model.safetensors.index.fp16.json",
        "pytorch_model.bin",
        "pytorch_model.fp16.bin",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
    ]
    mine = ["optimizer.bin", "logs/pytorch_model.bin", "adapter_model.safetensors", "model.onnx"]
    for name in names + mine:
        (old / name).write_bytes(b"old")
    model = GPT2Backbone(29, 2, 3, 12, 20, max_sequence_length=16)
    quantize_(model)
    model.save_to_preset(old)
    assert not set(names) & content(old).keys()
    assert set(mine) < content(old).keys()
    assert torch.equal(Backbone.from_preset(old).token_embedding.weight, model.token_embedding.weight)
    with pytest.raises(OSError, match="no file named"):
        transformers.GPT2Model.from_pretrained(old)


def test_a_model_is_saved_over_the_files_it_came_from(old, way):
    model = Backbone.from_preset(old)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = content(old)
    model.save_to_preset(old)
    assert content(old) == held
    model.save_to_preset(old, "keras", tokenizer=False)
    again = Backbone.from_preset(old).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in kept.items())


def test_links_and_the_working_directory(old, monkeypatch):
    link = old.parent / "link"
    link.symlink_to("model")
    NEW.save_to_preset(link)
    assert link.is_symlink()
    assert open_checkpoint(old).model == "gpt2"
    monkeypatch.chdir(old)
    before = old.stat().st_ino
    OLD.save_to_preset(".")
    assert old.stat().st_ino == before  # the process, and a shell, still stand in it
    assert open_checkpoint(Path.cwd()).model == "fnet"
    assert not list(old.glob(".*"))


def test_the_mode_stays(old):
    old.chmod(0o750)
    NEW.save_to_preset(old)
    assert stat.S_IMODE(old.stat().st_mode) == 0o750


def test_a_full_disk_leaves_the_old_one(old, way):
    """A limit on the size of files stands for the disk."""
    held = content(old)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for format in ("hf", "keras"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            with pytest.raises(
                OSError, match=r"model: the checkpoint cannot be saved: .*; what was there is unchanged"
            ):
                NEW.save_to_preset(old, format)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert content(old) == held
        assert [path.name for path in old.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("failing", ["_flush", "_put", "_change_places"])
def test_an_error_at_the_end_leaves_the_old_one(old, monkeypatch, failing):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    held = content(old)
    monkeypatch.setattr(replace, failing, fail)
    with pytest.raises(OSError, match="No space left on device"):
        NEW.save_to_preset(old)
    assert content(old) == held
    assert [path.name for path in old.parent.iterdir()] == ["model"]


def test_a_directory_that_nobody_may_write(tmp_path, monkeypatch):
    def refuse(self, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(self))

    (tmp_path / "model").mkdir()
    monkeypatch.setattr(Path, "mkdir", refuse)  # the tests may run as root, who may write everywhere
    with pytest.raises(PermissionError, match="model: the checkpoint cannot be saved: Permission denied"):
        NEW.save_to_preset(tmp_path / "model")
    assert not list((tmp_path / "model").iterdir())


def test_a_parent_that_nobody_may_write(old, monkeypatch):
    make = Path.mkdir

    def refuse_beside(self, *arguments, **options):
        if self.name.startswith(".model.saving") and self.parent == old.parent:
            raise PermissionError(13, "Permission denied", str(self))
        make(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse_beside)
    NEW.save_to_preset(old)
    assert open_checkpoint(old).model == "gpt2"
    assert not list(old.glob(".*"))


def test_a_file_in_its_place(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(OSError, match="model: the checkpoint cannot be saved: Not a directory"):
        NEW.save_to_preset(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_a_place_that_cannot_be(tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(OSError, match="circle: the checkpoint cannot be saved"):
        NEW.save_to_preset(tmp_path / "circle")
    with pytest.raises(ValueError, match=r"directory is 'a\\x00b': embedded null byte"):
        NEW.save_to_preset("a\0b")


@pytest.mark.parametrize("name, others", [("a*", "abc"), ("a[1]", "a1")])
def test_the_rest_of_a_killed_save_is_deleted_by_its_exact_name(tmp_path, name, others):
    own, other = (tmp_path / f".{n}.saving-00000000" for n in (name, others))
    for folder in (own, other):
        folder.mkdir()
        os.utime(folder, (0, 0))
    NEW.save_to_preset(tmp_path / name)
    assert (own.exists(), other.exists()) == (False, True)


def test_a_folder_of_another_running_save_stays(tmp_path):
    with replace.replacing(tmp_path / "model") as folder:
        os.utime(folder, (0, 0))
        NEW.save_to_preset(tmp_path / "model")
        assert folder.is_dir()
        (folder / "config.json").write_text("{}")
    assert content(tmp_path / "model") == {"config.json": b"{}"}


@pytest.mark.parametrize("name", ["../outside.json", "assets/tokenizer/merges.txt", "notes.txt"])
def test_a_made_up_commit_moves_nothing_elsewhere(old, name):
    """A directory from elsewhere may hold the folder of an interrupted save, with links that lead out of it."""
    outside = old.parent / "outside"
    outside.mkdir()
    (old / "assets").mkdir()
    (old / "assets" / "tokenizer").symlink_to(outside)
    place = old / ".pyfused-commit" / name.replace("../", "")
    place.parent.mkdir(parents=True)
    place.write_text("theirs")
    with pytest.raises(ValueError, match="a save was interrupted here, and its last step cannot be done"):
        open_checkpoint(old)
    assert not list(outside.iterdir())
