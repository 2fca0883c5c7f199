"""Do models that skip padding give real tokens the same outputs and gradients as with it, and zeros elsewhere?"""

import pytest
import torch

import pyfused
from pyfused.nn import Packing, Visibility
from pyfused.testing import assert_close

SIZES = {"vocabulary_size": 61, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "intermediate_dim": 48}


def gpt2(**options):
    return pyfused.GPT2Backbone(**SIZES, max_sequence_length=40, dropout=0.0, **options)


def t5(**options):
    return pyfused.T5Backbone(**SIZES, key_value_dim=16, dropout=0.0, num_buckets=8, max_distance=12, **options)


def albert(**options):
    return pyfused.AlbertBackbone(**SIZES, embedding_dim=16, num_groups=2, max_sequence_length=40, **options)


def t5_inputs(tokens, mask):
    return {
        "encoder_token_ids": tokens,
        "encoder_padding_mask": mask,
        "decoder_token_ids": tokens[:, :5],
        "decoder_padding_mask": None,
    }


def gpt2_inputs(tokens, mask):
    return {"token_ids": tokens, "padding_mask": mask}


def albert_inputs(tokens, mask):
    return {"token_ids": tokens, "segment_ids": tokens % 2, "padding_mask": mask}


MODELS = {"gpt2": (gpt2, gpt2_inputs), "t5": (t5, t5_inputs), "albert": (albert, albert_inputs)}


def mask_of(kind, device):
    """(4, 11): lengths 11, 4, 1 and, except for "right", a row of padding alone."""
    places = torch.arange(11, device=device)
    if kind == "right":
        return places < torch.tensor([11, 4, 1, 7], device=device)[:, None]
    if kind == "left":
        return places >= torch.tensor([0, 7, 10, 11], device=device)[:, None]
    holes = places < torch.tensor([11, 4, 1, 0], device=device)[:, None]
    return holes & (places != 2)


def states(name, output):
    """(states whose padding is skipped, other outputs of real tokens)"""
    if name == "t5":
        return output["encoder_sequence_output"], [output["decoder_sequence_output"]]
    if name == "gpt2":
        return output, []
    return output["sequence_output"], [output["pooled_output"][0]]


def exactly(model):
    """The same weights in float64."""
    exact = type(model).from_config(model.get_config() | {"dtype": "float64"}).to(model.device)
    exact.load_state_dict({name: t.double() for name, t in model.state_dict().items()})
    return exact


