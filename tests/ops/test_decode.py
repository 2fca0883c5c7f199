"""Is decode right on every backend that has it? A step of a whole decoder against the model's modules, in float64."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from draws import check

import pyfused
from pyfused import GPT2Backbone, T5Backbone, dispatch
from pyfused.decode_plan import DecodePlan, Matrix
from pyfused.generation import plan_of
from pyfused.generation.sampling import Sampler
from pyfused.kernels.cpu.decode import with_room
from pyfused.models.call import Call
from pyfused.nn import KVCache, Visibility
from pyfused.testing import available, running

BACKENDS = [
    name
    for name in available("cuda" if torch.cuda.is_available() else "cpu")
    if dispatch.kernel(name.partition(":")[0], "decode") is not None
]
CAPACITY = 41


@pytest.fixture(params=BACKENDS)
def each_backend(request):
    with running(request.param):
        yield request.param


def gpt2(**options):
    sizes = {
        "vocabulary_size": 131, "num_layers": 2, "num_heads": 3, "hidden_dim": 51, "intermediate_dim": 77,
        "max_sequence_length": 50,
    }  # fmt: skip
    return GPT2Backbone(**sizes | options)


def t5(**options):
    sizes = {
        "vocabulary_size": 113, "num_layers": 2, "num_heads": 3, "hidden_dim": 40, "intermediate_dim": 70,
        "key_value_dim": 12, "num_buckets": 8, "max_distance": 20,
    }  # fmt: skip
    return T5Backbone(**sizes | options)


MODELS = {
    "gpt2": gpt2,
    "gpt2 relu, own head": lambda: gpt2(
        activation="relu", tie_embedding_weights=False, scale_attention_by_inverse_layer_index=True
    ),
    "gpt2 gelu, one wide head": lambda: gpt2(activation="gelu", num_heads=1, hidden_dim=136, intermediate_dim=500),
    "gpt2 silu": lambda: gpt2(activation="silu", num_heads=8, hidden_dim=64),
    "t5 gated": lambda: t5(activation="gelu_new"),
    "t5 plain": lambda: t5(activation="relu", use_gated_activation=False, tie_embedding_weights=False),
    "t5 tanh": lambda: t5(activation="tanh", num_heads=5, key_value_dim=8, num_buckets=32, max_distance=128),
}  # fmt: skip


@torch.no_grad()
def sharpened(model):
    """Biases and norms that are not trivial, and logits of size 1."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.3)
        elif not name.startswith("token_embedding"):
            parameter.mul_(3.0 if isinstance(model, GPT2Backbone) else 1.0)
    return model.eval()


def filled_cache(model, rows, length, dtype, sources=0, source_length=9):
    cache = model.new_cache(rows, CAPACITY)
    for buffer in cache._buffers:
        buffer[:, :, :, :length] = torch.randn_like(buffer[:, :, :, :length])
    cache.length = length
    if sources:
        heads, size = cache.signature[1:3]
        made = torch.randn(2, len(cache.cross), sources, heads, source_length, size, device=model.device).to(dtype)
        cache.cross = list(zip(*made))
    return cache


def converted(cache, dtype):
    found = copy.deepcopy(cache)
    found._set([b.to(dtype) for b in found._buffers])
    found.cross = [None if kv is None else tuple(t.to(dtype) for t in kv) for kv in found.cross]
    return found


@torch.no_grad()
def by_modules(model, tokens, cache, mask=None, position_ids=None):
    """The same step through the model's modules; mask (B, Sk) or None."""
    places = cache.positions
    if places is None:
        places = torch.full_like(tokens, cache.length)
    seen = torch.arange(cache.extent, device=tokens.device) <= places[:, None]
    seen = seen if mask is None else seen & mask
    if isinstance(model, GPT2Backbone):
        positions = places if position_ids is None else position_ids
        call = Call(tokens[:, None], positions[:, None], visible=Visibility(padding_mask=seen), cache=cache)
        return model.logits(model.run(call)[:, 0])
    table = model.decoder.layers[0].attention.position_bias()
    options = {"bidirectional": False, "max_distance": table.max_distance}
    bias = [pyfused.relative_bias(table.table, 1, cache.extent, query_offset=int(p), **options) for p in places]
    call = Call(
        tokens[:, None], visible=Visibility(padding_mask=seen, attn_bias=torch.cat(bias)), cache=cache,
        memory_mask=cache.encoder_mask,
    )  # fmt: skip
    return model.logits(model.decoder(model.token_embedding(call.token_ids), call)[:, 0])


