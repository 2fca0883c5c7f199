"""Do Hugging Face directories load to the right values, and does every damaged or foreign one fail by name?"""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyfused import GPT2Backbone
from pyfused.checkpoints import open_checkpoint
from pyfused.checkpoints.storage import _SLICE_BYTES


def test_defaults_and_aliases(preset, edit):
    directory = preset("hf_gpt2")
    (directory / "config.json").write_text('{"model_type": "gpt2"}')
    config = open_checkpoint(directory, weights=False).config
    assert (config["vocabulary_size"], config["num_layers"], config["hidden_dim"]) == (50257, 12, 768)
    assert (config["intermediate_dim"], config["max_sequence_length"], config["num_heads"]) == (3072, 1024, 12)
    edit(directory / "config.json", hidden_size=96, num_hidden_layers=2, num_attention_heads=4, embd_pdrop=0.3)
    config = open_checkpoint(directory, weights=False).config
    assert (config["hidden_dim"], config["intermediate_dim"], config["num_layers"]) == (96, 384, 2)
    assert (config["dropout"], config["embedding_dropout"], config["attention_dropout"]) == (0.1, 0.3, None)
    edit(directory / "config.json", n_embd=97)
    with pytest.raises(ValueError, match="n_embd is 97 but hidden_size"):
        open_checkpoint(directory, weights=False)
    (directory / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"], "n_embd": 768}')
    assert open_checkpoint(directory, weights=False).model == "gpt2"


def test_known_harmless_options_are_accepted(preset, edit):
    directory = preset("hf_gpt2")
    edit(directory / "config.json", n_ctx=16, task_specific_params={"text-generation": {"max_length": 50}}, top_k=50,
         id2label={"0": "a"}, pruned_heads={}, summary_type="mean")  # fmt: skip
    assert open_checkpoint(directory).config == open_checkpoint(preset("hf_gpt2_lm")).config


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "mish"}, {"quantization_config": {"bits": 4}}, {"pruned_heads": {"0": [1]}},
        {"position_embedding_type": "alibi"}, {"model_type": "gpt_neo"}, {"n_layer": 0}, {"n_layer": "2"}, {"n_layer": 10**9},
        {"n_head": 5}, {"resid_pdrop": 1.5}, {"layer_norm_epsilon": "1e-5"}, {"scale_attn_weights": 1},
        {"auto_map": {"AutoModel": "x.Y"}}, {"vocab_size": True}, {"n_inner": 2.5},
        {"layer_norm_epsilon": float("nan")}, {"model_type": ["gpt2"]}, {"add_cross_attention": True},
    ],
)  # fmt: skip
def test_options_that_change_the_maths_are_refused(preset, edit, change):
    directory = preset("hf_gpt2")
    edit(directory / "config.json", **change)
    name = next(iter(change))
    # more layers and cross-attention are fine options, but the weights are not there
    said = {"n_layer": "n_layer|layers", "add_cross_attention": "ln_cross_attn.weight' .* is missing"}.get(name, name)
    with pytest.raises(ValueError, match=f"{re.escape(str(directory))}.*({said})"):
        open_checkpoint(directory)


def test_dtype(preset, edit, same):
    directory = preset("hf_gpt2")
    config, weights = directory / "config.json", directory / "model.safetensors"
    halves = {name: tensor.bfloat16() for name, tensor in open_checkpoint(directory).tensors()}
    edit(config, dtype="bfloat16")
    assert open_checkpoint(directory).dtype == torch.bfloat16
    edit(config, dtype=None, torch_dtype="torch.float16")
    assert open_checkpoint(directory).dtype == torch.float16
    edit(config, torch_dtype="int8")
    with pytest.raises(ValueError, match=r"config.json: dtype is 'int8'; pass dtype="):
        _ = open_checkpoint(directory).dtype
    edit(config, torch_dtype="auto")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(weights).items()}
    save_file(tensors, weights)
    checkpoint = open_checkpoint(directory)
    assert checkpoint.dtype == torch.bfloat16
    same(checkpoint.tensors(), halves)
    same(checkpoint.tensors(torch.float64), {name: tensor.double() for name, tensor in halves.items()})
    save_file(tensors | {"wte.weight": tensors["wte.weight"].half()}, weights)
    mixed = open_checkpoint(directory)
    with pytest.raises(ValueError, match="tensors have bfloat16, float16; pass dtype="):
        _ = mixed.dtype


