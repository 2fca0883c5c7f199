"""Is attention of packed sequences right on every backend? Values and all gradients equal a padded batch's real rows."""

import dataclasses
import functools

import pytest
import test_attention_relative_bias as biased
import torch
from attention_cases import judge_backward, judge_forward, judge_threads, ones
from attention_cases import plain as plain_attention
from opchecks import check_registered, opcheck

import pyfused

SMALL, ENCODER, DECODER = (8, 12, True), (32, 128, True), (32, 128, False)


@dataclasses.dataclass(frozen=True)
class Case:
    """H, Hkv, D, the sequences' lengths, and the options of one comparison; seldom: too slow for an interpreter."""

    heads: tuple[int, int, int]
    lengths: tuple[int, ...]
    is_causal: bool = False
    table: tuple[int, int, bool] | None = None  # num_buckets, max_distance, bidirectional
    dropout_p: float = 0.0
    scale: float | None = None
    seldom: bool = False

    def __str__(self):
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[2:-1]}
        options = [name if value is True else str(value) for name, value in values.items() if value]
        return "-".join(["x".join(map(str, self.heads)), "+".join(map(str, self.lengths)), *options])


CASES = [
    Case((1, 1, 8), (1,)),
    Case((3, 3, 8), (1, 2, 7)),
    Case((4, 2, 13), (7, 0, 33, 1), is_causal=True),
    Case((2, 1, 16), (20, 37, 5), table=SMALL),
    Case((2, 2, 40), (17, 3), is_causal=True, dropout_p=0.3),
    Case((2, 2, 8), (0, 9, 0, 30, 0), table=SMALL, dropout_p=0.2, scale=-0.4),
    Case((2, 2, 64), (127, 129, 1, 64), seldom=True),
    Case((2, 1, 64), (200, 7, 137), is_causal=True, seldom=True),
    Case((2, 2, 80), (64, 64, 128), table=ENCODER, scale=0.2, seldom=True),
    Case((1, 1, 128), (300, 2, 129), is_causal=True, table=DECODER, dropout_p=0.1, seldom=True),
    Case((2, 2, 256), (33, 70), seldom=True),
    Case((1, 1, 8), (3,) * 150, is_causal=True, seldom=True),
]


def offsets(lengths, device):
    return torch.tensor([0, *lengths], device=device).cumsum(0)


def make(case, dtype, device):
    h, hkv, d = case.heads
    total = sum(case.lengths)
    inputs = {"query": torch.randn(1, h, total, d, device=device).to(dtype)}
    inputs["key"], inputs["value"] = (torch.randn(1, hkv, total, d, device=device).to(dtype) for _ in range(2))
    if case.table:
        inputs["table"] = torch.randn(case.table[0], h, device=device).to(dtype)
    return inputs, {"is_causal": case.is_causal, "scale": case.scale, "dropout_p": case.dropout_p}


def fused(inputs, options, case):
    inputs = dict(inputs)
    if case.table:
        options = options | {"relative_bias": pyfused.RelativeBias(inputs.pop("table"), case.table[2], case.table[1])}
    return pyfused.attention(**inputs, **options, cu_seqlens=offsets(case.lengths, inputs["query"].device))


def plain(inputs, options, seed=None, logarithm=False, *, case):
    """Pads the sequences to the longest, computes masked attention in plain PyTorch, and returns the real rows."""
    device, longest = inputs["query"].device, max(case.lengths)
    real = torch.arange(longest, device=device) < torch.tensor(case.lengths, device=device)[:, None]

    def padded(packed):
        rows = torch.zeros(*real.shape, *packed.transpose(1, 2).shape[2:], dtype=packed.dtype, device=device)
        return torch.index_put(rows, (real,), packed[0].transpose(0, 1)).transpose(1, 2)

    batch = {name: tensor if name == "table" else padded(tensor) for name, tensor in inputs.items()}
    options = options | {"padding_mask": real}
    if case.table:
        out = biased.plain(batch, options, seed, logarithm, table=case.table)
    else:
        out = plain_attention(batch, options, seed, logarithm)
    return out.transpose(1, 2)[real].transpose(0, 1)[None]