@pytest.mark.interpreted(kind="left")
@pytest.mark.parametrize("kind", ["right", "left", "holes"])
@pytest.mark.parametrize("name", MODELS)
def test_real_tokens_and_gradients(each_backend, device, name, kind):
    make, inputs_of = MODELS[name]
    model, mask = make().to(device), mask_of(kind, device)
    tokens = torch.randint(61, mask.shape, device=device)
    cotangent = torch.randn(*mask.shape, 32, device=device)

    def run(model, skip, reference=False):
        model.skip_padding = skip
        found, rest = states(name, model(inputs_of(tokens, mask)))
        loss = (found * cotangent.to(found.dtype))[mask].sum() + sum(t.sum() for t in rest)
        return found, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    found, gradients = run(model, True)
    assert (found[~mask] == 0).all()
    with pyfused.backend("reference"):
        plain, plain_gradients = run(model, False)
        truth, true_gradients = run(exactly(model), False)
    assert_close(found[mask], plain[mask], truth[mask])
    assert [a is None for a in gradients] == [t is None for t in true_gradients]
    # One comparison for all: the largest error of a few numbers is chance. Each gradient is divided by its own size.
    sizes = [t.abs().max() for t in true_gradients if t is not None]
    flat = [
        torch.cat([g.double().flatten() / size for g, size in zip((g for g in given if g is not None), sizes)])
        for given in (gradients, plain_gradients, true_gradients)
    ]
    assert_close(flat[0].float(), flat[1].float(), flat[2], "gradients")


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_and_attentions(device, name):
    """Hidden states are unpacked; attentions are materialised for the padded batch."""
    make, inputs_of = MODELS[name]
    model, mask = make().eval().to(device), mask_of("right", device)
    inputs = inputs_of(torch.randint(61, mask.shape, device=device), mask)
    model.skip_padding = True
    plain = make().eval().to(device)
    plain.load_state_dict(model.state_dict())

    def asked(model, **flags):
        with torch.no_grad():
            found = model(inputs, **flags)
        if name != "gpt2":
            side = "encoder_" if name == "t5" else ""
            return found.get(f"{side}hidden_states"), found.get(f"{side}attentions")
        return found.hidden_states, found.attentions

    ours, theirs = (asked(m, return_hidden_states=True)[0] for m in (model, plain))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert (a[~mask] == 0).all()
        torch.testing.assert_close(a[mask], b[mask])
    ours, theirs = (asked(m, return_attentions=True)[1] for m in (model, plain))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        found = states(
            name, model(inputs) if name != "gpt2" else model(inputs, return_attentions=True).last_hidden_state
        )
    assert (found[0][~mask] == 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_nothing_real_and_nothing_padded(device, name):
    make, inputs_of = MODELS[name]
    model = make().eval().to(device)
    tokens = torch.randint(61, (2, 6), device=device)
    with torch.no_grad():
        expected = states(name, model(inputs_of(tokens, None)))[0]
        model.skip_padding = True
        nothing = states(name, model(inputs_of(tokens, torch.zeros(2, 6, device=device))))[0]
        assert (nothing == 0).all()
        for mask in (None, torch.ones(2, 6)):
            assert torch.equal(states(name, model(inputs_of(tokens, mask)))[0], expected)


def test_work_is_that_of_the_real_tokens(monkeypatch):
    """The feed-forward networks get 16 of the 44 rows."""
    model = gpt2().eval()
    seen = []
    model.layers[0].feed_forward.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    mask = torch.arange(11) < torch.tensor([11, 4, 1, 0])[:, None]
    for skip in (False, True):
        model.skip_padding = skip
        model({"token_ids": torch.zeros(4, 11, dtype=torch.int64), "padding_mask": mask})
    assert seen == [(4, 11, 32), (1, 16, 32)]


def test_prefill_fills_the_cache(device):
    """Decoding from a cache filled without padding equals decoding from one filled with it."""
    model, mask = gpt2().eval().to(device), mask_of("right", device)
    tokens, new = torch.randint(61, mask.shape, device=device), torch.randint(61, (4, 1), device=device)
    longer = torch.cat((mask, mask.new_ones(4, 1)), 1)

    def last(skip):
        model.skip_padding = skip
        cache = model.new_cache(4, 20)
        model({"token_ids": tokens, "padding_mask": mask}, cache=cache)
        return model({"token_ids": new, "padding_mask": longer}, cache=cache)

    torch.testing.assert_close(last(True), last(False))


@pytest.mark.parametrize("name", MODELS)
def test_compiled_models_compute_padding_and_zero_it(name):
    make, inputs_of = MODELS[name]
    model, mask = make().eval(), mask_of("right", "cpu")
    inputs = inputs_of(torch.randint(61, mask.shape), mask)
    model.skip_padding = True
    with torch.no_grad():
        expected = states(name, model(inputs))[0]
        compiled = states(name, torch.compile(model, backend="eager")(inputs))[0]
    assert (compiled[~mask] == 0).all()
    torch.testing.assert_close(compiled, expected)


@pytest.mark.parametrize("preset", ["gpt2_tiny_en", "t5_tiny_en", "albert_tiny_en"])
def test_from_preset(preset):
    assert not pyfused.Backbone.from_preset(preset, load_weights=False).skip_padding
    for load in (True, False):
        assert pyfused.Backbone.from_preset(preset, load, skip_padding=True).skip_padding
    with pytest.raises(TypeError, match="skip_padding is 1; it takes True or False"):
        pyfused.Backbone.from_preset(preset, skip_padding=1)


def test_fnet_has_no_padding_to_skip():
    with pytest.raises(ValueError, match="skip_padding is True; an FNetBackbone has no padding"):
        pyfused.Backbone.from_preset("fnet_tiny_en", skip_padding=True)


def test_packing(device):
    mask = mask_of("holes", device)
    packing, x = Packing(mask), torch.randn(4, 11, 3, device=device)
    assert packing.cu_seqlens.tolist() == [0, 10, 13, 14, 14]
    assert packing.max_seqlen == 10
    assert torch.equal(packing.pack(x)[0], x[mask])
    assert torch.equal(packing.unpack(packing.pack(x)), x.masked_fill(~mask[..., None], 0))
    places = torch.tensor([4, 3, 0], device=device)
    expected = x[:3][torch.arange(3, device=device), places]
    short = Packing(mask[:3])
    assert torch.equal(short.at(short.pack(x[:3]), places), expected)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nothing_at_all(device, shape):
    """pyfused does not read a GPU's masks, so empty ones get this far."""
    visible = Visibility(padding_mask=torch.zeros(shape, dtype=torch.bool, device=device)).skip_padding(unbroken=True)
    x = torch.randn(*shape, 3, device=device)
    assert visible.packing is None
    assert torch.equal(visible.unpacked(visible.packed(x)), x)
