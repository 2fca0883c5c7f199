"""How far may integer weights move what a model predicts? The presets' losses by 1% in int8, a little more in int4, and the
logits of a wide model hardly."""

import math

import integer_accuracy
import pytest

# The most that the perplexity may grow (for a fitted head, its loss), and that accuracy may change, in shares of one.
MOST = {"int8": (0.01, 0.01), "int4": (0.05, 0.02)}
SIZES = {"int8": 0.29, "int4": 0.22}


@pytest.mark.parametrize("scheme", MOST)
@pytest.mark.parametrize("preset", integer_accuracy.PRESETS)
def test_presets(preset, scheme):
    found = integer_accuracy.compare(preset, scheme)
    before, after = found["loss"], found["rounded loss"]
    if preset in integer_accuracy.LANGUAGE_MODELS:
        before, after = math.exp(before), math.exp(after)
    of_loss, of_accuracy = MOST[scheme]
    assert after == pytest.approx(before, rel=of_loss)
    assert found["rounded right"] == pytest.approx(found["right"], abs=of_accuracy)
    assert found["right"] > 0.2, "the model predicts nothing, so the comparison says nothing"
    assert found["rounded bytes"] < SIZES[scheme] * found["bytes"]


@pytest.mark.parametrize("scheme, least", [("int8", 0.999), ("int4", 0.96)])
def test_logits_at_real_width(scheme, least):
    """Random weights are int4's worst case: no training has made the model insensitive to their errors, and nothing cancels."""
    assert integer_accuracy.cosine_at_width(scheme) >= least
