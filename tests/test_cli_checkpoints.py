"""Do `pyfused info` and `pyfused convert` say and write what is there, and fail in one line?"""

import json

import pytest
import torch
from safetensors.torch import load_file

import pyfused
from pyfused import Backbone, quantize_
from pyfused.checkpoints import resolve_preset
from pyfused.cli import main


def call(capsys, *arguments):
    status = main(list(arguments))
    out = capsys.readouterr()
    return status, out.out, out.err


@pytest.mark.parametrize("preset", ["gpt2_tiny_en", "t5_tiny_en", "albert_tiny_en", "fnet_tiny_en"])
def test_info_is_true_of_the_loaded_model(capsys, preset):
    status, out, _ = call(capsys, "info", preset, "--json")
    facts = json.loads(out)
    model = Backbone.from_preset(preset)
    assert status == 0
    assert (facts["class"], facts["format"], facts["dtype"]) == (type(model).__name__, "hf", str(model.dtype)[6:])
    assert facts["config"].items() <= model.get_config().items()
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert facts["bytes"]["bfloat16"] == 2 * facts["parameters"]
    for scheme in ("int8", "int4"):
        assert facts["bytes"][scheme] == quantize_(Backbone.from_preset(preset, dtype="float32"), scheme).bytes_after
    if hasattr(model, "new_cache"):
        tensors = model.new_cache(1, 5).tensors
        assert 5 * facts["cache_bytes_per_token"]["float32"] == 4 * sum(tensor.numel() for tensor in tensors)
    else:
        assert facts["cache_bytes_per_token"] is None
    used = {row["operator"] for row in facts["operators"]}
    mixing = {"fnet_tiny_en": "fourier_mix"}.get(preset, "attention")
    assert {mixing, "rms_norm" if preset == "t5_tiny_en" else "layer_norm"} <= used
    assert {"gated_ffn" if preset == "t5_tiny_en" else "ffn"} <= used
    with pyfused.backend("reference"):
        rows = json.loads(call(capsys, "info", preset, "--json")[1])["operators"]
    assert {row["backend"] for row in rows} == {"reference"}
    text = call(capsys, "info", preset)[1]
    assert f"{facts['parameters']:,}" in text


def test_info_reads_no_weights(capsys, tmp_path):
    (tmp_path / "config.json").write_bytes((resolve_preset("gpt2_tiny_en") / "config.json").read_bytes())
    facts = json.loads(call(capsys, "info", str(tmp_path), "--json")[1])
    assert facts["weights"] is None
    assert facts["parameters"] == sum(p.numel() for p in Backbone.from_preset("gpt2_tiny_en").parameters())
    model = Backbone.from_preset("gpt2_tiny_en")
    quantize_(model)
    model.save_to_preset(tmp_path)
    assert json.loads(call(capsys, "info", str(tmp_path), "--json")[1])["weights"] == "int8"
    model = Backbone.from_preset("gpt2_tiny_en", num_layers=1, load_weights=False)
    model.save_to_preset(tmp_path / "pickled")
    weights = tmp_path / "pickled" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "pickled" / "pytorch_model.bin")
    weights.unlink()
    assert json.loads(call(capsys, "info", str(tmp_path / "pickled"), "--json")[1])["weights"] == "float"
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text(json.dumps({"model_type": "t5"}))  # T5's defaults
    facts = json.loads(call(capsys, "info", str(tmp_path / "small"), "--json")[1])
    assert facts["parameters"] == 60_506_624  # KerasHub's count of t5_small_multi
    facts = json.loads(call(capsys, "info", "t5_small_multi", "--json")[1])  # a published name: without the network
    assert facts["parameters"] == 60_506_624


def test_convert(capsys, tmp_path):
    source, target = "gpt2_tiny_en", tmp_path / "keras"
    status, out, _ = call(capsys, "convert", source, str(target), "--format", "keras", "--dtype", "bfloat16", "--json")
    assert status == 0
    files = json.loads(out)["files"]
    assert files == {name: (target / name).stat().st_size for name in files}
    assert {"config.json", "model.weights.h5", "tokenizer.json", "assets/tokenizer/merges.txt"} <= files.keys()
    expected = Backbone.from_preset(source).bfloat16().state_dict()
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in Backbone.from_preset(target).state_dict().items()
    )
    options = ["--format", "hf", "--max-shard-size"]
    assert call(capsys, "convert", str(target), str(target), *options, "1MB", "--quiet") == (0, "", "")
    assert (target / "model.safetensors.index.json").is_file()
    assert not (target / "model.weights.h5").exists()
    status, out, _ = call(capsys, "convert", str(target), str(target), *options, "100000000")
    assert (status, "model.safetensors  3," in out) == (0, True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["albert_tiny_en", "DST", "--format", "keras"], "pooler is False; KerasHub's AlbertBackbone always has True"),
        (["gpt2_tiny_en", "DST", "--format", "hf", "--dtype", "int8"], "dtype is 'int8'; it takes one of"),
        (["gpt2_tiny_en", "DST", "--format", "hf", "--max-shard-size", "big"], "max_shard_size is 'big'; it takes"),
        (["nowhere", "DST", "--format", "hf"], "preset is 'nowhere'"),
    ],
)
def test_errors_in_one_line(capsys, tmp_path, recwarn, arguments, message):
    arguments = [str(tmp_path / "new") if argument == "DST" else argument for argument in arguments]
    status, out, err = call(capsys, "convert", *arguments)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert message in err
    assert not any(tmp_path.iterdir())
