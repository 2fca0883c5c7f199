"""What tests of the transformers integration share."""

import copy

import pytest
from fused_pairs import vary
from torch import nn

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


@pytest.fixture
def fuse_tomorrows(monkeypatch):
    """A function that fuses a module as if its class, and those of its parts, were transformers'. Returns the report."""
    import transformers as hf

    def fuse(module, *parts):
        for kind in (type(module), *parts):
            monkeypatch.setattr(kind.forward, "__module__", "transformers.models.tomorrow.modeling_tomorrow")
        pooler = hf.models.bert.modeling_bert.BertPooler(hf.BertConfig(hidden_size=8))
        return pyfused.fuse_(nn.Sequential(module, pooler))  # with the pooler the library is in use

    return fuse


@pytest.fixture
def pair(fuse_tomorrows):
    """A function of such a class: two modules, plain and fused, and the report."""

    def make(kind, *parts):
        plain = vary(kind())
        fused = copy.deepcopy(plain)
        return plain, fused, fuse_tomorrows(fused, *parts)

    return make


@pytest.fixture
def steps(monkeypatch):
    """A list that grows with each call of decode that a model makes."""
    from pyfused.integrations.transformers import decode

    found, run = [], decode.run
    monkeypatch.setattr(decode, "run", lambda *args: found.append(args[1]) or run(*args))
    return found
