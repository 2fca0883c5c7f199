"""Does attn_implementation="pyfused" read the dense position bias of T5 and its kin right, and as a table where it is one?"""

import copy
import functools

import pytest
import torch
import transformers as hf
from hf_cases import T5, check_against_eager, livened, padding, tokens, with_implementation
from torch.nn import functional as F

import pyfused
from pyfused.integrations.transformers import attend, masks

MODELS = {
    "T5": lambda: hf.T5Model(hf.T5Config(**T5)),
    "T5, encoder": lambda: hf.T5EncoderModel(hf.T5Config(**T5)),
    "mT5": lambda: hf.MT5Model(hf.MT5Config(**T5)),
    "UMT5": lambda: hf.UMT5Model(hf.UMT5Config(**T5)),
    "Switch Transformers": lambda: hf.SwitchTransformersEncoderModel(
        hf.SwitchTransformersConfig(**T5, num_sparse_encoder_layers=0)
    ),
}


@functools.cache
def built(name):
    torch.manual_seed(0)
    return livened(MODELS[name]())


@pytest.fixture(autouse=True)
def look(monkeypatch):
    """Looks at small tensors too."""
    monkeypatch.setattr(masks, "WORTH_A_LOOK", 0)


def kinds(calls):
    """Of each call, which bias it had."""
    return ["table" if c["relative_bias"] else "none" if c["attn_bias"] is None else "dense" for c in calls]


def inputs_of(name, side):
    inputs = {"input_ids": tokens(2, 9), "attention_mask": padding(2, 9, side)}
    return inputs if "encoder" in name or "Switch" in name else inputs | {"decoder_input_ids": tokens(2, 7)}


@pytest.mark.parametrize("side", [None, "right"])
@pytest.mark.parametrize("name", MODELS)
def test_models_without_fuse(name, side, calls):
    """Every layer's self-attention reads a table, the later layers' too. Cross-attention has zeros, which are no bias."""
    inputs = inputs_of(name, side)
    live = ... if "decoder_input_ids" in inputs else inputs["attention_mask"].bool()
    check_against_eager(copy.deepcopy(built(name)), inputs, live=live)
    encoder, decoder = ["table"] * 2, ["table", "none"] * 2
    assert kinds(calls) == encoder + (decoder if "decoder_input_ids" in inputs else [])


def test_a_small_bias_is_not_looked_at(calls, monkeypatch):
    """The kernel adds it sooner than it can be read."""
    monkeypatch.setattr(masks, "WORTH_A_LOOK", 4 * 9 * 9 * 4)  # heads, tokens, tokens, bytes
    model = with_implementation(copy.deepcopy(built("T5, encoder")), "pyfused")
    with torch.no_grad():
        for length in (8, 9):
            model(tokens(1, length))
    assert kinds(calls) == ["dense"] * 2 + ["table"] * 2


@pytest.mark.parametrize("name", ["T5", "UMT5"])
def test_generation(name):
    kind = getattr(hf, f"{name}ForConditionalGeneration")
    torch.manual_seed(1)
    model = livened(kind(getattr(hf, f"{name}Config")(**T5, decoder_start_token_id=0)))
    options = {"max_new_tokens": 5, "do_sample": False}
    inputs = {"input_ids": tokens(2, 9), "attention_mask": padding(2, 9, "right")}
    expected = with_implementation(model, "eager").generate(**inputs, **options)
    assert torch.equal(with_implementation(model, "pyfused").generate(**inputs, **options), expected)


@pytest.mark.parametrize("name", ["T5, encoder", "UMT5"])
def test_the_tables_gradient(name, calls):
    """A bias with a gradient is dense, and its gradient reaches the layer's table."""
    model, inputs = copy.deepcopy(built(name)), inputs_of(name, "right")

    def gradients(model):
        model(**inputs)[0].square().sum().backward()
        found = {n: p.grad for n, p in model.named_parameters() if "relative_attention_bias" in n}
        model.zero_grad()
        return found

    expected = gradients(with_implementation(copy.deepcopy(model).double(), "eager"))
    plain = gradients(with_implementation(model, "eager"))
    actual = gradients(with_implementation(model, "pyfused"))
    assert set(kinds(calls)) <= {"dense", "none"}
    assert actual
    for n, truth in expected.items():
        pyfused.testing.assert_close(actual[n], plain[n], truth, n)


def test_a_frozen_table_is_read_while_the_rest_is_trained(calls):
    model = with_implementation(copy.deepcopy(built("T5, encoder")), "pyfused")
    model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.requires_grad_(False)
    states = model(**inputs_of("T5, encoder", None))[0]
    assert states.requires_grad
    assert kinds(calls) == ["table", "table"]


def through_numpy(bias):
    bias.numpy()[0, 1, 2, 3] += 3.0


def through_data(bias):
    bias.data[0, :, 4] -= 2.0


def moved_alike(bias):
    bias.data.mul_(0.5)