def judged(judge, case, dtype, device):
    judge(
        lambda: make(case, dtype, device), functools.partial(fused, case=case), functools.partial(plain, case=case)
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(each_backend, dtype, device, case):
    judged(judge_forward, case, dtype, device)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(each_backend, dtype, device, case):
    judged(judge_backward, case, dtype, device)


@pytest.mark.cpu_kernels
def test_threads_do_not_change_the_result(each_backend):
    judged(judge_threads, Case((3, 3, 24), (300, 7, 130), is_causal=True), torch.float32, "cpu")


def test_views_and_a_longer_maximum(each_backend, device):
    """Views of one (1, T, 3, H, D) tensor, as from a projection, and a max_seqlen that is only a bound."""
    lengths, (h, d) = (5, 20, 12), (2, 16)
    stacked = torch.randn(1, sum(lengths), 3, h, d, device=device)
    views = stacked.permute(2, 0, 3, 1, 4).unbind(0)
    expected = pyfused.attention(*(v.contiguous() for v in views), is_causal=True, cu_seqlens=offsets(lengths, device))
    short = offsets(lengths, device).to(torch.int32)
    assert torch.equal(pyfused.attention(*views, is_causal=True, cu_seqlens=short), expected)
    assert torch.equal(pyfused.attention(*views, is_causal=True, cu_seqlens=short, max_seqlen=31), expected)


def test_other_sequences_do_not_matter(each_backend, device):
    """NaN in one sequence reaches no other, forward or backward."""
    case = Case((2, 2, 16), (9, 21, 14), is_causal=True)
    inputs, options = make(case, torch.float32, device)
    cotangent = torch.randn(inputs["query"].shape, device=device)
    middle = slice(9, 30)

    def run(spoilt):
        leaves = {k: v.clone() for k, v in inputs.items()}
        if spoilt:
            for leaf in leaves.values():
                leaf[:, :, middle] = torch.nan
        leaves = {k: v.requires_grad_() for k, v in leaves.items()}
        out = fused(leaves, options, case)
        found = (out.detach(), *torch.autograd.grad(out, list(leaves.values()), cotangent))
        return [torch.cat((t[:, :, :9], t[:, :, 30:]), 2) for t in found]

    for clean, spoilt in zip(run(False), run(True)):
        assert torch.equal(clean, spoilt)


def test_opcheck(each_backend, device):
    query, key, value = (torch.randn(1, 2, 6, 8, device=device, requires_grad=True) for _ in range(3))
    table, seed = torch.randn(8, 2, device=device), torch.tensor([7], device=device)
    common = (True, None, None, 0.3, 0.2, seed)
    packed = (table, True, 12), (torch.tensor([0, 2, 6], dtype=torch.int32, device=device), 4)
    check_registered("attention", (query, key, value, *common, True, *packed[0], *packed[1]), save=9)
    args = [t.detach() for t in (query, key, value)]
    out, lse = torch.ops.pyfused.attention(*args, *common, True, *packed[0], *packed[1])
    args = (torch.randn_like(out), *args, out, lse, *common, False, *packed[0], True, *packed[1])
    opcheck(torch.ops.pyfused.attention_backward, args)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"cu_seqlens": [0, 5]}, TypeError, "cu_seqlens is a list"),
        ({"cu_seqlens": ones(3)}, TypeError, "cu_seqlens is float32; it takes int32 or int64"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, ValueError, r"cu_seqlens has shape \(0,\)"),
        ({"cu_seqlens": torch.tensor([[0, 5]])}, ValueError, "cu_seqlens has shape"),
        ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, r"cu_seqlens is \[0, 4\]; it takes 0 first, 5 last"),
        ({"cu_seqlens": torch.tensor([1, 5])}, ValueError, "cu_seqlens is"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 5])}, ValueError, "never falls"),
        ({"cu_seqlens": torch.tensor([0, 5], device="meta")}, ValueError, "cu_seqlens is on meta"),
        ({"max_seqlen": 2}, ValueError, "max_seqlen is 2; it takes at least the longest sequence, 3"),
        ({"max_seqlen": 2.5}, TypeError, "max_seqlen is 2.5"),
        ({"cu_seqlens": None, "max_seqlen": 3}, ValueError, "max_seqlen is 3 without cu_seqlens"),
        ({"padding_mask": ones(1, 5)}, ValueError, "padding_mask is given beside cu_seqlens"),
        ({"attn_bias": ones(5, 5)}, ValueError, "attn_bias is given beside cu_seqlens"),
        ({"key": ones(1, 2, 6, 8), "value": ones(1, 2, 6, 8)}, ValueError, r"they take \(1, H, T, D\)"),
        ({k: ones(2, 2, 5, 8) for k in ("query", "key", "value")}, ValueError, r"they take \(1, H, T, D\)"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    arguments = {"query": ones(1, 2, 5, 8), "key": ones(1, 2, 5, 8), "value": ones(1, 2, 5, 8)}
    arguments |= {"cu_seqlens": torch.tensor([0, 3, 5]), **change}
    with pytest.raises(error, match=message):
        pyfused.attention(**arguments)
