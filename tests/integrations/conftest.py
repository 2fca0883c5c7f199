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