def test_long_tensors_are_copied_in_slices(preset, edit):
    """Tensors of more than one slice, copied flat and transposed, with a last slice that is not full."""
    directory = preset("hf_gpt2")
    rows = _SLICE_BYTES // (4 * 12) + 7
    edit(directory / "config.json", vocab_size=rows, n_inner=rows // 2)
    weights = load_file(directory / "model.safetensors")
    weights["wte.weight"] = torch.randn(rows, 12)
    for i in range(2):
        weights[f"h.{i}.mlp.c_fc.weight"] = torch.randn(12, rows // 2)
        weights[f"h.{i}.mlp.c_fc.bias"] = torch.randn(rows // 2)
        weights[f"h.{i}.mlp.c_proj.weight"] = torch.randn(rows // 2, 12)
    save_file(weights, directory / "model.safetensors")
    found = dict(open_checkpoint(directory).tensors())
    assert torch.equal(found["token_embedding.weight"], weights["wte.weight"])
    for i in range(2):
        for ours, theirs in (("inner", "c_fc"), ("outer", "c_proj")):
            assert torch.equal(
                found[f"layers.{i}.feed_forward.{ours}.weight"], weights[f"h.{i}.mlp.{theirs}.weight"].t()
            )


def shard(directory, count=3):
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {}
    for index in range(count):
        part = {name: weights[name] for name in names[index::count]}
        file = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return weight_map


def test_shards(preset, same, golden):
    directory = preset("hf_gpt2_lm")
    shard(directory)
    same(open_checkpoint(directory).tensors(), open_checkpoint(golden / "ckpt" / "hf_gpt2").tensors())


def test_bad_shards(preset, tmp_path):
    directory = preset("hf_gpt2")
    weight_map = shard(directory)
    index = directory / "model.safetensors.index.json"
    first = weight_map["wte.weight"]
    (tmp_path / "x.safetensors").write_bytes((directory / first).read_bytes())
    for name in (
        "../x.safetensors",
        str(tmp_path / "x.safetensors"),
        "a\\b.safetensors",
        ".safetensors",
        "x.bin",
        "C:x",
    ):
        index.write_text(json.dumps({"weight_map": weight_map | {"wte.weight": name}}))
        with pytest.raises(ValueError, match=f"{re.escape(str(index))}: names the shard"):
            open_checkpoint(directory)
    for content, said in (
        ({"weight_map": weight_map | {"wte.weight": 3}}, "'wte.weight': the shard is 3"),
        ({"weight_map": weight_map | {"wte.weight": "gone.safetensors"}}, "gone.safetensors: missing"),
        ({"weight_map": weight_map | {"more": first}}, f"{first}: tensor 'more' is missing"),
        (
            {"weight_map": {k: v for k, v in weight_map.items() if k != "wte.weight"}},
            f"{first}: tensor 'wte.weight' is here",
        ),
        ({"weight_map": []}, "weight_map must map"),
        ([], "holds a JSON list"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=said):
            open_checkpoint(directory)
    index.write_text('{"weight_map": {"a": "x", "a": "y"}}')
    with pytest.raises(ValueError, match=r"index.json: cannot be read as JSON: the key 'a' occurs twice"):
        open_checkpoint(directory)


def rewrite_header(path, change):
    """Applies ``change`` to the header of a safetensors file, leaving the data as it is."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = change(json.loads(content[8 : 8 + length]))
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])


def changed(name="wte.weight", **fields):
    def change(header):
        return header | {name: header[name] | fields}

    return change


@pytest.mark.parametrize(
    "change, said",
    [
        (changed(dtype="F4"), "'wte.weight': dtype 'F4'"),
        (changed(dtype="BF16"), "'wte.weight': BF16 of shape"),
        (changed(dtype="I32"), "'wte.weight' has dtype torch.int32"),
        (changed(dtype=None), "'wte.weight': dtype None"),
        (changed(shape=[12, 29]), r"'wte.weight' has shape \(12, 29\), but .* calls for \(29, 12\)"),
        (changed(shape=[-29, -12]), "'wte.weight': shape"),
        (changed(shape=[29.0, 12]), "'wte.weight': shape"),
        (changed(shape=[2**62, 2**62]), "'wte.weight': F32 of shape"),
        (changed(shape=[348] + [1] * 9), "'wte.weight': shape"),
        (changed(data_offsets=[0, 1392]), "they overlap or leave a gap"),
        (changed(data_offsets=[10**12, 10**12 + 1392]), "'wte.weight' ends at byte .* truncated"),
        (changed(data_offsets=[0]), "'wte.weight': data_offsets"),
        (changed(data_offsets="0"), "'wte.weight': data_offsets"),
        (changed(extra=1), "'wte.weight': the header must give"),
        (lambda h: h | {"wte.weight": 5}, "'wte.weight': the header must give"),
        (lambda h: {k: v for k, v in h.items() if k != "wte.weight"}, "end"),
        (lambda h: h | {"h.9": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, "'h.9' is not part of the mod"),
        (lambda h: {k.replace("wte", "wxe"): v for k, v in h.items()}, r"'wte.weight' of shape .* is missing"),
        (lambda h: b"[]", "not a JSON object"),
        (lambda h: b"{", "cannot be read as safetensors"),
        (lambda h: b"\xff\xfe", "cannot be read as safetensors"),
        (lambda h: b"[" * 100_000, "cannot be read as safetensors"),
        (lambda h: b'{"a": 1, "a": 2}', "'a' occurs twice"),
    ],
)  # fmt: skip
def test_hostile_headers(preset, change, said):
    directory = preset("hf_gpt2")
    rewrite_header(directory / "model.safetensors", change)
    with pytest.raises(ValueError, match=f"{re.escape(str(directory))}/model.safetensors: .*{said}|{said}"):
        open_checkpoint(directory)


def test_truncated_and_foreign_files(preset):
    directory = preset("hf_gpt2")
    path = directory / "model.safetensors"
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for size in (0, 3, 8, header - 1, header, header + 100, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"model.safetensors: .*(truncated; download it again|an empty file)"):
            open_checkpoint(directory)
    for length in (2**63, 2**64 - 1, 100_000_001, len(content) - 7):
        path.write_bytes(length.to_bytes(8, "little") + content[8:])
        with pytest.raises(ValueError, match=f"model.safetensors: .*the header would have {length} bytes"):
            open_checkpoint(directory)
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="the tensors end at byte"):
        open_checkpoint(directory)
    path.unlink()
    with pytest.raises(ValueError, match="no weights found; looked for"):
        open_checkpoint(directory)
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(
        ValueError, match=r"pytorch_model.bin: cannot be read as a pickle.*damaged one: download it again"
    ):
        open_checkpoint(directory)
    assert open_checkpoint(directory, weights=False).config["num_layers"] == 2
    with pytest.raises(ValueError, match="opened without its weights"):
        next(open_checkpoint(directory, weights=False).tensors())


def test_a_file_cut_after_opening_leaves_the_module_untouched(preset, same):
    directory = preset("hf_gpt2")
    checkpoint = open_checkpoint(directory)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    module = GPT2Backbone(**checkpoint.config)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ValueError, match="has changed since"):
        checkpoint.load_into(module)
    same(module.state_dict(), before)


def test_modules_that_do_not_fit(golden, same):
    checkpoint = open_checkpoint(golden / "ckpt" / "hf_gpt2")
    for change, said in (
        ({"vocabulary_size": 30}, r"'token_embedding.weight' has shape \(29, 12\), this GPT2Backbone takes \(30, 12\)"),
        ({"num_layers": 3}, r"'layers.2.attention.output.bias', which this GPT2Backbone has, is not in the checkpoint"),
        ({"num_layers": 1}, r"'layers.1.attention.output.bias' has no place in this GPT2Backbone"),
    ):
        module = GPT2Backbone(**checkpoint.config | change)
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        with pytest.raises(ValueError, match=said):
            checkpoint.load_into(module)
        same(module.state_dict(), before)
    with torch.device("meta"):
        module = GPT2Backbone(**checkpoint.config)
    with pytest.raises(ValueError, match="is on the meta device"):
        checkpoint.load_into(module)


def test_two_names_for_one_weight(preset):
    directory = preset("hf_gpt2")
    weights = load_file(directory / "model.safetensors")
    save_file(weights | {"transformer.wte.weight": weights["wte.weight"].clone()}, directory / "model.safetensors")
    with pytest.raises(ValueError, match="same weight under two names"):
        open_checkpoint(directory)


def test_the_output_matrix(preset, edit, same):
    directory = preset("hf_gpt2_lm")
    path = directory / "model.safetensors"
    weights = load_file(path)
    plain = dict(open_checkpoint(directory).tensors())
    table = weights["transformer.wte.weight"]
    save_file(weights | {"lm_head.weight": table.clone()}, path)  # as old versions save it
    checkpoint = open_checkpoint(directory)
    assert checkpoint.config["tie_embedding_weights"] is True
    same(checkpoint.tensors(), plain)

    head = torch.randn_like(table)
    save_file(weights | {"lm_head.weight": head}, path)
    with pytest.warns(UserWarning, match=r"'lm_head.weight' differs from"):
        assert open_checkpoint(directory).config["tie_embedding_weights"] is False
    edit(directory / "config.json", tie_word_embeddings=False)
    checkpoint = open_checkpoint(directory)
    assert checkpoint.config["tie_embedding_weights"] is False
    same(checkpoint.tensors(), plain | {"token_embedding.reverse_weight": head})
    checkpoint.load_into(GPT2Backbone(**checkpoint.config))

    save_file(weights, path)  # a file without a head has none to untie
    assert open_checkpoint(directory).config["tie_embedding_weights"] is True
    save_file(weights | {"lm_head.bias": torch.zeros(29)}, path)
    with pytest.raises(ValueError, match=r"'lm_head.bias' is not part of the model"):
        open_checkpoint(directory)
