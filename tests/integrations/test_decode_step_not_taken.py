"""Do a fused model's steps run its modules where `decode` may not take them, and notice every change of the model?"""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from decode_step_cases import MAKE, pair, prompt
from hf_cases import livened, tokens
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache

import pyfused
from pyfused.own_forward import kept


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(3)


# ---- where the modules must run -------------------------------------------------------------------------------------------


def stepped(model, ids=None, filled=None, **options):
    """One step after a prompt."""
    ids = tokens(2, 6) if ids is None else ids
    with torch.no_grad():
        cache = prompt(model, ids[:, :5], filled).past_key_values
    call = {"use_cache": True, "past_key_values": cache} | options
    if "inputs_embeds" not in call:
        call["input_ids"] = ids[:, 5:]
    return model(**call)


def check_stepped(plain, fused, ids, atol=1e-4):
    torch.testing.assert_close(stepped(fused, ids).logits, stepped(plain, ids).logits, rtol=1e-4, atol=atol)


def hook(model):
    model.transformer.h[1].mlp.dropout.register_forward_hook(lambda *_: None)


def pre_hook(model):
    model.transformer.h[0].ln_1.register_forward_pre_hook(lambda *_: None)


def new_forward(model):
    model.transformer.h[1].attn.c_attn.forward = lambda x: x.repeat(1, 1, 3)


class LoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x) + 1.0


def lora(model):
    model.transformer.h[1].mlp.c_fc = LoRA(model.transformer.h[1].mlp.c_fc)


def subclass(model):
    model.transformer.h[0].attn.c_proj.__class__ = type("Other", (type(model.transformer.h[0].attn.c_proj),), {})


def parametrized(model):
    parametrize.register_parametrization(model.transformer.h[1].mlp.c_proj, "weight", nn.Tanh())


def pruned(model):
    prune.l1_unstructured(model.transformer.h[1].mlp.c_proj, "weight", 0.5)


def sparse(model):
    layer = model.transformer.h[1].mlp.c_proj
    layer.weight = nn.Parameter(layer.weight.to_sparse_csr(), requires_grad=False)


def training(model):
    model.transformer.h[0].attn.attn_dropout.train()


def partly_unfused(model):
    pyfused.unfuse_(model.transformer.h[1].ln_2)


def other_attention(model):
    pyfused.unfuse_(model.transformer.h[1].attn)


def asked_by_config(model):
    model.config.output_hidden_states = True


CHANGES = (
    hook, pre_hook, new_forward, lora, subclass, parametrized, pruned, sparse, training, partly_unfused,
    other_attention, asked_by_config,
)  # fmt: skip
COMPUTING = (new_forward, lora, parametrized, pruned, subclass)  # something else than their class, or elsewhere


@torch.no_grad()
@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_runs_its_modules(steps, change, steps_before):
    plain, fused = pair()
    ids = tokens(2, 7)
    cache = prompt(fused, ids[:, : 6 - steps_before]).past_key_values
    if steps_before:
        prompt(fused, ids[:, 5:6], cache)
    assert len(steps) == steps_before
    change(fused)
    found = prompt(fused, ids[:, 6:], cache).logits
    assert len(steps) == steps_before
    if change not in COMPUTING:
        torch.testing.assert_close(found, prompt(plain, ids).logits[:, -1:], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"output_hidden_states": True},
        {"token_type_ids": torch.tensor([[1], [2]])},
        {"use_cache": False},
        {"return_dict": False},
        {"attention_mask": torch.ones(2, 5, dtype=torch.long)},  # shorter than the keys
        {"attention_mask": torch.zeros(2, 1, 1, 6)},  # float
        {"attention_mask": torch.ones(2, 4, 1, 6, dtype=torch.bool)},  # a mask for each head
        {"inputs_embeds": torch.randn(2, 1, 32)},
        {"is_causal": True},
    ],
)
def test_such_a_call_runs_the_modules(steps, options):
    plain, fused = pair()
    ids = tokens(2, 6)
    with torch.no_grad():
        try:
            expected = stepped(plain.transformer, ids, **options)
        except (ValueError, RuntimeError, IndexError) as error:
            with pytest.raises(type(error)):
                stepped(fused.transformer, ids, **options)
        else:
            torch.testing.assert_close(stepped(fused.transformer, ids, **options)[0], expected[0], rtol=1e-4, atol=1e-4)
    assert not steps


