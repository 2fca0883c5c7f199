"""Does each call read a mask or bias anew? Nothing from an earlier call is kept, however the mask was changed."""

import copy
import io
import pickle

import pytest
import torch
from hf_cases import build, tokens, with_implementation

import pyfused
from pyfused.integrations.transformers import attend, make_mask, masks

CAUSAL = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
HIDDEN = torch.tensor([[0, 0], [1, 1]])  # (row, key) pairs that are hidden afterwards


def change(array, value):
    for row, key in HIDDEN.tolist():
        array[row, 0, 3:, key] = value


def through_numpy(mask, value):
    change(mask.numpy(), value)
    return mask


def through_data(mask, value):
    change(mask.data, value)
    return mask


def through_a_view_of_the_memory(mask, value):
    other = torch.empty(0, dtype=mask.dtype).set_(mask.untyped_storage(), 0, mask.shape, mask.stride())
    change(other, value)
    return mask


def copied_after_a_change(mask, value):
    return copy.deepcopy(through_numpy(mask, value))


def pickled_after_a_change(mask, value):
    return pickle.loads(pickle.dumps(through_data(mask, value)))


CHANGES = [through_numpy, through_data, through_a_view_of_the_memory, copied_after_a_change, pickled_after_a_change]


@pytest.mark.parametrize("changed", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["bool", "float", "bias"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_changed_mask(kind, mode, changed):
    """bool: causal at first, then not; float: the same with eager's values; bias: a window, converted for each layer."""
    base, ids = CAUSAL.clone(), tokens(2, 6)
    if kind == "bias":
        base = base.triu(-4)
    value = False
    model = build("gpt2")
    fused = copy.deepcopy(model)
    pyfused.fuse_(fused)
    eager, named = (with_implementation(copy.deepcopy(model), name) for name in ("eager", "pyfused"))
    lowest = torch.finfo(torch.float32).min
    with mode():
        mask = base.clone()
        if kind == "float":
            mask, value = torch.zeros(mask.shape).masked_fill_(~mask, lowest), lowest
        for model in (fused, named):
            model(ids, attention_mask=mask)
        mask = changed(mask, value)
        added = mask if kind == "float" else torch.zeros(mask.shape).masked_fill_(~mask, lowest)
        expected = eager(ids, attention_mask=added)[0]
        before = eager(ids, attention_mask=torch.zeros(base.shape).masked_fill_(~base, lowest))[0]
        assert not torch.allclose(expected, before, atol=1e-2)
        for model in (fused, named):
            torch.testing.assert_close(model(ids, attention_mask=mask)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changed", CHANGES, ids=lambda f: f.__name__)
def test_a_changed_position_bias(changed):
    """T5's cross-attention passes zeros, which are no bias until someone writes into them."""
    module, query = torch.nn.Module(), torch.randn(2, 2, 6, 8)
    bias = torch.zeros(2, 1, 6, 6)
    arguments = {"position_bias": bias, "is_causal": False}
    attend(module, query, query, query, None, **arguments)
    arguments["position_bias"] = bias = changed(bias, 3.0)
    expected = torch.nn.functional.scaled_dot_product_attention(query, query, query, bias)
    torch.testing.assert_close(attend(module, query, query, query, None, **arguments)[0], expected.transpose(1, 2))


@pytest.mark.parametrize("mask", [CAUSAL, CAUSAL.triu(-2)], ids=["causal", "window"])
def test_a_mask_is_saved_as_it_came(mask):
    buffer, mask = io.BytesIO(), mask.clone()
    model = build("gpt2")
    pyfused.fuse_(model)
    model(tokens(2, 6), attention_mask=mask)
    assert vars(mask) == {}
    torch.save(mask, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True), mask)


def test_what_changes_between_two_layers():
    """A hook may change the mask that the next layer gets."""
    model = build("gpt2")
    plain = with_implementation(copy.deepcopy(model), "sdpa")
    pyfused.fuse_(model)
    ids, outputs = tokens(2, 6), []
    for each in (plain, model):
        mask = CAUSAL.clone()
        each.h[0].register_forward_hook(lambda *_, mask=mask: change(mask.numpy(), False))
        outputs.append(each(ids, attention_mask=mask)[0])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)


def brute_force(mask, all_see):
    """Computes the answer of kernels/cpu/mask_structure.py by trying everything."""
    seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    queries, keys = seen.shape[1:]
    if all_see and not seen.any(-1).all():
        return None
    last = seen[:, -1]
    if (seen == last[:, None]).all():
        return 0, int(not last.all())
    filled = max((j + 1 for j in range(keys) if last[:, j].any()), default=0)
    for end in (keys, filled):
        if end >= queries:
            upto = torch.arange(keys) <= (torch.arange(queries) + end - queries)[:, None]
            if (seen == (upto & last[:, None])).all():
                return end, int(not last[:, :end].all())
    return None


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_look_sees_the_whole_mask(dtype):
    """Tries thousands of small masks, each also with one element flipped. Float masks have zeros of either sign, or of both."""
    generator = torch.Generator().manual_seed(3)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    counts = {}
    for _ in range(400):
        b, queries, keys = draw(1, 3), draw(1, 5), draw(1, 6)
        real = torch.rand(b, 1, 1, keys, generator=generator) < 0.7
        real[..., keys - draw(0, 2) :] = False
        seen = real.expand(b, 1, queries, keys).clone()
        if draw(0, 4):
            end = max(queries, keys - draw(0, 3))
            seen &= torch.ones(queries, keys, dtype=torch.bool).tril(end - queries)
        for turned in (False, True):
            if turned:
                place = draw(0, b), 0, draw(0, queries), draw(0, keys)
                seen[place] = ~seen[place]
            mask = seen
            if dtype != torch.bool:
                hidden = -torch.inf if draw(0, 2) else torch.finfo(dtype).min
                minus = torch.rand(seen.shape, generator=generator) < draw(0, 3) / 2
                mask = torch.where(minus, -0.0, 0.0).to(dtype).masked_fill(~seen, hidden)
            for all_see in (False, True):
                found = masks.structure(mask, all_see)
                assert found == brute_force(mask, all_see), (mask, all_see)
                counts[found is None] = counts.get(found is None, 0) + 1
    assert min(counts.values()) > 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_from_a_product(dtype, calls):
    """(1 - mask) * least, as older releases and users write it, has -0.0 where a key is visible."""
    real = torch.tensor([[1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    mask = ((1.0 - real) * torch.finfo(dtype).min).to(dtype)[:, None, None].expand(2, 1, 3, 4)
    assert mask[1].signbit().all()
    query, key = torch.randn(2, 2, 3, 8, dtype=dtype), torch.randn(2, 2, 4, 8, dtype=dtype)
    attend(torch.nn.Module(), query, key, key, mask, is_causal=False)
    assert calls[0]["attn_bias"] is None
    assert torch.equal(calls[0]["padding_mask"], real.bool())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_zeros_of_either_sign_are_no_bias(dtype):
    for zero in (0.0, -0.0):
        bias = torch.full((3, 5), zero, dtype=dtype)
        assert masks.is_zero(bias)
        bias[2, 3] = -zero
        assert masks.is_zero(bias)
        bias[1, 4] = torch.finfo(dtype).smallest_normal
        assert not masks.is_zero(bias)
    assert masks.is_zero(torch.empty(0, dtype=dtype))
    assert not masks.is_zero(torch.zeros(3, dtype=torch.long))


def test_masks_that_no_one_reads():
    """Other values, strides, sizes of 0 and other dtypes stay dense."""
    mask = torch.zeros(2, 1, 3, 4).masked_fill(~torch.ones(3, 4, dtype=torch.bool).tril(1), -torch.inf)
    assert masks.structure(mask, False) == (4, 0)
    for odd in (-1.0, 1e-45, torch.nan, torch.finfo(torch.float32).min):
        other = mask.clone()
        other[1, 0, 0, 2] = odd
        assert masks.structure(other, False) is None, odd
    turned = mask.transpose(2, 3).contiguous().transpose(2, 3)
    for other in (turned, mask[:, :, :0], mask.to(torch.int32), mask.to("meta"), torch.nn.Parameter(mask)):
        assert masks.structure(other, False) is None
    for other in (mask[:, :, 1:, 1:], mask[1:, :, :, :3], mask[:1].expand(3, 1, 3, 4), mask[:, :, :1].expand(2, 1, 3, 4)):
        assert masks.structure(other, False) == brute_force(other, False)
    made = make_mask(batch_size=2, q_length=3, kv_length=3, attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]).bool())
    assert masks.structure(made, False) == (3, 1)
