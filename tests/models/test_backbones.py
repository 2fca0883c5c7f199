"""Does each of the four backbones equal transformers' model run live, start and train as it does, and keep its own options?"""

import copy
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backbone_cases import (
    REQUIRED,
    TOYS,
    backbone_of_options,
    call_of,
    check_outputs,
    checkpoint,
    hf_model,
    hf_outputs,
    inputs_of,
    like_hf,
    outputs_of,
    renamed,
)
from quantized_cases import BACKBONES, spread
from quantized_cases import inputs_of as quantized_inputs

import pyfused
from pyfused import Backbone, dispatch
from pyfused.kernels.shared.buckets import _by_distance
from pyfused.testing import assert_close

PADDED = ("gpt2", "albert", "t5")  # FNet takes no mask
# transformers' configurations to compare: the toy one, and others with the choices that it lacks
CONFIGS = {
    "gpt2": ({}, {"activation_function": "gelu", "layer_norm_epsilon": 1e-3, "scale_attn_by_inverse_layer_idx": True}),
    "albert": (
        {}, {"num_hidden_layers": 5, "inner_group_num": 1, "hidden_act": "gelu", "layer_norm_eps": 1e-3},
        {"num_hidden_groups": 1, "hidden_act": "relu", "type_vocab_size": 3},
    ),
    "t5": (
        {}, {"tie_word_embeddings": False, "feed_forward_proj": "gelu"},
        {"feed_forward_proj": "relu", "num_decoder_layers": 3, "relative_attention_num_buckets": 8,
         "relative_attention_max_distance": 11, "layer_norm_epsilon": 1e-3},
    ),
    "fnet": ({}, {"hidden_act": "gelu", "layer_norm_eps": 1e-3}, {"hidden_act": "relu"}),
}  # fmt: skip
# The published models' shapes, with fewer layers and words; (rows, length, padding). T5's texts exceed max_distance
BASE = {
    "gpt2": ({"n_layer": 3, "n_head": 12, "n_embd": 768, "n_inner": None, "n_positions": 128}, (1, 96, "none")),
    "albert": ({"num_hidden_layers": 3, "num_attention_heads": 12, "embedding_size": 128, "hidden_size": 768,
                "intermediate_size": 3072, "max_position_embeddings": 150, "num_hidden_groups": 1,
                "inner_group_num": 1}, (3, 140, "right")),
    "t5": ({"num_layers": 3, "num_heads": 12, "d_model": 768, "d_ff": 2048, "d_kv": 64}, (1, 150, "none")),
    "fnet": ({"num_hidden_layers": 3, "hidden_size": 768, "intermediate_size": 3072, "max_position_embeddings": 100},
             (1, 99, "none")),
}  # fmt: skip


CASES = [
    (family, dtype, padding)
    for family in PADDED
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for padding in ("none", "right", "left")
]


@torch.no_grad()
@pytest.mark.parametrize(
    "family, dtype, padding",
    [*CASES, ("fnet", torch.float32, "none")],  # whose original takes no 16 bits on a CPU
)
def test_equals_transformers(family, dtype, padding, device):
    inputs = inputs_of(family, padding=padding)
    for config in CONFIGS[family]:
        check_outputs(hf_model(family, dtype, **config), inputs, device, f"{config}")


@torch.no_grad()
@pytest.mark.parametrize("family", BASE)
def test_equals_transformers_at_base_size(family, device):
    sizes, (rows, length, padding) = BASE[family]
    inputs = inputs_of(family, rows, length, padding, 200)
    check_outputs(hf_model(family, spread=0.03, vocab_size=200, **sizes), inputs, device)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.bool_, np.float32, torch.int8, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["albert", "t5"])  # test_gpt2.py has GPT-2's, with ids of any dtype
def test_any_dtype_of_mask(family, kind, device):
    model, call = like_hf(hf_model(family)).to(device), call_of(family, inputs_of(family, padding="right"))
    expected = outputs_of(model, call)
    for name, mask in call.items():
        if name.endswith("mask"):
            call[name] = mask.to(kind) if isinstance(kind, torch.dtype) else mask.numpy().astype(kind)
    for name, found in outputs_of(model, call).items():
        assert torch.equal(found, expected[name])


SHORT = {"dropout": 0.2, "layer_norm_epsilon": 1e-6}
OPTIONS = {
    "gpt2": {**SHORT, "activation": "relu", "attention_dropout": 0.0, "tie_embedding_weights": False, "cross_attention": True},
    "albert": {**SHORT, "num_segments": 3, "attention_dropout": 0.1, "feed_forward_dropout": 0.0, "pooler": False},
    "t5": {"dropout": 0.2, "key_value_dim": 7, "use_gated_activation": False, "tie_embedding_weights": False,
           "num_decoder_layers": 1, "num_buckets": 16, "max_distance": 40, "decoder_start_token_id": 5},
    "fnet": {**SHORT, "num_segments": 2, "pooler": False},
}  # fmt: skip


