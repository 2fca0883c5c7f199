"""Is every damaged file an error that names it, or a checkpoint all the same: no crash, no hang, nothing half loaded?

The damage comes from seeds that the tests print. Files that Python reads are read in this process, each within a generous
limit; h5 files and pickles are read as users' are, in child processes, many to a child.
"""

import json
import shutil
import signal
from contextlib import contextmanager

import pytest
import torch
from mutations import mutants
from safetensors.torch import load_file

from pyfused import GPT2Backbone, Tokenizer
from pyfused.checkpoints import apart, hf, keras, open_checkpoint
from pyfused.checkpoints.presets import bundled_directory
from pyfused.models.backbone import Backbone

HANG = 20.0  # seconds of computing for one file; the slowest takes 0.1
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@contextmanager
def limited(what):
    """A test that hangs fails, and says on what."""

    def stop(*_):
        raise AssertionError(f"no end to {what}")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, HANG)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def survive(directory, file, content, read):
    """Whether ``read`` takes the folder with this content of a file. All it may raise is a ValueError that names the folder."""
    (directory / file).write_bytes(content)
    try:
        with limited(f"{file}: {content!r:.300}"):
            read(directory)
    except ValueError as error:
        if str(directory) not in str(error):
            raise AssertionError(f"the error names no file: {error}") from error
        return False
    return True


def read_all(directory):
    checkpoint = open_checkpoint(directory)
    for name, tensor in checkpoint.tensors():
        assert tuple(tensor.shape) == checkpoint.shapes[name]


def read_configuration(directory):
    open_checkpoint(directory, weights=False)
    Backbone.from_preset(directory, load_weights=False, device="meta")


def read_tokenizer(directory):
    tokenizer = Tokenizer.from_preset(directory)
    tokenizer.decode(tokenizer.encode("In the beginning God created 1234 é!"))


@pytest.mark.parametrize(
    "name, upto", [("hf_gpt2", 3000), ("hf_t5", 6000), ("hf_albert_mlm", 5000), ("hf_fnet_pretraining", 4000)]
)
def test_safetensors(preset, name, upto):
    directory = preset(name)
    good = (directory / "model.safetensors").read_bytes()
    loaded = [survive(directory, "model.safetensors", bad, read_all) for bad in mutants(good, 120, seed=1, upto=upto)]
    assert not all(loaded)


def test_a_module_stays_as_it_was(preset):
    """load_into either loads everything or changes nothing."""
    directory = preset("hf_gpt2")
    path = directory / "model.safetensors"
    config = open_checkpoint(directory).config
    good = path.read_bytes()
    module = GPT2Backbone(**config)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    refused = 0
    for bad in mutants(good, 120, seed=7, upto=3000):
        if not survive(directory, path.name, bad, lambda folder: open_checkpoint(folder).load_into(module)):
            refused += 1
            assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
        for name, tensor in module.state_dict().items():
            tensor.copy_(before[name])
    assert refused > 50


@pytest.mark.parametrize(
    "name",
    [
        "hf_gpt2",
        "hf_t5",
        "hf_albert_mlm",
        "hf_fnet_pretraining",
        "keras_gpt2",
        "keras_t5",
        "keras_albert",
        "keras_fnet",
    ],
)
def test_configurations(preset, name):
    directory = preset(name)
    good = (directory / "config.json").read_bytes()
    loaded = [survive(directory, "config.json", bad, read_configuration) for bad in mutants(good, 60, seed=2)]
    assert not all(loaded)


def test_indices_of_shards(preset):
    directory = preset("hf_t5_sharded")
    good = (directory / "model.safetensors.index.json").read_bytes()
    for bad in mutants(good, 80, seed=3):
        survive(directory, "model.safetensors.index.json", bad, read_all)


@pytest.mark.parametrize("name", ["gpt2_tiny_en", "t5_tiny_en", "albert_tiny_en", "fnet_tiny_en"])
def test_tokenizers(tmp_path, name):
    directory = tmp_path / name
    shutil.copytree(bundled_directory() / name, directory)
    good = (directory / "tokenizer.json").read_bytes()
    for bad in mutants(good, 60, seed=4):
        survive(directory, "tokenizer.json", bad, read_tokenizer)


def test_vocabularies_and_merges(tmp_path):
    words = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4, "Ġa": 5}
    for file, good in (("vocab.json", json.dumps(words).encode()), ("merges.txt", b"#version: 0.2\na b\n\xc4\xa0 a\n")):
        (tmp_path / "vocab.json").write_text(json.dumps(words))
        (tmp_path / "merges.txt").write_bytes(b"a b\n")
        for bad in mutants(good, 60, seed=5):
            survive(tmp_path, file, bad, lambda folder: Tokenizer.from_preset(folder).encode("ab a"))


def read_by_children(reader, paths, monkeypatch):
    """Every file's answer. A file that a child died of has none, and the next child goes on behind it."""
    monkeypatch.setattr(apart, "SECONDS", 0.5)
    answers, died = [], []
    while len(answers) < len(paths):
        some, ended = apart._ask(reader, paths[len(answers) :])
        answers += some
        if len(answers) < len(paths):
            assert ended.startswith(("did not finish", "broke off")), ended
            died.append(paths[len(answers)])
            answers.append(None)
    print(f"{len(died)} of {len(paths)} files ended a child")
    return answers


def check_answers(directory, file, answers, contents, monkeypatch):
    """What the parent makes of each answer: again a ValueError that names the file, or a checkpoint."""
    loaded = 0
    for answer, content in zip(answers, contents, strict=True):
        given = ([], "broke off") if answer is None else ([answer], "")
        monkeypatch.setattr(apart, "_ask", lambda reader, paths, given=given: given)
        loaded += survive(directory, file, content, read_all)
    assert 0 < loaded < len(answers)


@pytest.mark.parametrize("name, upto", [("keras_gpt2", 40_000), ("keras_t5", None)])
def test_h5(preset, tmp_path, monkeypatch, name, upto):
    directory = preset(name)
    good = (directory / keras.WHOLE).read_bytes()
    contents = list(mutants(good, 250, seed=5, upto=upto))
    paths = [tmp_path / f"{i}.h5" for i in range(len(contents))]
    for path, content in zip(paths, contents):
        path.write_bytes(content)
    answers = read_by_children("h5", paths, monkeypatch)
    check_answers(directory, keras.WHOLE, answers, contents, monkeypatch)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles(preset, tmp_path, monkeypatch, legacy):
    directory = preset("hf_gpt2")
    path = directory / hf.PICKLED
    torch.save(load_file(directory / hf.WHOLE), path, _use_new_zipfile_serialization=not legacy)
    (directory / hf.WHOLE).unlink()
    contents = list(mutants(path.read_bytes(), 300, seed=6, upto=None if not legacy else 5000))
    paths = [tmp_path / f"{i}.bin" for i in range(len(contents))]
    for bad, content in zip(paths, contents):
        bad.write_bytes(content)
    answers = read_by_children("pickled", paths, monkeypatch)
    check_answers(directory, hf.PICKLED, answers, contents, monkeypatch)
