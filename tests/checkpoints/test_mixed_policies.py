"""Do Keras's mixed policies compute in the compute dtype, as KerasHub does, with variables in float32?"""

import copy
import io
import json
import pickle

import pytest
import torch

from pyfused import Generator, T5Backbone, backend, encode
from pyfused.checkpoints import open_checkpoint
from pyfused.models.backbone import Backbone
from pyfused.verify import _copy_weights

POLICIES = [
    ("mixed_bfloat16", torch.bfloat16), ("mixed_float16", torch.float16),
    ({"module": "keras", "class_name": "DTypePolicy", "config": {"name": "mixed_bfloat16"}}, torch.bfloat16),
]  # fmt: skip
IDS = torch.randint(4, 29, (2, 9), generator=torch.Generator().manual_seed(3))
INPUTS = {
    "keras_gpt2": {"token_ids": IDS, "padding_mask": torch.ones(2, 9)},
    "keras_albert": {"token_ids": IDS, "segment_ids": IDS % 2, "padding_mask": torch.ones(2, 9)},
    "keras_fnet": {"token_ids": IDS, "segment_ids": IDS % 2},
    "keras_t5": {"encoder_token_ids": IDS, "encoder_padding_mask": torch.ones(2, 9),
                 "decoder_token_ids": IDS, "decoder_padding_mask": torch.ones(2, 9)},
}  # fmt: skip


@pytest.fixture
def mixed(preset, edit_keras):
    """A function that gives a golden Keras directory another dtype policy."""

    def write(name, policy):
        directory = preset(name)
        edit_keras(directory, dtype=policy)
        return directory

    return write


def flat(out):
    return torch.cat([value.flatten() for value in (out.values() if isinstance(out, dict) else [out])])


@torch.no_grad()
@pytest.mark.parametrize("policy, dtype", POLICIES, ids=str)
@pytest.mark.parametrize("name", sorted(INPUTS))
def test_variables_and_outputs(mixed, same, name, policy, dtype):
    directory = mixed(name, policy)
    checkpoint = open_checkpoint(directory)
    assert (checkpoint.dtype, checkpoint.compute_dtype) == (torch.float32, dtype)
    model = Backbone.from_preset(directory)
    same(model.state_dict(), checkpoint.tensors(torch.float32))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.dtype == dtype
    out = flat(model(INPUTS[name]))
    assert out.dtype == dtype
    assert torch.equal(out, flat(Backbone.from_preset(directory, dtype=dtype)(INPUTS[name])))
    plain = Backbone.from_preset(directory, dtype="float32")  # what is asked for goes before the policy
    assert flat(plain(INPUTS[name])).dtype == plain.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("name", ["GPT2", "Albert", "FNet", "T5"])
def test_as_keras_hub_computes(tmp_path, name):
    """The error against float64 is like KerasHub's own; float32 all the way would be a hundredth of it."""
    keras_hub = pytest.importorskip("keras_hub")
    sizes = {"vocabulary_size": 29, "num_layers": 2, "hidden_dim": 24, "intermediate_dim": 56, "dropout": 0.0}
    sizes |= {} if name == "FNet" else {"num_heads": 4}
    sizes |= {"embedding_dim": 10} if name == "Albert" else {}
    theirs = getattr(keras_hub.models, f"{name}Backbone")(**sizes, dtype="mixed_bfloat16")
    for variable in theirs.weights:
        variable.assign(0.2 * torch.randn(tuple(variable.shape)))
    theirs.save_to_preset(str(tmp_path))
    assert "mixed_bfloat16" in (tmp_path / "config.json").read_text()
    inputs = INPUTS[f"keras_{name.lower()}"]
    model, exact = Backbone.from_preset(tmp_path), Backbone.from_preset(tmp_path, dtype="float64")
    _copy_weights(model, exact, torch.bfloat16)
    expected, actual = theirs(inputs), model(inputs)
    expected = expected if isinstance(expected, dict) else {"": expected}
    assert {str(value.dtype) for value in expected.values()} == {"torch.bfloat16"} == {str(flat(actual).dtype)}
    truth, actual = flat(exact(inputs)), flat(actual)
    names = list(model(inputs)) if isinstance(model(inputs), dict) else [""]
    expected = flat({key: expected[key] for key in names})
    errors = [(found.double() - truth).square().mean().sqrt() for found in (actual, expected)]
    scale = truth.square().mean().sqrt()
    assert errors[0] <= 2 * errors[1] + torch.finfo(torch.bfloat16).eps * scale
    assert errors[0] > 1e-4 * scale  # it is computed in bfloat16


def test_gradients_reach_the_float32_variables(mixed):
    model = Backbone.from_preset(mixed("keras_gpt2", "mixed_bfloat16")).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    before = copy.deepcopy(model.state_dict())
    model(INPUTS["keras_gpt2"]).float().square().mean().backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
    optimizer.step()
    # so small a step is lost where the variables themselves are bfloat16
    assert not torch.equal(before["layers.0.feed_forward.inner.weight"], model.layers[0].feed_forward.inner.weight)
    changed = model.state_dict()["layers.0.feed_forward.inner.weight"] - before["layers.0.feed_forward.inner.weight"]
    assert 0 < changed.abs().max() < 1e-3


@torch.no_grad()
def test_everything_else_a_model_does(mixed, tmp_path):
    directory = mixed("keras_t5", "mixed_bfloat16")
    model, twin = Backbone.from_preset(directory), Backbone.from_preset(directory, dtype="bfloat16")
    prompts = [[5, 9, 12, 1], [7, 1]]
    twin.register_forward_hook(lambda *_: None)  # both then run the same kernels, module by module
    assert Generator(model).generate(prompts, 6) == Generator(twin).generate(prompts, 6)
    for ours, theirs in zip(encode(model, prompts), encode(twin, prompts)):
        assert torch.equal(ours, theirs)
        assert ours.dtype == torch.bfloat16
    assert model.new_cache(1, 3).signature[3] == torch.bfloat16
    expected = flat(model(INPUTS["keras_t5"]))
    held = io.BytesIO()
    torch.save(model, held)
    held.seek(0)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(held, weights_only=False)):
        assert type(again) is T5Backbone
        assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
        assert torch.equal(flat(again(INPUTS["keras_t5"])), expected)
    config = model.get_config()
    assert config["dtype"] == "mixed_bfloat16"
    again = T5Backbone.from_config(config)
    assert (again.dtype, next(again.parameters()).dtype) == (torch.bfloat16, torch.float32)
    again.load_state_dict(model.state_dict())
    assert torch.equal(flat(again.eval()(INPUTS["keras_t5"])), expected)
    model.save_to_preset(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "float32"
    empty = Backbone.from_preset(directory, load_weights=False)
    assert (empty.dtype, next(empty.parameters()).dtype) == (torch.bfloat16, torch.float32)
    asked = Backbone.from_preset("gpt2_tiny_en", load_weights=False, dtype="mixed_float16")
    assert (asked.dtype, next(asked.parameters()).dtype) == (torch.float16, torch.float32)
    with backend("reference"):
        assert model.encode(encoder_token_ids=IDS, encoder_padding_mask=None).dtype == torch.bfloat16


def test_the_constructor_says_who_takes_a_policy(golden):
    config = Backbone.from_preset(golden / "ckpt" / "keras_t5", load_weights=False).get_config()
    with pytest.raises(ValueError, match="in from_preset and from_config mixed_float16 and mixed_bfloat16"):
        T5Backbone(**config | {"dtype": "mixed_float16"})
