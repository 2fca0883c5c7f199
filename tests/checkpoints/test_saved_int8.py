"""Are int8 and int4 weights saved and loaded bit by bit, and does transformers refuse the files instead of misreading them?"""

import json

import pytest
import torch
import transformers
from quantized_cases import BACKBONES, spread
from safetensors.torch import load_file, save_file

import pyfused
from pyfused import Backbone, GPT2Backbone, T5Backbone, quantize_, unquantize_
from pyfused.checkpoints import convert, open_checkpoint
from pyfused.nn import QuantizedLinear

CASES = {
    **BACKBONES,
    "t5, untied": lambda: T5Backbone(29, 2, 3, 12, 20, tie_embedding_weights=False, num_decoder_layers=1),
    "t5, ungated encoder": lambda: T5Backbone(29, 2, 3, 12, 20, use_gated_activation=False, num_decoder_layers=0),
    "gpt2, untied": lambda: GPT2Backbone(29, 2, 3, 12, 20, tie_embedding_weights=False, cross_attention=True),
}


@pytest.mark.parametrize("shards", ["10GB", 3000])
@pytest.mark.parametrize("case", CASES)
def test_bit_by_bit(tmp_path, same, case, shards):
    model = spread(CASES[case]()).eval()
    quantize_(model, dynamic=case == "gpt2")
    model.save_to_preset(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.int8.safetensors").exists() == (shards == "10GB")
    again = Backbone.from_preset(tmp_path)
    same(again.state_dict(), model.state_dict())
    assert again.dtype == model.dtype
    kinds = [
        [(name, type(module), getattr(module, "dynamic", None)) for name, module in m.named_modules()]
        for m in (model, again)
    ]
    assert kinds[0] == kinds[1]
    same(dict(open_checkpoint(tmp_path).tensors()), model.state_dict())
    same(unquantize_(again).state_dict(), unquantize_(model).state_dict())


@pytest.mark.parametrize("shards", ["10GB", 3000])
@pytest.mark.parametrize("case", ["gpt2", "t5", "albert"])
def test_int4_bit_by_bit(tmp_path, same, case, shards):
    """Beside int8 layers and float ones; GPT-2's files hold floats and int8 by columns, and int4 by rows."""
    model = spread(CASES[case]()).eval()
    quantize_(model, "int4", filter_fn=lambda name, module: not name.endswith("layers.1.attention.output"))
    model.save_to_preset(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.int4.safetensors").exists() == (shards == "10GB")
    again = Backbone.from_preset(tmp_path)
    same(again.state_dict(), model.state_dict())
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    same(dict(open_checkpoint(tmp_path).tensors()), model.state_dict())
    model = spread(CASES[case]()).eval()
    model.save_to_preset(tmp_path)
    assert not list(tmp_path.glob("*int4*")), "a reader could take them for the new ones"


def test_int4_files_that_do_not_fit_are_named(tmp_path, edit):
    model = GPT2Backbone(29, 1, 2, 64, 96)
    quantize_(model, "int4")
    model.save_to_preset(tmp_path)
    file = tmp_path / "model.int4.safetensors"
    block = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert block["version"] == 2
    assert block["modules"]["layers.0.attention.output"] == "int4"
    assert block["modules"]["token_embedding"] is False
    good, name = load_file(file), "transformer.h.0.mlp.c_fc.weight"
    assert (good[name].shape, good[f"{name}_scale"].shape) == ((96, 32), (96, 2))
    for change, message in [
        (
            {name: good[name].view(torch.uint8)},
            r"c_fc.weight' has dtype torch.uint8, but .*config.json calls for torch.int8",
        ),
        ({name: good[name].view(-1, 1)}, r"c_fc.weight' has shape \(3072, 1\), but .*config.json calls for \(96, 32\)"),
        ({f"{name}_scale": good[f"{name}_scale"].float()}, r"c_fc.weight_scale' has dtype torch.float32"),
    ]:
        save_file(good | change, file)
        with pytest.raises(ValueError, match=message):
            Backbone.from_preset(tmp_path)
    save_file(good, file)
    for change, message in [
        ({"modules": block["modules"] | {"final_norm": "int4"}}, "config.json: 'final_norm' cannot be int4: K = 1"),
        ({"modules": block["modules"] | {"final_norm": "int5"}}, 'true, false or "int4"'),
        ({"modules": dict.fromkeys(block["modules"], False)}, r"has shape \(.*\), but .*config.json calls for"),
    ]:
        edit(tmp_path / "config.json", quantization_config=block | change)
        with pytest.raises(ValueError, match=message):
            Backbone.from_preset(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_and_some_layers(tmp_path, same, dtype):
    model = spread(BACKBONES["gpt2"]()).to(getattr(torch, dtype))
    quantize_(model, filter_fn=lambda name, module: "layers.0" in name)
    model.save_to_preset(tmp_path)
    again = Backbone.from_preset(tmp_path)
    same(again.state_dict(), model.state_dict())
    assert again.layers[0].feed_forward.inner.dtype == again.dtype == getattr(torch, dtype)
    assert not isinstance(again.layers[1].feed_forward.inner, QuantizedLinear)
    wide = Backbone.from_preset(tmp_path, dtype="float32")
    assert wide.layers[0].feed_forward.inner.weight.dtype == torch.int8
    assert wide.layers[0].feed_forward.inner(torch.ones(1, model.get_config()["hidden_dim"])).dtype == torch.float32


def test_it_generates_as_before(tmp_path):
    model = GPT2Backbone.from_preset("gpt2_tiny_en")
    quantize_(model)
    model.save_to_preset(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    prompts = [[5, 7, 11]]
    tokens = [
        pyfused.Generator(m).generate(prompts, max_new_tokens=12) for m in (model, GPT2Backbone.from_preset(tmp_path))
    ]
    assert tokens[0] == tokens[1]


def test_the_layout_is_the_documented_one(tmp_path):
    model = spread(BACKBONES["albert"]())
    quantize_(model)
    model.save_to_preset(tmp_path)
    block = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (block["quant_method"], block["version"]) == ("pyfused", 1)
    assert block["modules"]["layers.0.0.attention.output"] is False
    stored = load_file(tmp_path / "model.int8.safetensors")
    name = "encoder.albert_layer_groups.0.albert_layers.0.attention.key.weight"
    rows = len(stored[name])
    own = model.layers[0][0].attention.query_key_value
    assert torch.equal(stored[name], own.weight[rows : 2 * rows])
    assert torch.equal(stored[f"{name}_scale"], own.scale[rows : 2 * rows])


def test_what_is_refused(tmp_path, edit):
    model = spread(BACKBONES["gpt2"]())
    quantize_(model)
    with pytest.raises(ValueError, match="format is 'keras'; the weights are int8, for which it takes 'hf'"):
        model.save_to_preset(tmp_path, "keras")
    with pytest.raises(ValueError, match=r"dtype is torch.bfloat16; the weights are int8, for which it takes None"):
        model.save_to_preset(tmp_path, dtype="bfloat16")
    assert not any(tmp_path.iterdir())
    model.save_to_preset(tmp_path)
    with pytest.raises(OSError, match=r"no file named .*model.safetensors"):
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the weights are int8; convert the preset that they were made from"):
        convert(tmp_path, tmp_path / "other", "hf")
    for dtype in ("float64", "mixed_bfloat16"):
        with pytest.raises(ValueError, match=f"dtype is '{dtype}'; a checkpoint with int8 weights takes"):
            Backbone.from_preset(tmp_path, dtype=dtype)
    block = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    for change, message in [
        ({"version": 3}, "version 3; this pyfused reads versions 1 and 2"),
        ({"modules": {}}, "must map names of modules to true, false"),
        ({"modules": {"final_norm": False}}, "final_norm|ln_f"),
        ({"modules": {"layers.0.attention.output": False}}, "has dtype torch.int8, so it is quantised"),
    ]:
        edit(tmp_path / "config.json", quantization_config=block | change)
        with pytest.raises(ValueError, match=message):
            Backbone.from_preset(tmp_path)
    edit(tmp_path / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(ValueError, match=r"quantization_config is .*; the weights are quantised"):
        Backbone.from_preset(tmp_path)