def states(cache, logits, places):
    """Everything that a step writes: logits, then each layer's new key and value."""
    rows = torch.arange(len(places), device=places.device)
    written = [t[rows, :, places] for t in cache.tensors]
    return {"logits": logits, **{f"cache tensor {i}": t for i, t in enumerate(written)}}


def compare(model, dtype, rows, length, *, uneven=False, mask=None, sources=0, position_ids=None, encoder_mask=None):
    """One check() round: the step on the chosen backend, plain PyTorch's and the truth. model is float64 at first."""
    half, device = copy.deepcopy(model).to(dtype), model.device
    truth_model = copy.deepcopy(half).double()
    cache = filled_cache(half, rows, length, dtype, sources)
    cache.encoder_mask = encoder_mask
    if uneven:
        cache.at_positions(torch.randint(0, length + 1, (rows,), device=device), length + 1)
        cache.positions[-1] = length
    places = cache.positions if uneven else torch.full((rows,), length, device=device)
    tokens = torch.randint(0, model.get_config()["vocabulary_size"], (rows,), device=device)
    wide, plain = converted(cache, torch.float64), converted(cache, dtype)
    with running("reference"):
        truth = states(wide, by_modules(truth_model, tokens, wide, mask, position_ids), places)
        yardstick = states(plain, by_modules(half, tokens, plain, mask, position_ids), places)
    before = places.clone()
    logits = pyfused.decode(plan_of(half), tokens, cache, padding_mask=mask, position_ids=position_ids)
    assert logits.dtype == dtype
    assert cache.extent == length + 2
    found = states(cache, logits, before)
    return {name: (found[name], yardstick[name], truth[name]) for name in truth}


STEPS = [
    (1, 0),
    (1, 1),
    (2, 7),
    (3, 40),
    (5, 23),
    (8, 16),
]  # (rows, tokens in the cache); each model takes half of them


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_modules(each_backend, dtype, device, name):
    model = sharpened(MODELS[name]()).to(device)
    cross = name.startswith("t5")
    for rows, length in STEPS[list(MODELS).index(name) % 2 :: 2]:
        check(lambda rows=rows, length=length: compare(model, dtype, rows, length, sources=rows if cross else 0), 20)


@pytest.mark.parametrize("name", ["gpt2", "t5 gated"])
def test_rows_of_different_lengths(each_backend, dtype, device, name):
    model = sharpened(MODELS[name]()).to(device)
    sources = 4 if name.startswith("t5") else 0
    for length in (3, 40):
        check(lambda length=length: compare(model, dtype, 4, length, uneven=True, sources=sources), 20)


@pytest.mark.parametrize("name", ["gpt2", "t5 gated"])
def test_padding_anywhere(each_backend, dtype, device, name):
    """Left, right and in between; one row sees no key at all."""
    model = sharpened(MODELS[name]()).to(device)
    mask = torch.ones(4, 12, dtype=torch.bool, device=device)
    mask[0, :5], mask[1, 8:11], mask[2, ::2] = False, False, False
    sources = 4 if name.startswith("t5") else 0
    options = {"mask": mask, "sources": sources}
    if not sources:
        options["position_ids"] = mask.sum(1)
    check(lambda: compare(model, dtype, 4, 11, **options), 20)
    mask[3] = False
    check(lambda: compare(model, dtype, 4, 11, **options), 20)


def test_beams_share_their_source(each_backend, dtype, device):
    model = sharpened(MODELS["t5 gated"]()).to(device)
    mask = torch.ones(2, 9, dtype=torch.bool, device=device)
    mask[1, 4:] = False
    for encoder_mask in (None, mask):
        check(lambda m=encoder_mask: compare(model, dtype, 6, 13, sources=2, encoder_mask=m), 20)


def test_a_token_past_every_bucket(each_backend, dtype, device):
    model = sharpened(t5(num_buckets=4, max_distance=7)).to(device)
    check(lambda: compare(model, dtype, 2, 40, sources=2), 20)


# ---- what no model of ours has: plans against the reference in float64 ------------------------------------------------


def plan_in(plan, dtype):
    """The plan's values in another dtype. int8 weights stay; their scales become float64 for the truth alone."""
    tensors, *rest = plan.leaves()

    def convert(t):
        if t is None or t.dtype == torch.int8:
            return t
        if t.dtype == torch.float32 and dtype == torch.float64 and id(t) in scales:
            return t.double()
        return t if id(t) in scales else t.to(dtype)

    scales = {id(m.scale) for m in (*plan.matrices(), plan.token_embedding) if m.scale is not None}
    return DecodePlan.of_leaves([convert(t) for t in tensors], *rest)


