"""What tests of the transformers integration share."""

import pytest

import pyfused


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of every pyfused.attention that a model makes."""
    from pyfused.integrations.transformers import attention as attention_interface

    made = []

    def recorded(*args, **kwargs):
        made.append(kwargs)
        return pyfused.attention(*args, **kwargs)

    monkeypatch.setattr(attention_interface, "attention", recorded)
    return made


@pytest.fixture(autouse=True)
def few_scores_too(monkeypatch):
    """Attention by hand runs on the kernel in tiny models too."""
    from pyfused.integrations.transformers import by_hand

    monkeypatch.setattr(by_hand, "WORTH_THE_KERNEL", 0)