def test_gradients_run_the_modules(steps):
    _, fused = pair()
    stepped(fused).logits.sum().backward()
    assert not steps
    fused.requires_grad_(False)
    assert not stepped(fused).logits.requires_grad
    assert len(steps) == 1


@torch.no_grad()
def test_who_watches_sees_the_modules(steps):
    _, fused = pair()
    expected = stepped(fused, ids := tokens(2, 6)).logits
    assert len(steps) == 1
    with torch.autocast("cpu", torch.bfloat16):
        stepped(fused, ids)
    with torch.profiler.profile():
        stepped(fused, ids)
    with _Mode():
        stepped(fused, ids)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    stepped(fused, ids)
    handle.remove()
    assert len(steps) == 1
    torch.testing.assert_close(stepped(fused, ids).logits, expected)
    assert len(steps) == 2


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_many_rows_run_the_modules(steps):
    plain, fused = pair()
    check_stepped(plain, fused, tokens(9, 6))
    assert not steps


@torch.no_grad()
def test_other_caches_run_the_modules(steps):
    plain, fused = pair()

    class Mine(DynamicCache):
        pass

    ids = tokens(2, 6)
    for make in (Mine, lambda: DynamicCache(config=fused.config), DynamicCache):
        found = stepped(fused, ids, make()).logits
        torch.testing.assert_close(found, stepped(plain, ids, make()).logits, rtol=1e-4, atol=1e-4)
    assert len(steps) == 2
    offloaded = DynamicCache(config=fused.config)
    prompt(fused, ids[:, :5], offloaded)
    offloaded.layers[0].keys = offloaded.layers[0].keys[:, :, :-1]  # one layer is shorter
    with pytest.raises(Exception):  # noqa: B017
        prompt(fused, ids[:, 5:], offloaded)
    assert len(steps) == 2


@torch.no_grad()
@pytest.mark.parametrize("ids", [[[50]], [[-1]]])
def test_ids_out_of_range_raise_as_before(steps, ids):
    _, fused = pair()
    cache = prompt(fused, tokens(1, 5)).past_key_values
    with pytest.raises(IndexError):
        prompt(fused, torch.tensor(ids), cache)
    assert cache.get_seq_length() == 5
    full = prompt(fused, tokens(1, 64)).past_key_values
    with pytest.raises(IndexError):
        prompt(fused, torch.tensor([[3]]), full)
    assert not steps


# ---- other weights --------------------------------------------------------------------------------------------------------


def loaded(model, other):
    model.load_state_dict(other.state_dict())


def assigned(model, other):
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)


def data(model, other):
    for p, q in zip(model.parameters(), other.parameters()):
        p.data = q.data.clone()


def one_module(model, other):
    loaded(model, other)
    model.transformer.h[1].mlp.c_fc = copy.deepcopy(other.transformer.h[1].mlp.c_fc)


def one_block_less(model, other):
    loaded(model, other)
    for m in (model, other):
        del m.transformer.h[1]
        m.config.n_layer = 1


def epsilon(model, other):
    loaded(model, other)
    for m in (model, other):
        m.transformer.h[0].ln_2.eps = 0.5


def transposed(model, other):
    """The same address, other strides."""
    loaded(model, other)
    for m in (model, other):
        p = m.transformer.h[0].attn.c_proj.weight
        p.data = p.data.t()


def narrow(mlp):
    mlp.c_fc.weight.data, mlp.c_fc.bias.data = mlp.c_fc.weight.data[:, :64], mlp.c_fc.bias.data[:64]
    mlp.c_proj.weight.data, mlp.c_fc.nf = mlp.c_proj.weight.data[:64], 64


def narrowed(model, other):
    """The same address, fewer elements."""
    loaded(model, other)
    for mlp in (layer.mlp for m in (model, other) for layer in m.transformer.h):
        narrow(mlp)


@torch.no_grad()
def test_layers_of_different_widths_run_the_modules(steps):
    plain, fused = pair()
    for m in (plain, fused):
        narrow(m.transformer.h[0].mlp)
    check_stepped(plain, fused, tokens(2, 6), 2e-4)
    assert not steps