@pytest.mark.parametrize("family", OPTIONS)
def test_config_round_trip(family):
    model = backbone_of_options(family, **{"activation": "gelu_pytorch_tanh", "name": "small"} | OPTIONS[family],
                                dtype="bfloat16", trainable=False)  # fmt: skip
    config = model.get_config()
    assert config.items() >= ({"activation": "gelu_new", "name": "small", "trainable": False} | OPTIONS[family]).items()
    again = type(model).from_config(config)
    assert again.get_config() == config
    assert {k: (v.shape, v.dtype) for k, v in again.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in model.state_dict().items()
    }
    assert (again.name, again.dtype) == ("small", torch.bfloat16)
    assert not any(p.requires_grad for p in again.parameters())
    assert model.to(torch.float32).get_config()["dtype"] == "float32"


@pytest.mark.parametrize("family", TOYS)
def test_initial_weights_are_those_of_transformers(family):
    toy = hf_model(family, vocab_size=400)
    hf = type(toy)(toy.config)
    config, state = hf.config.to_dict(), hf.state_dict()
    with checkpoint(config, state) as folder:
        mine = Backbone.from_preset(folder, load_weights=False).state_dict()
    theirs = renamed(config, state)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        for part, (a, b) in enumerate(zip(mine[name].chunk(3), tensor.chunk(3))):  # T5's queries have their own spread
            if tensor.dim() == 1:
                assert torch.equal(a, b), name
            elif tensor.numel() > 500:
                assert abs(a.std() / b.std() - 1) < 6 / a.numel() ** 0.5, (name, part)


@contextmanager
def recorded_dropout():
    """Every dropout of the block in order, (the operator, its rate and shape). None drops anything."""
    calls, original, attention = [], F.dropout, pyfused.nn.attention.attention

    def counted(x, p, *rest):
        calls.append(("dropout", p, tuple(x.shape)))
        return original(x, 0.0)

    def plain(*args, dropout_p, **kwargs):
        calls.append(("attention", dropout_p))
        return attention(*args, dropout_p=0.0, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "dropout", counted)
        patch.setattr(pyfused.nn.attention, "attention", plain)
        yield calls


WIDE, TARGET, HEADS = ("dropout", 0.3, (3, 17, 24)), ("dropout", 0.3, (3, 9, 24)), ("attention", 0.3)
OWN = {"attention_dropout": 0.2, "feed_forward_dropout": 0.1}  # rates of single sites


@pytest.mark.parametrize(
    "family, options, sites",
    [
        ("gpt2", {"num_layers": 2}, [WIDE, *[HEADS, WIDE, WIDE] * 2]),
        ("gpt2", {"num_layers": 1, "embedding_dropout": 0.0, "attention_dropout": 0.2, "residual_dropout": 0.1},
         [("attention", 0.2), *[("dropout", 0.1, (3, 17, 24))] * 2]),
        ("albert", {}, [("dropout", 0.3, (3, 17, 10)), *[HEADS, WIDE, WIDE] * 2]),  # KerasHub's
        ("albert", {"feed_forward_dropout": 0.0}, [("dropout", 0.3, (3, 17, 10)), *[HEADS, WIDE] * 2]),  # transformers'
        ("albert", OWN, [("dropout", 0.3, (3, 17, 10)), *[("attention", 0.2), WIDE, ("dropout", 0.1, (3, 17, 24))] * 2]),
        ("t5", {"num_decoder_layers": 1},
         [WIDE, *[HEADS, WIDE, ("dropout", 0.3, (3, 17, 56)), WIDE] * 2, WIDE,
          TARGET, HEADS, TARGET, HEADS, TARGET, ("dropout", 0.3, (3, 9, 56)), TARGET, TARGET]),
        ("fnet", {}, [WIDE] * 3),
    ],
)  # fmt: skip
def test_dropout_sites(family, options, sites, device):
    """If no site drops anything, training equals evaluation; with a rate, the sites are the paper's."""
    model = backbone_of_options(family, dropout=0.3, **options).to(device)
    call = call_of(family, inputs_of(family))

    def states():
        return outputs_of(model, call)["last_hidden_state"]

    drawn = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        drawn.append(states())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    with recorded_dropout() as calls:
        whole = states()
    assert calls == sites
    model.eval()
    torch.testing.assert_close(whole, states())


