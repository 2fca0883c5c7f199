"""Does a module's copy use its own parameters? nn.DataParallel's replicas, copy.copy, copies made by hand, torch.func."""

import copy
import pickle
import sys

import pytest
import torch
from compiled_cases import FAMILIES, backbone, inputs, results
from torch import nn
from torch.nn.parallel import replicate
from torch.nn.utils import parametrize

import pyfused
from pyfused.own_forward import is_fused

transformers = pytest.importorskip("transformers")

IDS = {"vocab_size": 31, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "hidden_dropout_prob": 0.0}
OPTIONS = {
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "Albert": {**WIDTHS, "embedding_size": 8, "num_attention_heads": 2, "attention_probs_dropout_prob": 0.0},
    "T5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0},
    "FNet": WIDTHS,
}
KINDS = (*OPTIONS, "TransformerEncoder")


def plain_model(kind):
    torch.manual_seed(5)
    if kind == "TransformerEncoder":
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16))
    else:
        config = getattr(transformers, f"{kind}Config")(**IDS, **OPTIONS[kind])
        model = getattr(transformers, f"{kind}Model")(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1 if p.dim() == 1 else 0.2)
    return model


def fused_model(kind):
    model = plain_model(kind)
    assert pyfused.fuse_(model).replaced
    return model


def call(model):
    """The output at the real tokens of one batch."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    if isinstance(model, nn.TransformerEncoder):
        return model(torch.randn(2, 7, 16, generator=generator), src_key_padding_mask=mask == 0)[mask.bool()]
    ids = torch.randint(1, 31, (2, 7), generator=generator)
    kind = model.config.model_type
    given = {} if kind == "fnet" else {"attention_mask": mask}
    if kind == "t5":
        return model(ids, **given, decoder_input_ids=ids.flip(0))[0].flatten(0, 1)
    return model(ids, **given)[0][mask.bool()]


def outputs_and_gradients(models, parameters, call):
    """The modules' outputs, and the gradients of all outputs together."""
    outs = [call(model) for model in models]
    loss = sum((out * torch.linspace(-1.0, 1.0, out.shape[-1])).sum() for out in outs)
    return [*outs, *torch.autograd.grad(loss, parameters, allow_unused=True)]


def assert_same(found, expected):
    assert [t is None for t in found] == [t is None for t in expected]
    for a, e in zip(found, expected, strict=True):
        if e is not None:
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def fused_names(model):
    return [name for name, module in model.named_modules() if is_fused(module)]


