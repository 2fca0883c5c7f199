"""Is a model one row of families.py plus its own files? A made-up fifth family works everywhere."""

import json
import shutil

import made_up_family
import pytest
import torch

import pyfused
from pyfused import cli, families
from pyfused.bench.run import bench  # noqa: F401 - it reads the table; import it before adding the row
from pyfused.checkpoints import open_checkpoint, resolve_preset
from pyfused.verify import verify


@pytest.fixture
def preset(monkeypatch, tmp_path):
    monkeypatch.setitem(families.FAMILIES, "bigram", made_up_family.FAMILY)
    shipped = resolve_preset("gpt2_tiny_en")
    vocabulary = pyfused.Backbone.from_preset(shipped).get_config()["vocabulary_size"]
    model = made_up_family.BigramBackbone(vocabulary, 16)
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if name == "norm.weight" else torch.nn.init.normal_(parameter)
    model.save_to_preset(tmp_path)
    for file in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        if (shipped / file).is_file():
            shutil.copy(shipped / file, tmp_path)
    return tmp_path


def test_from_preset(preset):
    assert open_checkpoint(preset).model == "bigram"
    model = pyfused.Backbone.from_preset(preset)
    assert type(model) is made_up_family.BigramBackbone
    assert type(made_up_family.BigramBackbone.from_preset(preset)) is made_up_family.BigramBackbone
    with pytest.raises(ValueError, match="is a bigram checkpoint; GPT2Backbone takes gpt2"):
        pyfused.GPT2Backbone.from_preset(preset)
    (preset / "config.json").write_text(json.dumps({"vocab_size": 5, "bigram_width": 3}))  # in the form of old files
    assert open_checkpoint(preset, weights=False).model == "bigram"
    (preset / "config.json").write_text(json.dumps({"model_type": "trigram"}))
    with pytest.raises(ValueError, match="pyfused reads gpt2, albert, t5, mt5, fnet, bigram"):
        open_checkpoint(preset)


def test_generate_and_encode(preset):
    model = pyfused.Backbone.from_preset(preset)
    (tokens,) = pyfused.Generator(model).generate([[5, 7]], max_new_tokens=3)
    fed = torch.tensor([7, *tokens[:-1]])
    assert tokens == model.logits(model(token_ids=fed)).argmax(-1).tolist()
    (states,) = pyfused.encode(model, [[5, 7]])
    assert torch.equal(states, model(token_ids=torch.tensor([5, 7])))


def test_verify(preset):
    assert verify(str(preset))["passed"]


@pytest.mark.parametrize(
    "command", [["generate", "--prompt", "In", "--max-new-tokens", "4"], ["encode", "--text", "In"], ["verify"]]
)
def test_the_command_line(preset, capsys, command):
    assert cli.main([command[0], str(preset), *command[1:]]) == 0
    assert capsys.readouterr().out


def test_rows_name_what_is_there():
    for family in families.FAMILIES.values():
        backbone = families.load(family.backbone)
        assert backbone.__name__ == family.class_name
        assert getattr(pyfused, family.class_name) is backbone
        assert family.class_name in pyfused.__all__
        assert families.family_of(backbone) is family
        names = "config_from_hf", "config_to_hf", "config_from_keras", "config_to_keras", "name_tensors", "settle"
        for name in names:
            assert callable(getattr(families.load(family.checkpoint), name))
        for place in (family.decoding, family.adapters):
            assert place is None or families.load(place)
