"""Does from_preset build the right class in the right dtype, and do the errors name what was wrong?"""

from dataclasses import replace

import pytest
import torch

from pyfused import GPT2Backbone
from pyfused.checkpoints import open_checkpoint
from pyfused.families import FAMILIES, family_of
from pyfused.models.backbone import Backbone, model_names
from pyfused.models.dtypes import resolve_dtype


def test_resolve_dtype():
    for name in ("float32", "bfloat16", "float16", "float64"):
        dtype = getattr(torch, name)
        assert resolve_dtype(name) is resolve_dtype(dtype) is resolve_dtype(f"torch.{name}") is dtype
    for wrong in ("int8", "float", "", torch.int64, torch.complex64):
        with pytest.raises(ValueError, match=r"dtype is .*; it takes one of float32"):
            resolve_dtype(wrong)
    assert resolve_dtype(None) is torch.get_default_dtype()
    for wrong in (32, float):
        with pytest.raises(TypeError, match=r"dtype is of type .*; it takes one of float32"):
            resolve_dtype(wrong)


@pytest.mark.parametrize("name", ["hf_gpt2", "keras_gpt2", "keras_gpt2_bf16"])
def test_from_preset(golden, same, name):
    directory = golden / "ckpt" / name
    checkpoint = open_checkpoint(directory)
    for cls in (Backbone, GPT2Backbone):
        model = cls.from_preset(directory)
        assert type(model) is GPT2Backbone
        assert not model.training
        same(model.state_dict(), checkpoint.tensors())
    assert all(parameter.requires_grad for parameter in model.parameters())
    own = {"dtype": str(checkpoint.dtype).removeprefix("torch."), "name": None, "trainable": True}
    assert model.get_config() == checkpoint.config | own
    again = GPT2Backbone.from_config(model.get_config())
    assert {n: (t.shape, t.dtype) for n, t in again.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in model.state_dict().items()
    }
    for dtype in ("float16", torch.bfloat16, torch.float64):
        model = Backbone.from_preset(str(directory), dtype=dtype)
        same(model.state_dict(), checkpoint.tensors(resolve_dtype(dtype)))


def test_overrides_and_random_weights(golden):
    directory = golden / "ckpt" / "hf_gpt2"
    assert Backbone.from_preset(directory, dropout=0.0).get_config()["dropout"] == 0.0
    with pytest.raises(ValueError, match=r"overrides: unknown \['depth', 'dropuot'\]; they take vocabulary_size, "):
        Backbone.from_preset(directory, dropuot=0.0, depth=3)
    with pytest.raises(
        ValueError, match=r"'position_embedding.weight' has shape \(16, 12\), this GPT2Backbone takes \(8, 12\)"
    ):
        Backbone.from_preset(directory, max_sequence_length=8)
    fresh = Backbone.from_preset(directory, load_weights=False, num_layers=1, dtype="bfloat16")
    assert len(fresh.layers) == 1
    assert fresh.final_norm.weight.dtype == torch.bfloat16
    assert torch.equal(fresh.final_norm.weight, torch.ones(12, dtype=torch.bfloat16))
    loaded = Backbone.from_preset(directory)
    assert not torch.equal(loaded.token_embedding.weight, Backbone.from_preset(directory, False).token_embedding.weight)


def test_load_weights_false_needs_no_weight_file(preset):
    directory = preset("keras_gpt2")
    (directory / "model.weights.h5").unlink()
    assert isinstance(Backbone.from_preset(directory, load_weights=False), GPT2Backbone)
    with pytest.raises(ValueError, match="no weights found"):
        Backbone.from_preset(directory)


def test_a_subclass_refuses_another_model(golden, monkeypatch):
    class Other(Backbone):
        pass

    class Mine(GPT2Backbone):
        pass

    assert type(Mine.from_preset(golden / "ckpt" / "hf_gpt2")) is Mine
    place = f"{Other.__module__}:{Other.__qualname__}"
    monkeypatch.setitem(FAMILIES, "t5", replace(FAMILIES["t5"], backbone=place))
    with pytest.raises(ValueError, match=r"is a gpt2 checkpoint; Other takes t5"):
        Other.from_preset(golden / "ckpt" / "hf_gpt2")


def test_the_families_of_a_class():
    assert model_names(Backbone) == {"gpt2", "albert", "t5", "fnet"}
    assert model_names(GPT2Backbone) == {"gpt2"}
    assert family_of(GPT2Backbone).name == "gpt2"
    with pytest.raises(TypeError, match="model is a Linear; it takes a backbone of one of gpt2"):
        family_of(torch.nn.Linear)
    assert set(GPT2Backbone.presets) >= {"gpt2_base_en", "gpt2_extra_large_en"}
    assert GPT2Backbone.presets["gpt2_base_en"]["metadata"]["params"] == 124_439_808
    with pytest.raises(TypeError, match="config is of type list"):
        GPT2Backbone.from_config([1])


def test_tensors_outside_the_state_dict_are_refused(golden, monkeypatch):
    """Nothing would fill them on the way from the meta device."""

    class Hidden(GPT2Backbone):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.register_buffer("positions", torch.arange(3), persistent=False)

    with pytest.raises(RuntimeError, match=r"Hidden: \['positions'\] are not in its state dict"):
        Hidden.from_preset(golden / "ckpt" / "hf_gpt2")


def test_shared_parameters_stay_shared(golden):
    class Shared(GPT2Backbone):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.layers[1].attention_norm.weight = self.layers[0].attention_norm.weight

    model = Shared.from_preset(golden / "ckpt" / "hf_gpt2")
    assert model.layers[1].attention_norm.weight is model.layers[0].attention_norm.weight