@pytest.fixture
def replicated(monkeypatch):
    """torch's own replicate() with a broadcast on the CPU. Replica j has 1 + j / 4 times the parameters."""
    code = sys.modules["torch.nn.parallel.replicate"]

    def broadcast(tensors, devices, detach=False):
        return [[t * (1 + j / 4) if t.is_floating_point() else t.clone() for t in tensors] for j in devices]

    monkeypatch.setattr(code, "_broadcast_coalesced_reshape", broadcast)
    monkeypatch.setattr(code, "_get_device_index", lambda device, *_: device)
    return lambda model: replicate(model, [0, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_of_a_fused_model(kind, replicated):
    plain, fused = plain_model(kind), fused_model(kind)
    replicas = replicated(fused)
    found = outputs_and_gradients([*replicas, fused], list(fused.parameters()), call)
    assert_same(found, outputs_and_gradients([*replicated(plain), plain], list(plain.parameters()), call))
    assert fused_names(replicas[1]) == fused_names(fused)
    pyfused.unfuse_(replicas[1])
    assert not fused_names(replicas[1])
    assert fused_names(replicas[0]) == fused_names(fused)


@pytest.mark.parametrize("family", FAMILIES)
def test_replicas_of_a_backbone(family, replicated):
    model, scaled, given = backbone(family), backbone(family), inputs(family, 2, 7)
    with torch.no_grad():
        for p in scaled.parameters():
            p.mul_(1.25)

    def call(model):
        return torch.cat([t.flatten() for t in results(model(given))])

    found = outputs_and_gradients(replicated(model), list(model.parameters()), call)
    pairs = zip(model.parameters(), scaled.parameters())
    expected = outputs_and_gradients([model, scaled], [p for pair in pairs for p in pair], call)
    own, of_scaled = expected[2::2], expected[3::2]
    grads = [None if a is None else a + 1.25 * b for a, b in zip(own, of_scaled)]
    assert_same(found, [*expected[:2], *grads])


def by_hand(attributes_of):
    def copied(module):
        new = type(module).__new__(type(module))
        new.__dict__.update(attributes_of(module.__dict__))
        return new

    return copied


def assigned(module):
    new = type(module).__new__(type(module))
    new.__dict__ = module.__dict__.copy()
    return new


COPIES = {
    "copy.copy": copy.copy,
    "update": by_hand(lambda attributes: attributes),
    "items": by_hand(lambda attributes: dict(attributes.items())),
    "assigned": assigned,
    "unpacked": by_hand(lambda attributes: {**attributes}),
    "or": by_hand(lambda attributes: {} | attributes),
    "copy.copy of the attributes": by_hand(copy.copy),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_that_share_until_something_is_replaced(kind, how):
    """Each fused module is copied into its own tree and gets new parameters; the originals keep theirs."""

    def other(model):
        copies = {module: COPIES[how](module) for module in model.modules()}
        for module, copied in copies.items():
            copied._modules = {name: copies.get(child) for name, child in module._modules.items()}
            copied._parameters = {n: None if p is None else nn.Parameter(p * 1.25) for n, p in module._parameters.items()}
        return copies[model]

    plain, fused = plain_model(kind), fused_model(kind)
    with torch.no_grad():
        expected, found = call(other(plain)), call(other(fused))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(call(fused), call(plain), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, call(fused), rtol=1e-2, atol=1e-2)


def test_a_copied_block_with_another_child():
    """Replaces a child on the copy and on the original, as people do who edit models."""
    blocks = []
    for model in (plain_model("GPT2"), fused_model("GPT2")):
        block = model.h[0]
        edited = copy.copy(block)
        edited._modules = dict(block._modules)
        edited.mlp = copy.deepcopy(block.mlp)
        with torch.no_grad():
            edited.mlp.c_fc.weight.mul_(2.0)
        block.ln_2 = nn.LayerNorm(16)
        blocks += [edited, block]
    x = torch.randn(2, 5, 16)
    for plain, fused in zip(blocks[:2], blocks[2:]):
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(blocks[2](x), blocks[3](x), atol=1e-3)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_what_rebinds_stays_fused():
    """Deep copies and pickles stay fused, also of copies and parametrized modules; users' own attributes come along."""
    norm, x = nn.LayerNorm(6), torch.randn(3, 6)
    pyfused.fuse_(norm)
    norm.mine = {"kept": [norm]}
    for clone in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), copy.deepcopy(copy.deepcopy(norm))):
        assert is_fused(clone)
        assert clone.mine["kept"][0] is clone
        assert vars(clone)["forward"].args[0] is clone
        with torch.no_grad():
            clone.weight.fill_(3.0)
        torch.testing.assert_close(clone(x), 3 * norm(x))
    parametrize.register_parametrization(norm, "weight", Doubled())
    clone = copy.deepcopy(norm)
    with torch.no_grad():
        clone.parametrizations.weight.original.fill_(3.0)
    torch.testing.assert_close(clone(x), 3 * norm(x))
    assert vars(clone)["forward"].args[0] is clone
    pyfused.unfuse_(norm)
    assert type(vars(norm)) is dict
    assert "forward" not in vars(norm)


@pytest.mark.parametrize("kind", KINDS)
def test_functional_tools(kind):
    """functional_call, an averaged model, and loaded weights that replace a model's own."""
    plain, fused = plain_model(kind), fused_model(kind)
    state = {name: t * 1.25 if t.is_floating_point() else t for name, t in plain.state_dict().items()}
    changed = copy.deepcopy(plain)
    changed.load_state_dict(state)
    with torch.no_grad():
        expected = call(changed)
        within = nn.ModuleDict({"model": fused})
        within.forward = lambda: call(fused)
        found = torch.func.functional_call(within, {f"model.{name}": t for name, t in state.items()}, (), tie_weights=False)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        average = torch.optim.swa_utils.AveragedModel(fused)
        average.update_parameters(changed)
        torch.testing.assert_close(call(average.module), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(call(fused), call(plain), rtol=1e-4, atol=1e-4)
        fused.load_state_dict(state, assign=True)
        torch.testing.assert_close(call(fused), expected, rtol=1e-4, atol=1e-4)


def test_an_ensemble():
    """stack_module_state and vmap: one fused module stands for several."""
    norms = [nn.LayerNorm(6), nn.LayerNorm(6)]
    x = torch.randn(3, 6)
    for i, norm in enumerate(norms):
        nn.init.constant_(norm.weight, i + 2.0)
    expected = torch.stack([norm(x) for norm in norms])
    for norm in norms:
        pyfused.fuse_(norm)
    parameters, buffers = torch.func.stack_module_state(norms)
    base = copy.deepcopy(norms[0]).to("meta")

    def one(parameters, buffers):
        return torch.func.functional_call(base, (parameters, buffers), (x,))

    torch.testing.assert_close(torch.vmap(one)(parameters, buffers), expected)
