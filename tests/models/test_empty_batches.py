"""Do the four backbones take a batch of 0 and texts of length 0? Empty states, and zero gradients of every weight."""

import pytest
import torch

import pyfused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH = 24


def ids(b, s):
    return torch.zeros(b, s, dtype=torch.int64, device=DEVICE)


MODELS = {
    "gpt2": (
        lambda: pyfused.GPT2Backbone(11, 2, 2, WIDTH, 40, max_sequence_length=16),
        lambda m, b, s, mask: m(token_ids=ids(b, s), padding_mask=mask),
    ),
    "albert": (
        lambda: pyfused.AlbertBackbone(11, 2, 2, 16, WIDTH, 40, max_sequence_length=16, pooler=False),
        lambda m, b, s, mask: m(token_ids=ids(b, s), segment_ids=None, padding_mask=mask)["sequence_output"],
    ),
    "fnet": (
        lambda: pyfused.FNetBackbone(11, 2, WIDTH, 40, max_sequence_length=16, pooler=False),
        lambda m, b, s, mask: m(token_ids=ids(b, s), segment_ids=None)["sequence_output"],
    ),
    "t5 encoder": (
        lambda: pyfused.T5Backbone(11, 2, 2, WIDTH, 40),
        lambda m, b, s, mask: m.encode(encoder_token_ids=ids(b, s), encoder_padding_mask=mask),
    ),
    "t5 decoder": (
        lambda: pyfused.T5Backbone(11, 2, 2, WIDTH, 40),
        lambda m, b, s, mask: m(
            encoder_token_ids=ids(b, 3),
            encoder_padding_mask=None,
            decoder_token_ids=ids(b, s),
            decoder_padding_mask=mask,
        )["decoder_sequence_output"],
    ),
}


@pytest.mark.parametrize(("b", "s"), [(0, 4), (2, 0), (0, 0)])
@pytest.mark.parametrize("name", MODELS)
def test_empty_states_and_zero_gradients(name, b, s):
    make, call = MODELS[name]
    model = make().to(DEVICE)
    for skip_padding in (False, True) if hasattr(model, "skip_padding") and name != "fnet" else (False,):
        model.skip_padding = skip_padding
        for mask in (None, torch.zeros(b, s, device=DEVICE)):
            for training in (True, False):
                model.train(training)
                model.zero_grad()
                states = call(model, b, s, mask)
                assert states.shape == (b, s, WIDTH)
                states.sum().backward()
                reached = dict((model.encoder if "encoder" in name else model).named_parameters())
                for key, p in reached.items():  # zeros, not None: DistributedDataParallel waits for every one
                    assert (p.grad is not None and not p.grad.any()) or (name, s) == ("fnet", 0), key


def test_a_decoder_of_an_empty_text():
    """The encoder gives no keys: cross-attention adds zeros, as for a text of padding alone."""
    model = MODELS["t5 decoder"][0]().to(DEVICE).eval()
    empty, padding = (
        model(
            encoder_token_ids=ids(2, length),
            encoder_padding_mask=torch.zeros(2, length, device=DEVICE),
            decoder_token_ids=ids(2, 3),
            decoder_padding_mask=None,
        )["decoder_sequence_output"]
        for length in (0, 5)
    )
    torch.testing.assert_close(empty, padding)


def test_no_texts():
    for name in ("gpt2", "albert", "fnet", "t5 encoder"):
        model = MODELS[name][0]().to(DEVICE)
        assert pyfused.encode(model, []) == []
        assert pyfused.encode(model, [], pool="mean").shape == (0, WIDTH)
    for name in ("gpt2", "t5 decoder"):
        generator = pyfused.Generator(MODELS[name][0]().to(DEVICE))
        for options in ({}, {"num_beams": 3}, {"temperature": 1.0, "seed": 3}):
            assert generator.generate([], 5, **options) == []