def quantised(matrix):
    scale = matrix.weight.float().abs().amax(1).clamp(min=1e-30) / 127
    return Matrix((matrix.weight.float() / scale[:, None]).round().to(torch.int8), matrix.bias, scale)


def by_columns(matrix):
    return matrix._replace(weight=matrix.weight.t().contiguous().t())


def fewer_key_heads(plan):
    """Grouped queries: the first key head alone."""
    d = plan.head_size
    cut = [
        layer._replace(
            **{n: Matrix(*[t[:d] if t is not None else None for t in getattr(layer, n)]) for n in ("key", "value")}
        )
        for layer in plan.layers
    ]
    return replace(plan, layers=tuple(cut), kv_heads=1)


def with_matrices(plan, change):
    layers = [
        layer._replace(
            **{n: change(m) for n, m in layer._asdict().items() if isinstance(m, Matrix) and m.weight is not None}
        )
        for layer in plan.layers
    ]
    return replace(plan, layers=tuple(layers))


def all_int8(plan):
    head = quantised(plan.head)
    return replace(with_matrices(plan, quantised), token_embedding=head, head=head)


def without_head(plan):
    return replace(plan, head=Matrix())


VARIANTS = {
    "no head": without_head,
    "grouped queries": fewer_key_heads,
    "weights by columns": lambda plan: with_matrices(plan, by_columns),
    "int8": all_int8,
    "int8 layers, float head": lambda plan: with_matrices(plan, quantised),
}