def losses(model, outputs, steps=30):
    """The loss of each AdamW step; the task is to tell the id before each place by a linear readout."""
    generator = torch.Generator().manual_seed(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    found = []
    for _ in range(steps):
        ids = torch.randint(2, 12, (8, 6), generator=generator)
        inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if hasattr(model, "decoder") else {})
        out = outputs(model, inputs)
        scores = out.get("logits", out["last_hidden_state"])[..., :12]
        scores = scores + out["pooler_output"][:, None, :12] if "pooler_output" in out else scores
        loss = F.cross_entropy(scores.flatten(0, 1), ids.roll(1, 1).flatten().to(scores.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("family", TOYS)
def test_training_follows_transformers(family, device):
    """Shared weights get the gradients from all their uses."""
    hf = hf_model(family, spread=0.1)

    def ours(dtype):
        return losses(like_hf(hf, dtype).to(device), lambda m, inputs: outputs_of(m, call_of(family, inputs)))

    actual, truth, plain = ours(torch.float32), ours(torch.float64), losses(copy.deepcopy(hf), hf_outputs)
    with pyfused.backend("reference"):
        reference = ours(torch.float32)
    assert truth[-1] < 0.95 * truth[0]
    torch.testing.assert_close(plain, truth, rtol=2e-2, atol=0)  # Adam enlarges the rounding of small gradients
    assert_close(actual, [plain, reference], truth, "losses")


# ---- what every model refuses; each model's own file has the rest ----------------------------------------------------------


def names_of(family):
    """The names of the token ids and of the embeddings in their place."""
    side = "encoder_" if family == "t5" else ""
    return f"{side}token_ids", f"{side}inputs_embeds"


@pytest.mark.parametrize("other", [{"device": "meta"}, {"dtype": torch.float16}, {"dtype": torch.float64}], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "t5", "albert", "fnet"])
def test_torchs_defaults_change_nothing(name, other):
    """torch.set_default_device and set_default_dtype, set after a model was made."""
    model = spread(BACKBONES[name]())
    given = {key: None if value is None else value.numpy() for key, value in quantized_inputs(model).items()}
    prompts, sample = [[1, 2, 3], [4]], {"temperature": 1.0, "seed": 1}

    def results():
        dispatch.forget()
        _by_distance.cache_clear()
        found = model(given)
        yield from found.values() if isinstance(found, dict) else (found,)
        yield from pyfused.encode(model, prompts)
        if name in ("gpt2", "t5"):
            generator = pyfused.Generator(model)
            for options in ({}, sample, {"num_beams": 2}):
                yield torch.tensor(generator.generate(prompts, 5, **options), device="cpu")
            yield torch.tensor(generator.generate_batch(prompts, 5, rows=1, **sample), device="cpu")

    with torch.no_grad():
        expected = list(results())
        if "device" in other:
            with torch.device("meta"):
                found = list(results())
        else:
            before = torch.get_default_dtype()
            torch.set_default_dtype(other["dtype"])
            try:
                found = list(results())
            finally:
                torch.set_default_dtype(before)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("family", TOYS)
def test_bad_input_is_refused_by_name(family, device):
    model, (ids, embeds) = backbone_of_options(family).to(device), names_of(family)
    good = dict.fromkeys(REQUIRED[family]) | {ids: torch.zeros(2, 5, dtype=torch.int64)}
    if family == "t5":
        good["decoder_token_ids"] = good[ids]
    for change, error, message in (
        ({ids: None}, ValueError, f"{ids} is missing"),
        ({ids: [[1]]}, TypeError, f"{ids} is a list"),
        ({ids: torch.zeros(2, 5)}, TypeError, f"{ids} is float32"),
        ({ids: torch.full((2, 5), 61)}, IndexError, f"{ids} holds 61; it takes 0 to 60"),
        ({ids: torch.full((2, 5), -1)}, IndexError, f"{ids} holds -1"),
        ({embeds: torch.zeros(2, 5, 24)}, ValueError, f"{embeds} is given beside {ids}"),
        ({embeds: torch.zeros(2, 5, 8), ids: None}, ValueError, f"{embeds} has shape"),
        ({"head_mask": 1}, ValueError, f"unknown key 'head_mask'; it takes {ids}"),
    ):
        with pytest.raises(error, match=message):
            model({**good, **change})
    for name in REQUIRED[family]:
        with pytest.raises(ValueError, match=f"{name} is missing"):
            model({key: value for key, value in good.items() if key != name})
    with pytest.raises(TypeError, match=f"inputs is a Tensor; it takes a dict with {ids}"):
        model(good[ids])


@pytest.mark.parametrize("family", TOYS)
def test_bad_configurations_are_refused_by_name(family):
    for change, error, message in (
        ({"num_layers": 0}, ValueError, "num_layers is 0"),
        ({"hidden_dim": 24.0}, TypeError, "hidden_dim is 24.0"),
        ({"dropout": 1.0}, ValueError, "dropout is 1.0"),
        ({"activation": "swiglu"}, ValueError, "activation( is |=)'swiglu'.*; it takes"),
        ({"layer_norm_epsilon": "a"}, TypeError, "layer_norm_epsilon is 'a'"),
        ({"layer_norm_epsilon": -1.0}, ValueError, "layer_norm_epsilon is -1.0"),
        ({"dtype": "int8"}, ValueError, "dtype is 'int8'"),
        ({"head_mask": 1}, TypeError, "unknown argument 'head_mask'"),
        ({"name": 3}, TypeError, "name is 3"),
    ):
        with pytest.raises(error, match=message):
            backbone_of_options(family, **change)