@pytest.mark.parametrize("edit", [through_numpy, through_data, moved_alike])
def test_a_hook_that_edits_the_bias(edit, calls):
    """The layers after the hook get what it wrote, however it wrote it."""

    def hook(module, args, out):
        edit(out[1])

    model = copy.deepcopy(built("T5, encoder"))
    model.encoder.block[0].layer[0].register_forward_hook(hook)
    check_against_eager(model, inputs_of("T5, encoder", None))
    assert kinds(calls) == ["table", "table" if edit is moved_alike else "dense"]


def test_an_embedding_that_is_not_a_table_of_distances(calls):
    """What a user's module adds for one query alone stays there."""
    model = copy.deepcopy(built("T5, encoder"))
    table = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    table.register_forward_hook(lambda module, args, out: out + torch.arange(9.0)[:, None, None])
    check_against_eager(model, inputs_of("T5, encoder", None))
    assert kinds(calls) == ["dense", "dense"]


def layouts(bias):
    """The same (1, H, S, S) values in memory of several orders."""
    heads_last = bias.permute(0, 2, 3, 1).contiguous()  # transformers' own
    cut = F.pad(heads_last, (0, 0, 0, 2))[:, :, : bias.shape[3]]  # from more keys
    odd = torch.cat((bias.new_zeros(1), heads_last.flatten()))[1:].view(heads_last.shape)  # an odd place in memory
    return bias.contiguous(), *(each.permute(0, 3, 1, 2) for each in (heads_last, cut, odd))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_look_sees_the_whole_bias(dtype):
    """Every single element, changed by one step, makes it dense."""
    generator = torch.Generator().manual_seed(5)
    for heads, length in ((4, 2), (3, 5), (1, 4)):
        given = torch.randn(heads, 2 * length - 1, generator=generator).to(dtype)
        places = torch.arange(length) - torch.arange(length)[:, None] + length - 1
        for bias in layouts(given[:, places][None]):
            assert torch.equal(masks.distances(bias), given)
            assert vars(bias) == {}
            for head in range(heads):
                for query in range(length):
                    for key in range(length):
                        other = bias.clone()
                        other[0, head, query, key] += 1.0
                        corner = abs(query - key) == length - 1  # the only element at its distance
                        assert (masks.distances(other) is None) != corner


def test_biases_that_no_one_reads():
    """Other sizes, values that are not finite, other devices and subclasses stay dense."""
    bias = torch.ones(1, 4, 3, 3)
    assert masks.distances(bias) is not None
    for value in (-torch.inf, torch.nan):
        assert masks.distances(bias * value) is None
    others = bias[0], bias.expand(2, 4, 3, 3), bias[:, :, :2], bias[:, :, :1, :1], bias[:, :, :0, :0], bias[:, :0]
    for other in (*others, bias.to("meta"), torch.nn.Parameter(bias)):
        found = masks.distances(other)
        assert found is None or found.shape == (0, 5)


def test_a_bias_of_other_sizes_is_refused():
    query, bias = torch.randn(1, 4, 3, 8), torch.ones(1, 4, 5, 5)
    with pytest.raises(ValueError, match="attn_bias has shape"):
        attend(torch.nn.Module(), query, query, query, None, is_causal=False, position_bias=bias)


def test_packed_texts_have_no_position_bias():
    query, ends = torch.randn(1, 4, 3, 8), torch.tensor([0, 1, 3])
    with pytest.raises(ValueError, match="packed sequences and position_bias"):
        attend(
            *(torch.nn.Module(), query, query, query, None),
            is_causal=False,
            position_bias=torch.ones(1, 4, 3, 3),
            cu_seq_lens_q=ends,
            cu_seq_lens_k=ends,
        )


@pytest.mark.parametrize("case", ["attentions", "wide heads", "bfloat16", "float bias, bfloat16 query"])
def test_other_ways(case):
    """What runs in plain PyTorch gets the dense bias, and lower precision the bias in its dtype."""
    wide = 264 if case == "wide heads" else 8
    query, table = torch.randn(2, 4, 6, wide), torch.randn(4, 11)
    bias = table[:, torch.arange(6) - torch.arange(6)[:, None] + 5][None]
    if "bfloat16" in case:
        query, bias = query.bfloat16(), bias if "float bias" in case else bias.bfloat16()
    mask = torch.arange(6) < torch.tensor([6, 4])[:, None]
    mask = mask[:, None, None].expand(2, 1, 6, 6).contiguous()
    options = {"scaling": 1.0, "is_causal": False, "output_attentions": case == "attentions"}
    actual, _ = attend(torch.nn.Module(), query, query, query, mask, position_bias=bias, **options)
    added = bias.masked_fill(~mask, -torch.inf)
    truth = F.scaled_dot_product_attention(*[query.double()] * 3, added.to(query.dtype).double(), scale=1.0)
    plain = F.scaled_dot_product_attention(query, query, query, added.to(query.dtype), scale=1.0)
    pyfused.testing.assert_close(actual.transpose(1, 2), plain, truth)
