"""Is a preset found where it should be, and does the error say what could have been meant?"""

import builtins
import sys
import types
from pathlib import Path

import huggingface_hub
import pytest
import torch

import pyfused
from pyfused import Backbone
from pyfused.checkpoints import open_checkpoint, presets, presets_of, resolve_preset
from pyfused.families import FAMILIES

HEAD = {"token_embedding.reverse_weight"}


@pytest.fixture
def without(monkeypatch):
    """Makes the import of some packages fail."""

    def remove(*names):
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    return remove


class NotThere(OSError):
    """Kaggle's answer for a file that it does not have."""

    response = types.SimpleNamespace(status_code=404)


@pytest.fixture
def hub(monkeypatch, golden, tmp_path):
    """Clients that note what they are asked for and hand out a golden directory."""
    calls = []
    kaggle = types.ModuleType("kagglehub")

    def snapshot_download(repo_id, revision, allow_patterns, tqdm_class):
        calls.append((repo_id if revision is None else f"{repo_id}@{revision}", allow_patterns))
        return str(golden / "ckpt" / "hf_gpt2")

    def model_download(handle, path=None):
        calls.append((handle, path))
        found = golden / "ckpt" / "keras_gpt2_task" / (path or "")
        if not found.exists():
            raise NotThere(f"404\n{path}")
        return str(found)

    kaggle.model_download = model_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setitem(sys.modules, "kagglehub", kaggle)
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kaggle"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hugging_face"))
    return calls


def test_local_directories(golden, tmp_path):
    directory = golden / "ckpt" / "hf_gpt2"
    assert resolve_preset(directory) == resolve_preset(str(directory)) == directory
    with pytest.raises(ValueError, match=r"not a preset, it has no config.json"):
        open_checkpoint(tmp_path)
    contents = {"{}": "neither a Hugging Face configuration", "[1]": "holds a JSON list"}
    contents |= dict.fromkeys(["{", "\udcff", "[" * 10**5, "9" * 10**5], "cannot be read as JSON")
    for content, said in contents.items():
        (tmp_path / "config.json").write_text(content, errors="surrogateescape")
        with pytest.raises(ValueError, match=rf"config.json: .*{said}"):
            open_checkpoint(tmp_path)


def test_bundled_names_come_first(monkeypatch, tmp_path, golden, preset):
    monkeypatch.setattr(presets, "bundled_directory", lambda: tmp_path)
    directory = preset("hf_gpt2")
    assert resolve_preset("hf_gpt2") == directory
    assert presets_of({"gpt2"})["hf_gpt2"]["metadata"]["path"] == "gpt2"
    assert "hf_gpt2" not in presets_of({"t5"})
    with pytest.raises(ValueError, match=r"'../hf_gpt2', but no preset has this name"):
        resolve_preset("../hf_gpt2")


