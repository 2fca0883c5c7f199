"""How far may int8 weights move what a model predicts? The presets' losses by 1%, and the logits of a wide model hardly."""

import math

import int8_accuracy
import pytest


@pytest.mark.parametrize("preset", int8_accuracy.PRESETS)
def test_presets(preset):
    """The perplexity (for a fitted head, its loss) stays within 1% of float32's, and accuracy within one point."""
    found = int8_accuracy.compare(preset)
    before, after = found["loss"], found["int8 loss"]
    if preset in int8_accuracy.LANGUAGE_MODELS:
        before, after = math.exp(before), math.exp(after)
    assert after == pytest.approx(before, rel=0.01)
    assert found["int8 right"] == pytest.approx(found["right"], abs=0.01)
    assert found["right"] > 0.2, "the model predicts nothing, so the comparison says nothing"
    assert found["int8 bytes"] < 0.29 * found["bytes"]


def test_logits_at_real_width():
    assert int8_accuracy.cosine_at_width() >= 0.999