VARIED = ["gpt2", "gpt2 gelu, one wide head", "t5 gated", "t5 plain"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", VARIED)
def test_other_plans(each_backend, dtype, device, name, variant):
    model = sharpened(MODELS[name]()).to(device, dtype)
    plan = VARIANTS[variant](plan_of(model))
    sources = 2 if name.startswith("t5") else 0

    def once(rows, length):
        shape = len(plan.layers), rows, plan.kv_heads, CAPACITY, plan.head_size
        cache = KVCache(*shape, dtype=dtype, device=device)
        filled = filled_cache(model, rows, length, dtype, sources)
        cache.cross, cache.length = filled.cross, length
        cache._set([b[:, :, : plan.kv_heads].contiguous() for b in filled._buffers])
        tokens = torch.randint(0, plan.token_embedding.weight.shape[0], (rows,), device=device)
        wide, plain, places = converted(cache, torch.float64), converted(cache, dtype), torch.full_like(tokens, length)
        with running("reference"):
            truth = states(wide, pyfused.decode(plan_in(plan, torch.float64), tokens, wide), places)
            yardstick = states(plain, pyfused.decode(plan, tokens, plain), places)
        found = states(cache, pyfused.decode(plan, tokens, cache), places)
        return {n: (found[n], yardstick[n], truth[n]) for n in truth}

    # In turn: every model and every variant meets each number of rows.
    turn = (VARIED.index(name) + list(VARIANTS).index(variant)) % 3
    check(lambda: once(*[(2, 5), (4, 17), (8, 40)][turn]), 20)


# ---- choices, threads, limits -------------------------------------------------------------------------------------------


def test_the_likeliest_token(each_backend, dtype, device):
    """The first of equals; -1 where the largest logit is not finite."""
    threaded = each_backend.startswith("cpu")
    inner = 2000 if threaded else 200  # so many that the CPU's threads share a product
    model = sharpened(gpt2(num_layers=1, hidden_dim=96, intermediate_dim=inner, vocabulary_size=1003)).to(device, dtype)
    for threads in (1, 2, 3) if threaded else (1,):
        torch.set_num_threads(threads)
        check_choices(plan_of(model), filled_cache(model, 4, 3, dtype), torch.arange(4, device=device))


def check_choices(plan, cache, tokens):
    logits = pyfused.decode(plan, tokens, copy.deepcopy(cache))
    assert torch.equal(pyfused.decode(plan, tokens, copy.deepcopy(cache), choose=True), logits.argmax(-1))
    head = plan.head.weight.clone()
    plan = replace(plan, head=Matrix(head))
    best = int(logits[0].argmax())
    head[(best + 500) % 1003] = head[best]
    chosen = pyfused.decode(plan, tokens, copy.deepcopy(cache), choose=True)
    assert chosen[0] == min(best, (best + 500) % 1003)
    for bad, place in itertools.product((torch.nan, torch.inf), (0, 700, 1002)):
        broken = head.clone()
        broken[place] = bad
        plan = replace(plan, head=Matrix(broken))
        chosen = pyfused.decode(plan, tokens, copy.deepcopy(cache), choose=True)
        logits = pyfused.decode(plan, tokens, copy.deepcopy(cache))
        expected = logits.argmax(-1).masked_fill(~logits.amax(-1).isfinite(), -1)
        assert torch.equal(chosen, expected)


def test_drawn_tokens(each_backend, dtype, device):
    """The generator's sampler is the truth, on the same logits."""
    model = sharpened(gpt2()).to(device, dtype)
    plan, cache, tokens = plan_of(model), filled_cache(model, 4, 3, dtype), torch.arange(4, device=device)
    logits = pyfused.decode(plan, tokens, copy.deepcopy(cache))
    uniform = torch.tensor([0.0, 0.9, 0.3, 0.6], dtype=torch.float64, device=device)
    for options in (
        {},
        {"temperature": 4.0, "top_k": 20},
        {"temperature": 3.0, "top_k": 50, "top_p": 0.7},
        {"top_p": 0.9},
    ):
        chosen = pyfused.decode(plan, tokens, copy.deepcopy(cache), choose=True, uniform=uniform, **options)
        expected = Sampler(**{"temperature": 1.0} | options)(logits, uniform)
        assert torch.equal(chosen, expected)


@pytest.mark.parametrize("name", ["gpt2", "t5 gated"])
def test_threads_agree(device, dtype, name):
    """Bit by bit: no sum is cut differently."""
    big = {"hidden_dim": 192, "intermediate_dim": 1400}
    model = sharpened(gpt2(**big) if name == "gpt2" else t5(**big)).to(device, dtype)
    plan, cache = plan_of(model), filled_cache(model, 3, 30, dtype, 3 if name != "gpt2" else 0)
    tokens, found = torch.tensor([5, 9, 70], device=device), []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        found.append(pyfused.decode(plan, tokens, copy.deepcopy(cache)))
    assert all(torch.equal(found[0], other) for other in found)


def test_many_rows_run_on_the_reference(device):
    model = sharpened(gpt2()).to(device)
    cache, tokens = filled_cache(model, 40, 3, torch.float32), torch.arange(40, device=device)
    expected = by_modules(model, tokens, copy.deepcopy(cache))
    torch.testing.assert_close(pyfused.decode(plan_of(model), tokens, cache), expected)
    text = str(pyfused.explain("decode", plan_of(model), tokens, filled_cache(model, 40, 3, torch.float32)))
    assert "at most 16 rows" in text


@pytest.mark.parametrize("name", ["gpt2", "t5 gated"])
def test_registration(device, dtype, name):
    model = sharpened(MODELS[name]()).to(device, dtype)
    cache = filled_cache(model, 2, 5, dtype, 2 if name != "gpt2" else 0)
    tokens = torch.tensor([3, 99], device=device)
    _, plan, step = pyfused.ops.MODULES["decode"].bind(plan_of(model), tokens, cache, choose=True)
    caches = [t.clone() for t in step.caches]
    torch.library.opcheck(torch.ops.pyfused.decode, (*plan.leaves(), *step._replace(caches=caches)))
    expected = pyfused.decode(plan, tokens, copy.deepcopy(cache))
    logits, chosen = torch.ops.pyfused.decode(*plan.leaves(), *step)
    assert torch.equal(logits, expected)
    assert torch.equal(chosen, expected.argmax(-1))


def test_a_plan_outlives_its_model_s_memory():
    """A module's parameter may get other memory; the plan keeps the old."""
    model = sharpened(gpt2())
    plan, cache, tokens = plan_of(model), filled_cache(model, 1, 4, torch.float32), torch.tensor([7])
    expected = pyfused.decode(plan, tokens, copy.deepcopy(cache))
    model.to(torch.float64)
    del model
    assert torch.equal(pyfused.decode(plan, tokens, copy.deepcopy(cache)), expected)


@pytest.mark.parametrize("size", [64, 40], ids=["past the caches", "through the caches"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_with_room_for_a_token(dtype, size):
    """Of more than 1 MB, in whole vectors past the processor's caches. torch.cat, as transformers does it, copies crops."""
    caches = [torch.randn(2, 3, 703, size).to(dtype) for _ in range(8)]
    for given in (caches, [t[:, :, :-2] for t in caches], [t[:1, :, :1].contiguous() for t in caches]):
        for copy_of, cache in zip(with_room(given), given, strict=True):
            b, heads, length, d = cache.shape
            assert copy_of.shape == (b, heads, length + 1, d)
            assert copy_of.is_contiguous()
            assert torch.equal(copy_of[:, :, :length], cache)