def test_nothing_matches(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("no_such_preset", str(tmp_path / "file"), ""):
        with pytest.raises(
            ValueError, match=r"no preset has this name .*pyfused.Backbone.presets lists all .* the directory "
        ):
            resolve_preset(name)
    with pytest.raises(ValueError, match="a Hugging Face repository is written hf://openai-community/gpt2"):
        resolve_preset("openai-community/gpt2")
    with pytest.raises(ValueError, match=r"'modelscope://a/b': unknown source; it takes hf:// or kaggle://"):
        resolve_preset("modelscope://a/b")
    for handle in ("hf://gpt2", "hf://a/b@", "hf://a/b@../c", "hf://a/b@x y", "hf://"):
        with pytest.raises(ValueError, match="written hf://owner/repo or hf://owner/repo@revision"):
            resolve_preset(handle)
    for handle in ("kaggle://keras/gpt2", "kaggle://a/b/c/d/newest", "kaggle://a/../c/d", "kaggle://a/b/c/d/0"):
        with pytest.raises(ValueError, match=r"written kaggle://owner/model/framework/variation\[/version\]"):
            resolve_preset(handle)
    with pytest.raises(TypeError, match="preset must be a name or the path of a directory, got int"):
        resolve_preset(3)


@pytest.mark.parametrize(
    "name, near",
    [("gpt2-tiny-en", "gpt2_tiny_en"), ("T5_tiny", "t5_tiny_en"), ("flan_t5_base", "flan_base_multi"),
     ("gpt2_medium", "gpt2_medium_en"), ("fnet_base_en", "f_net_base_en")],
)  # fmt: skip
def test_an_unknown_name_brings_the_nearest_ones(name, near):
    with pytest.raises(ValueError, match=f"nearest: .*{near}") as caught:
        resolve_preset(name)
    assert len(str(caught.value)) < 300
    assert near in Backbone.presets


def test_hugging_face(hub, golden):
    assert open_checkpoint("hf://openai-community/gpt2").directory == golden / "ckpt" / "hf_gpt2"
    repo, patterns = hub.pop()
    assert repo == "openai-community/gpt2"
    assert {"config.json", "model.safetensors", "model.weights.h5", "vocab.json"} <= set(patterns)
    assert not any("bin" in pattern for pattern in patterns)
    open_checkpoint("hf://openai-community/gpt2", weights=False)
    assert hub.pop() == ("openai-community/gpt2", ["config.json"])
    open_checkpoint("hf://openai-community/gpt2@refs/pr/1", weights=False)
    assert hub.pop() == ("openai-community/gpt2@refs/pr/1", ["config.json"])


def test_kaggle(hub, golden):
    directory = golden / "ckpt" / "keras_gpt2_task"
    handle = "keras/gpt2/keras/gpt2_base_en/3"
    assert open_checkpoint("gpt2_base_en").directory == directory
    assert hub.pop() == (handle, None)
    assert open_checkpoint(f"kaggle://{handle}", weights=False).directory == directory
    assert hub.pop() == (handle, "config.json")
    assert resolve_preset(f"kaggle://{handle}", "tokenizer") == directory
    assert {path for _, path in hub} >= {"tokenizer.json", "assets/tokenizer/merges.txt", "vocab.json"}


def test_failed_downloads(hub, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("404 not found\nmany more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(sys.modules["kagglehub"], "model_download", fail)
    with pytest.raises(ValueError, match=r"hf://a/b: cannot be downloaded: RuntimeError: 404 not found$"):
        resolve_preset("hf://a/b")
    with pytest.raises(
        ValueError,
        match=r"preset 'gpt2_base_en', kaggle://.*/3: cannot be downloaded: RuntimeError: 404 not found. The same",
    ):
        resolve_preset("gpt2_base_en")
    with pytest.raises(ValueError, match=r"config.json cannot be downloaded: RuntimeError: 404 not found"):
        resolve_preset("gpt2_base_en", "config")


def test_missing_packages(hub, without):
    without("kagglehub")
    with pytest.warns(UserWarning, match="'gpt2_medium_en' is taken from hf://openai-community/gpt2-medium, since"):
        resolve_preset("gpt2_medium_en")
    assert hub.pop()[0] == "openai-community/gpt2-medium"  # the same weights, from the source that there is
    with pytest.raises(
        ImportError, match=r"gpt2_base_en_cnn_dailymail/3 needs Kaggle's client, kagglehub: pip install"
    ):
        resolve_preset("gpt2_base_en_cnn_dailymail")
    with pytest.raises(ImportError, match=r"kaggle://a/b/c/d needs Kaggle's client.*pip install"):
        resolve_preset("kaggle://a/b/c/d")
    without("huggingface_hub")
    with pytest.raises(ImportError, match=r"hf://a/b needs the Hugging Face hub's client.*pip install"):
        resolve_preset("hf://a/b")
    with pytest.raises(
        ImportError, match=r"'gpt2_base_en' has to be downloaded: .* kagglehub \(or huggingface_hub, for the"
    ):
        resolve_preset("gpt2_base_en")


def test_a_version_in_the_cache_needs_no_client(hub, without, tmp_path, golden):
    without("kagglehub", "huggingface_hub")
    root = tmp_path / "kaggle" / "models" / "keras" / "gpt2" / "keras" / "gpt2_base_en"
    root.mkdir(parents=True)
    (root / "3").symlink_to(golden / "ckpt" / "keras_gpt2_task")
    with pytest.raises(ImportError):
        resolve_preset("gpt2_base_en")  # it is there, but nothing says that all of it is
    assert presets.place_of("gpt2_base_en") == ("remote", None)
    (root / "3.complete").touch()
    assert resolve_preset("gpt2_base_en") == resolve_preset("gpt2_base_en", "tokenizer") == root / "3"
    assert presets.place_of("gpt2_base_en") == ("cached", root / "3")
    assert Backbone.from_preset("gpt2_base_en", load_weights=False, device="meta").get_config()["num_layers"] == 2


PUBLISHED = [(family, preset) for family in FAMILIES.values() for preset in family.presets]


def test_every_published_preset_has_the_published_size(without):
    """Each is built on the meta device, by its name alone: neither client is there, nor is any of its files."""
    without("kagglehub", "huggingface_hub")
    assert len(PUBLISHED) == 22
    for family, preset in PUBLISHED:
        kind = getattr(pyfused, family.class_name)
        model = Backbone.from_preset(preset.name, load_weights=False, device="meta")
        assert type(model) is kind
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        entry = kind.presets[preset.name]
        assert sum(parameter.numel() for parameter in model.parameters()) == entry["metadata"]["params"], preset.name
        assert (
            model.get_config().items() >= (preset.config | {"activation": model.get_config().get("activation")}).items()
        )
        assert entry["metadata"]["description"] == preset.description
        assert f"{model.get_config()['num_layers']} layers" in preset.description
    assert Backbone.presets.keys() == {preset.name for _, preset in PUBLISHED} | presets.bundled_presets().keys()
    assert pyfused.GPT2Backbone.presets.keys() == {p.name for p in FAMILIES["gpt2"].presets} | {"gpt2_tiny_en"}


def test_activations_of_t5s_presets():
    def activation(name):
        return Backbone.from_preset(name, load_weights=False, device="meta", num_layers=1).get_config()["activation"]

    assert [activation(name) for name in ("t5_small_multi", "t5_1.1_small", "flan_small_multi")] == [
        "relu",
        "gelu",
        "gelu_new",
    ]


def test_overrides_of_published_presets():
    small = {"num_layers": 1, "vocabulary_size": 11}
    model = Backbone.from_preset("gpt2_base_en", load_weights=False, dtype="bfloat16", dropout=0.5, **small)
    config = model.get_config()
    assert (config["dropout"], config["num_layers"], config["dtype"]) == (0.5, 1, "bfloat16")
    assert model.token_embedding.weight.shape == (11, 768)
    assert not model.training
    again = type(model).from_config(config)
    assert again.get_config() == config
    assert torch.isfinite(model.token_embedding.weight).all()
    with pytest.raises(ValueError, match=r"overrides: unknown \['depth'\]"):
        Backbone.from_preset("gpt2_base_en", load_weights=False, depth=3)
    with pytest.raises(ValueError, match="'gpt2_base_en' is a gpt2 checkpoint; T5Backbone takes t5"):
        pyfused.T5Backbone.from_preset("gpt2_base_en", load_weights=False)
    t5 = Backbone.from_preset(
        "t5_small_multi", load_weights=False, device="meta", num_layers=2, tie_embedding_weights=False
    )
    config = t5.get_config()  # as KerasHub's, whose one number of layers is both stacks'
    assert (config["num_layers"], config["num_decoder_layers"], config["scale_logits"]) == (2, 2, False)
    uneven = Backbone.from_preset(
        "t5_small_multi", load_weights=False, device="meta", num_layers=2, num_decoder_layers=3
    )
    assert len(uneven.decoder.layers) == 3


def test_a_configuration_needs_no_h5py(golden, without):
    without("h5py")
    assert open_checkpoint(golden / "ckpt" / "keras_gpt2", weights=False).model == "gpt2"


def test_nothing_is_unpickled(golden, monkeypatch):
    """Opening and loading any golden directory calls neither pickle nor torch.load, nor opens a file for writing."""
    import pickle

    import torch

    def forbidden(*args, **kwargs):
        raise AssertionError("called")

    opened = builtins.open

    def read_only(file, mode="r", *args, **kwargs):
        assert set(mode) <= set("rbt"), (file, mode)
        return opened(file, mode, *args, **kwargs)

    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr(pickle, "load", forbidden)
    monkeypatch.setattr(pickle, "loads", forbidden)
    monkeypatch.setattr(pickle, "Unpickler", forbidden)
    monkeypatch.setattr(builtins, "open", read_only)
    counts = {"gpt2": 28, "albert": 57, "t5": 37, "fnet": 25}
    for directory in sorted(Path(golden / "ckpt").iterdir()):
        tensors = dict(open_checkpoint(directory).tensors())
        more = 5 if tensors.keys() & HEAD else -2 if "albert" in directory.name and "pooler.bias" not in tensors else 0
        assert len(tensors) == counts[directory.name.split("_")[1]] + more, directory.name