@torch.no_grad()
@pytest.mark.parametrize("change", [loaded, assigned, data, one_module, one_block_less, epsilon, transposed, narrowed])
def test_new_weights_are_noticed(steps, change):
    _, fused = pair()
    other = livened(MAKE["gpt2"]())
    ids = tokens(2, 7)
    held = prompt(fused, ids[:, :5]).past_key_values
    prompt(fused, ids[:, 5:6], held)  # a plan is kept while this cache lives
    change(fused, other)
    cache = prompt(fused, ids[:, :5]).past_key_values
    found, expected = prompt(fused, ids[:, 5:6], cache).logits, prompt(other, ids[:, :6]).logits[:, -1:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
    assert len(steps) == 2


@torch.no_grad()
def test_nothing_is_left_behind():
    _, fused = pair()
    names = set(vars(fused.transformer))
    cache = prompt(fused, tokens(1, 5)).past_key_values
    prompt(fused, tokens(1, 1), cache)
    assert len(kept(fused.transformer)) == 1
    assert set(vars(fused.transformer)) == names
    torch.save(fused, io.BytesIO())
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert len(kept(other.transformer)) == 0
    plan = weakref.ref(next(iter(kept(fused.transformer).values()))[0].plan)
    del cache
    gc.collect()
    assert plan() is None  # a plan lives no longer than the caches: it holds the weights' memory
    pyfused.unfuse_(fused)
    assert kept(fused.transformer) is None


def test_the_report_says_it():
    notes = {e.kind: e.note for e in pyfused.fuse_(MAKE["gpt2"]()).replaced}
    assert notes["GPT2Model"] == "pyfused.decode for steps of one token"
    notes = {e.name: e.note for e in pyfused.fuse_(MAKE["t5"]()).replaced}
    assert "pyfused.decode" in notes["decoder"]
    assert "pyfused.decode" not in notes["encoder"]


# ---- found by a reader ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_decoder_without_its_encoder(steps):
    plain, fused = pair("t5")
    ids = tokens(2, 6)
    found = []
    for model in (plain.decoder, fused.decoder):
        cache = DynamicCache()
        model(input_ids=ids[:, :5], past_key_values=cache, use_cache=True)
        found.append(model(input_ids=ids[:, 5:], past_key_values=cache, use_cache=True).last_hidden_state)
    torch.testing.assert_close(found[1], found[0])
    assert not steps


@pytest.mark.parametrize("table", ["wte", "wpe"])
@torch.no_grad()
def test_tables_with_other_strides(table, steps):
    _, fused = pair()
    ids = tokens(2, 6)
    expected = stepped(fused, ids).logits
    weight = getattr(fused.transformer, table).weight
    weight.data = weight.data.t().contiguous().t()
    torch.testing.assert_close(stepped(fused, ids).logits, expected)


@torch.no_grad()
def test_a_norm_s_vector_with_other_strides(steps):
    _, fused = pair()
    ids = tokens(2, 6)
    expected = stepped(fused, ids).logits
    assert len(steps) == 1
    weight = fused.transformer.h[0].ln_1.weight
    weight.data = torch.stack((weight.data, weight.data), 1)[:, 0]
    torch.testing.assert_close(stepped(fused, ids).logits, expected)
    assert len(steps) == 1


@torch.no_grad()
def test_an_epsilon_of_zero(steps):
    plain, fused = pair()
    for model in (plain, fused):
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 0.0
    check_stepped(plain, fused, tokens(2, 6), 1e-5)
    assert steps


@torch.no_grad()
def test_a_class_that_is_patched_later(steps, monkeypatch):
    _, fused = pair()
    ids, kind = tokens(2, 6), type(fused.transformer.h[0].attn.c_attn)
    before, forward = stepped(fused, ids).logits, kind.forward
    cache = prompt(fused, ids[:, :5]).past_key_values
    fused(ids[:, 5:], past_key_values=copy.deepcopy(cache), use_cache=True)
    taken = len(steps)
    assert taken
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x) * 0.5)
    after = fused(ids[:, 5:], past_key_values=cache, use_cache=True).logits
    assert len(steps) == taken
    assert not torch.allclose(after, before)
