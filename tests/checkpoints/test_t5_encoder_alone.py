"""Is T5's encoder, saved without a decoder, a model whose encode works and whose decoder is refused by name?"""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import pyfused
from pyfused import Generator, T5Backbone, cli
from pyfused.checkpoints import open_checkpoint
from pyfused.models.backbone import Backbone
from pyfused.verify import verify

SIZES = {"vocab_size": 61, "num_layers": 2, "num_decoder_layers": 3, "d_model": 24, "d_kv": 5, "num_heads": 4, "d_ff": 40}
SIZES |= {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
IDS = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(3))
MASK = torch.ones(2, 9, dtype=torch.int64)
MASK[1, 5:] = 0


@pytest.fixture
def theirs(tmp_path):
    """transformers' encoder, saved in tmp_path."""
    model = transformers.T5EncoderModel(transformers.T5Config(**SIZES)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(float("norm" in name) + 0.2 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path)
    return model


@torch.no_grad()
def check(model, theirs):
    expected = copy.deepcopy(theirs).double()(IDS, attention_mask=MASK).last_hidden_state
    actual = model.double().encode(encoder_token_ids=IDS, encoder_padding_mask=MASK)
    assert (actual - expected)[MASK.bool()].abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "change",
    [
        {}, {"architectures": ["T5EncoderModel"]}, {"architectures": ["MT5EncoderModel"], "model_type": "mt5"},
        {"architectures": None}, {"architectures": ["T5ForConditionalGeneration"]}, {"is_encoder_decoder": True},
        {"architectures": None, "is_encoder_decoder": False},
    ],
)  # fmt: skip
def test_whatever_the_configuration_says(tmp_path, theirs, edit, change):
    edit(tmp_path / "config.json", **change)
    model = Backbone.from_preset(tmp_path)
    assert type(model) is T5Backbone
    assert model.decoder is None
    assert model.get_config()["num_decoder_layers"] == 0
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert not any(name.startswith("decoder") for name in model.state_dict())
    check(model, theirs)


def test_a_full_file_under_an_encoders_configuration(tmp_path, theirs):
    """As transformers does: the decoder is left unread, and said to be."""
    config = json.loads((tmp_path / "config.json").read_text())
    full = transformers.T5ForConditionalGeneration(transformers.T5Config(**SIZES))
    weights = {name: tensor.clone() for name, tensor in (full.state_dict() | theirs.state_dict()).items()}
    save_file(weights, tmp_path / "model.safetensors")
    assert config["architectures"] == ["T5EncoderModel"]
    with pytest.warns(UserWarning, match=r"left unread: decoder.block.*and \d+ more"):
        model = Backbone.from_preset(tmp_path)
    assert model.decoder is None
    check(model, theirs)


def test_a_full_model_whose_configuration_an_encoder_shared(tmp_path):
    """T5EncoderModel(config) writes is_encoder_decoder=False into the configuration that it is given."""
    full = transformers.T5ForConditionalGeneration(transformers.T5Config(**SIZES)).eval()
    transformers.T5EncoderModel(full.config)
    full.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["is_encoder_decoder"] is False
    model = T5Backbone.from_preset(tmp_path).eval()
    assert model.get_config()["num_decoder_layers"] == 3
    inputs = {"encoder_token_ids": IDS, "encoder_padding_mask": MASK, "decoder_token_ids": IDS[:, :4]}
    with torch.no_grad():
        actual = model(inputs | {"decoder_padding_mask": None})["decoder_sequence_output"]
        expected = full(IDS, MASK, decoder_input_ids=IDS[:, :4], output_hidden_states=True).decoder_hidden_states[-1]
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()


def test_half_a_decoder_is_refused(tmp_path, theirs, edit):
    edit(tmp_path / "config.json", architectures=None, is_encoder_decoder=True)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"decoder.final_layer_norm.weight": torch.ones(24)}, path)
    with pytest.raises(ValueError, match=r"'decoder.block.0.layer.0.layer_norm.weight' of shape .* is missing"):
        open_checkpoint(tmp_path)


def test_what_works_and_what_is_refused(tmp_path, theirs):
    model = Backbone.from_preset(tmp_path)
    source = {"encoder_token_ids": IDS, "encoder_padding_mask": MASK}
    states = model.encode(source)
    out = model(source, return_hidden_states=True, return_attentions=True)
    assert out.keys() == {"encoder_sequence_output", "encoder_hidden_states", "encoder_attentions"}
    assert torch.equal(out["encoder_sequence_output"], states)
    assert len(out["encoder_hidden_states"]) == 3
    (first, _) = pyfused.encode(model, [IDS[0].tolist(), IDS[1, :5].tolist()])
    torch.testing.assert_close(first, states[0], rtol=1e-4, atol=1e-4)
    alone = "needs the decoder, and this T5Backbone is the encoder alone"
    with pytest.raises(ValueError, match=f"decoder_token_ids {alone}"):
        model(source | {"decoder_token_ids": IDS, "decoder_padding_mask": None})
    with pytest.raises(ValueError, match=f"logits {alone}"):
        model.logits(states)
    with pytest.raises(ValueError, match=f"new_cache {alone}"):
        model.new_cache(1, 3)
    with pytest.raises(ValueError, match=f"generation {alone}"):
        Generator(model)
    with pytest.raises(ValueError, match="encoder_padding_mask is missing"):
        model(encoder_token_ids=IDS)
    again = T5Backbone.from_config(model.get_config())
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert (len(model.texts), len(T5Backbone.texts)) == (1, 2)
    for wrong, error in ((-1, ValueError), (False, TypeError)):
        with pytest.raises(error, match="num_decoder_layers is"):
            T5Backbone.from_config(model.get_config() | {"num_decoder_layers": wrong})


def test_gradients_and_training(tmp_path, theirs):
    model = Backbone.from_preset(tmp_path).train()
    model.encode(encoder_token_ids=IDS, encoder_padding_mask=MASK).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_saved_and_read_by_transformers(tmp_path, theirs):
    Backbone.from_preset(tmp_path).save_to_preset(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"] == ["T5EncoderModel"]
    assert config["num_decoder_layers"] > 0  # transformers has no such model with 0
    check(Backbone.from_preset(tmp_path / "saved"), theirs)
    loaded, report = transformers.T5EncoderModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(loaded(IDS).last_hidden_state, theirs(IDS).last_hidden_state)


def test_from_the_command_line(tmp_path, theirs, capsys, monkeypatch):
    monkeypatch.setattr("pyfused.verify.available", lambda device: ["cpu"])  # Triton's interpreter would take minutes
    report = verify(str(tmp_path))
    assert report["passed"]
    assert set(report["inputs"]) == {"encoder_token_ids", "encoder_padding_mask"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer", "extra_ids": 0}))
    assert cli.main(["generate", str(tmp_path), "--prompt", "x"]) == 2
    assert "generation needs the decoder" in capsys.readouterr().err
    config = json.loads((tmp_path / "config.json").read_text())
    weights = load_file(tmp_path / "model.safetensors")
    weights["shared.weight"] = torch.randn(400, 24)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))
    assert cli.main(["encode", str(tmp_path), "--text", "Light", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["texts"]
    assert len(row["states"][0]) == 24
