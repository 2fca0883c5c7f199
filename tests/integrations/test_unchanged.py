"""Does the check before a fused step notice every change, in C++ and in Python, and cost little however large the model is?"""

import copy
import gc
import sys

import pytest
import torch
import transformers as hf
from hf_cases import GPT2
from torch import nn

import pyfused
from pyfused import extensions
from pyfused.integrations.transformers import gpt2, unchanged
from pyfused.integrations.transformers.unchanged import Watch


def fused(layers=2):
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**{**GPT2, "n_layer": layers})).eval()
    pyfused.fuse_(model)
    return model.transformer


@pytest.fixture(scope="module")
def model():
    return fused()


@pytest.fixture(params=["c++", "python"])
def form(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(unchanged, "_NATIVE", unchanged._IN_PYTHON)
    elif extensions.same() is None:
        pytest.skip("no extension, or a torch whose tensors C++ cannot read")
    return request.param


def watched(model):
    found = Watch.of(model, gpt2._KINDS)
    assert found is not None
    assert found.holds()
    return found


def swapped(owner, one, other):
    first, second = getattr(owner, one), getattr(owner, other)
    delattr(owner, one)
    delattr(owner, other)
    setattr(owner, one, second)
    setattr(owner, other, first)


def viewed(change):
    def run(m):
        weight = m.h[1].attn.c_proj.weight
        weight.data = change(weight.data)

    return run


CHANGES = {
    "hook": lambda m: m.h[1].mlp.dropout.register_forward_hook(lambda *_: None),
    "pre-hook": lambda m: m.h[0].ln_1.register_forward_pre_hook(lambda *_: None),
    "forward": lambda m: setattr(m.h[1].attn.c_attn, "forward", lambda x: x),
    "forward taken back": lambda m: pyfused.unfuse_(m.h[1].ln_2),
    "training": lambda m: m.h[0].attn.attn_dropout.train(),
    "the root in training": lambda m: setattr(m, "training", True),
    "class": lambda m: setattr(m.h[0].mlp.c_fc, "__class__", type("Other", (type(m.h[0].mlp.c_fc),), {})),
    "setting": lambda m: setattr(m.h[0].ln_2, "eps", 0.5),
    "setting deleted": lambda m: delattr(m.h[0].ln_2, "eps"),
    "another module": lambda m: setattr(m.h[1], "mlp", copy.deepcopy(m.h[1].mlp)),
    "one module more": lambda m: m.h[1].mlp.add_module("adapter", nn.Identity()),
    "one module less": lambda m: delattr(m.h[1].attn, "resid_dropout"),
    "modules swapped": lambda m: swapped(m.h[1], "ln_1", "ln_2"),
    "no modules": lambda m: setattr(m.h[1].mlp, "_modules", None),
    "another parameter": lambda m: setattr(m.h[1].ln_1, "weight", nn.Parameter(torch.ones(32))),
    "a parameter of the root": lambda m: m.register_parameter("prefix", nn.Parameter(torch.ones(3))),
    "no bias": lambda m: setattr(m.h[1].ln_1, "bias", None),
    "a plain tensor": lambda m: m.h[1].ln_1._parameters.update(weight=torch.ones(32)),
    "memory": viewed(torch.clone),
    "strides": viewed(torch.t),
    "size": viewed(lambda data: data[:, :16]),
    "dtype": viewed(
        lambda data: data.view(torch.float16).as_strided((32, 32), (32, 1))
    ),  # the same address and strides
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_noticed(model, form, name):
    changed = copy.deepcopy(model)
    watch = watched(changed)
    CHANGES[name](changed)
    assert not watch.holds()


def test_what_changes_nothing_is_none(model, form):
    """New values in the same memory, and a change that was taken back."""
    changed = copy.deepcopy(model)
    watch = watched(changed)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(2.0)
    assert watch.holds()
    changed.train()
    assert not watch.holds()
    changed.eval()
    changed.h[0].mlp.register_forward_hook(lambda *_: None).remove()
    assert watch.holds()


def test_both_forms_see_the_same_memory():
    tensors = (torch.ones(3), torch.ones(2, 3, dtype=torch.float64), torch.ones(()), torch.ones(2, 0, dtype=torch.int8))
    forms = [unchanged._IN_PYTHON[1:], *([] if extensions.same() is None else [extensions.same()[1:]])]
    for memory, same in forms:
        known = memory(tensors)
        assert known == memory(tensors)
        assert same(tensors, known)
        assert not same(tensors[:3], known)
        for i, tensor in enumerate(tensors):
            others = (*tensors[:i], tensor.clone(), *tensors[i + 1 :])
            assert (memory(others) == known) == same(others, known) == (not tensor.numel())
    if len(forms) > 1:
        memory, same = forms[1]
        assert memory((torch.empty(2, device="meta"),)) is None
        assert not same((torch.empty(2, device="meta"),), memory(tensors[:1]))
        with pytest.raises(TypeError, match="a tuple of tensors"):
            memory([])


@pytest.mark.skipif(extensions.same() is None, reason="Python asks each module")
def test_the_check_is_a_few_calls_however_many_layers():
    def events(layers):
        watch, count = watched(fused(layers)), 0
        watch.holds()  # the first call may fill caches of Python's or torch's

        def heard(frame, event, argument):
            nonlocal count
            count += 1

        gc.disable()  # a collection would call finalizers of other tests' objects
        sys.setprofile(heard)
        watch.holds()
        sys.setprofile(None)
        gc.enable()
        return count

    assert events(1) == events(4) < 80
