"""Do models with int4 weights compute what their integers stand for, with the right layers in int4, from quantize_ to files?"""

import copy

import pytest
import torch
from quantized_cases import BACKBONES, DTYPES, assert_same_model, bytes_of, kinds, outputs, spread
from safetensors.torch import load_model, save_model
from torch import nn

import pyfused
from pyfused import Backbone, GPT2Backbone, T5Backbone, quantize_, unquantize_
from pyfused.nn import QuantizedEmbedding, QuantizedLinear


def formats(model):
    return {n: m.format.name for n, m in model.named_modules() if isinstance(m, (QuantizedLinear, QuantizedEmbedding))}


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone(name):
    """Layers of K = 48 or 16 and the token tables are int8; the report says so."""
    for dtype in DTYPES if name in ("gpt2", "t5") else DTYPES[:1]:
        model = spread(BACKBONES[name](dtype=dtype))
        before = copy.deepcopy(model)
        report = quantize_(model, "int4")
        notes = {entry.name: entry.note for entry in report.replaced}
        assert kinds(report).keys() == kinds(quantize_(copy.deepcopy(before))).keys()
        found = formats(model)
        for layer, note in notes.items():
            original = before.get_submodule(layer)
            k = original.weight.shape[1]
            if isinstance(original, nn.Embedding):
                assert found[layer] == "int8"
                assert note.endswith("a scale for each output: tables of tokens and heads are")
            elif k % 32:
                assert found[layer] == "int8"
                assert note.endswith(f"a scale for each output: K = {k} is no multiple of 32")
            else:
                assert found[layer] == "int4"
                assert note == f"int4 {tuple(original.weight.shape)}, a scale for each 32 values"
        assert "int4" in found.values()
        assert report.bytes_after == bytes_of(model) < quantize_(before).bytes_after
        assert_same_model(model, unquantize_(copy.deepcopy(model)))


def test_heads_are_int8(tmp_path):
    """An own head of a backbone, and the layer that a model names as its output embeddings."""
    model = spread(BACKBONES["gpt2, own head"]())
    quantize_(model, "int4")
    assert formats(model)["token_embedding.reverse"] == "int8"

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.layer, self.head = nn.Embedding(40, 32), nn.Linear(32, 32), nn.Linear(32, 40)

        def get_output_embeddings(self):
            return self.head

        def get_input_embeddings(self):
            return self.table

        def forward(self, ids):
            return self.head(self.layer(self.table(ids)))

    model = Model()
    quantize_(model, "int4")
    assert formats(model) == {"table": "int8", "layer": "int4", "head": "int8"}
    plain = unquantize_(copy.deepcopy(model))
    ids = torch.arange(40)[None]
    torch.testing.assert_close(model(ids), plain(ids))


MODELS = {
    "gpt2": lambda: GPT2Backbone(50, 2, 4, 32, 64, max_sequence_length=64, dropout=0.0),
    "t5, gated": lambda: T5Backbone(50, 2, 4, 32, 64, dropout=0.0),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    torch.manual_seed(5)
    return spread(MODELS[request.param]())


def test_files_and_state_dicts(model, tmp_path):
    model = copy.deepcopy(model)
    quantize_(model, "int4")
    model.save_to_preset(tmp_path / "preset")
    assert (tmp_path / "preset" / "model.int4.safetensors").is_file()
    again = Backbone.from_preset(tmp_path / "preset")
    states = again.state_dict(), model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], t) for name, t in states[1].items())
    assert formats(again) == formats(model)
    save_model(model, tmp_path / "model.safetensors")
    read, assigned = (copy.deepcopy(again) for _ in range(2))
    for fresh in (read, assigned):
        for buffer in fresh.buffers():
            buffer.zero_()
    load_model(read, tmp_path / "model.safetensors")
    assigned.load_state_dict(model.state_dict())
    for other in (again, read, assigned, copy.deepcopy(model)):
        assert all(torch.equal(a, b) for a, b in zip(outputs(other).values(), outputs(model).values()))


def test_the_other_format_s_state_is_refused():
    layer, other = nn.Linear(64, 8), nn.Linear(64, 8)
    quantize_(layer, "int4")
    quantize_(other, "int8")
    weight = layer.weight.clone()
    for module, state, message in [
        (layer, other.state_dict(), "scale is torch.float32; this layer is quantised and takes int4"),
        (other, layer.state_dict(), "scale is torch.bfloat16; this layer is quantised and takes int8"),
        (
            layer,
            layer.state_dict() | {"scale": torch.ones(8, 2)},
            "scale is torch.float32; .* takes int4, whose scale is",
        ),
        (layer, layer.state_dict() | {"weight": weight[:, :16]}, "size mismatch for weight"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            module.load_state_dict(state)
    assert torch.equal(layer.weight, weight)


def test_casts_and_back():
    layer = nn.Linear(64, 8).requires_grad_(False)
    before = copy.deepcopy(layer)
    quantize_(layer, "int4")
    assert (
        repr(layer)
        == "QuantizedLinear(in_features=64, out_features=8, bias=True, int4, dtype=torch.float32, dynamic=False)"
    )
    weight, scale = layer.weight.clone(), layer.scale.clone()
    for cast in (
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.type(torch.float16),
        lambda m: m.double(),
    ):
        cast(layer)
        assert torch.equal(layer.weight, weight)
        assert torch.equal(layer.scale, scale)
    assert layer(torch.randn(2, 64).double()).dtype == torch.float64
    unquantize_(layer.float())
    assert type(layer) is nn.Linear
    assert not layer.weight.requires_grad
    groups, found = before.weight.unflatten(1, (2, 32)), layer.weight.unflatten(1, (2, 32))
    assert ((groups - found).abs() <= groups.abs().amax(2, keepdim=True) / 6).all()
    made = QuantizedLinear(64, 8, scheme="int4")
    assert made(torch.ones(3, 64)).shape == (3, 8)
    with pytest.raises(ValueError, match="scheme is 'int4' and K = 48 is no multiple of 32"):
        QuantizedLinear(48, 8, scheme="int4")
    with pytest.raises(ValueError, match="dynamic is True; with scheme 'int4' it takes False"):
        QuantizedLinear(64, 8, scheme="int4", dynamic=True)


def test_transformers():
    """GPT-2's Conv1D, whose K is its first dimension, and T5's own head, fused and not."""
    import transformers as hf

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_inner": 96, "vocab_size": 61, "n_positions": 32}
    small = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 61}
    for kind, config in (
        (hf.GPT2LMHeadModel, hf.GPT2Config(**sizes)),
        (hf.T5ForConditionalGeneration, hf.T5Config(**small, tie_word_embeddings=False, decoder_start_token_id=0)),
    ):
        model = kind(config).eval()
        ids = torch.randint(61, (2, 7))
        more = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
        quantize_(model, "int4")
        found = formats(model)
        assert all(
            (form == "int8") == any(n in key for n in ("wte", "lm_head", "shared", "embed"))
            for key, form in found.items()
        )
        assert {"int4", "int8"} == set(found.values())
        plain, fused = unquantize_(copy.deepcopy(model)), copy.deepcopy(model)
        pyfused.fuse_(fused)
        for made in (model, fused):
            with torch.no_grad():
                torch.testing.assert_close(made(ids, **more).logits, plain(ids, **more).logits, rtol=1e-4, atol=1e-4)
        options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(fused.generate(ids, **options), plain.generate(ids, **options))
