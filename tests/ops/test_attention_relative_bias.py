"""Is T5's relative bias inside attention right on every backend? Values, all gradients, decoding, memory, errors."""

import dataclasses
import functools

import pytest
import test_relative_bias
import torch
from attention_cases import Case, judge_backward, judge_forward, make, ones
from attention_cases import plain as plain_attention
from draws import check
from opchecks import check_registered, opcheck

import pyfused
from pyfused import DistanceBias, RelativeBias

# (num_buckets, max_distance, bidirectional)
ENCODER, DECODER, SMALL, ODD = (32, 128, True), (32, 128, False), (8, 12, True), (7, 6, False)


def each(most):
    """The table of a DistanceBias for so many positions."""
    return 2 * most - 1, 0, True


@dataclasses.dataclass(frozen=True)
class Biased:
    """A case of attention's own test with T5's bias."""

    attention: Case
    table: tuple[int, int, bool]

    @property
    def seldom(self):
        return self.attention.seldom

    def __str__(self):
        kind = "both" if self.table[2] else "before"
        return f"{self.attention}-{self.table[0]}-{self.table[1] or 'each'}-{kind}"


CASES = [
    Biased(Case((2, 2, 2, 1, 1, 8)), ENCODER),
    Biased(Case((6, 4, 2, 7, 7, 8), seldom=True), SMALL),
    Biased(Case((6, 3, 3, 7, 7, 8), is_causal=True, seldom=True), ODD),
    Biased(Case((6, 4, 2, 7, 2, 8), is_causal=True, seldom=True), SMALL),  # the first queries see no key
    Biased(Case((6, 2, 1, 5, 1, 40)), SMALL),
    Biased(Case((4, 2, 1, 20, 37, 16), padding="random"), SMALL),
    Biased(Case((8, 2, 2, 19, 37, 8), padding="all", bias="batch", scale=0.7, seldom=True), ODD),
    Biased(Case((4, 2, 1, 17, 17, 8), is_causal=True, padding="left", dropout_p=0.3), SMALL),
    Biased(Case((2, 2, 2, 33, 80, 16), bias="head", dropout_p=0.1, scale=-0.4), (16, 20, True)),
    Biased(Case((1, 2, 2, 20, 160, 16), scale=1.0, seldom=True), ENCODER),
    Biased(Case((1, 2, 1, 140, 140, 13), is_causal=True), DECODER),
    Biased(Case((1, 2, 2, 300, 300, 64), scale=0.2, padding="right", seldom=True), ENCODER),
    Biased(Case((1, 4, 2, 129, 257, 40), is_causal=True, padding="random", seldom=True), DECODER),
    Biased(Case((2, 2, 2, 257, 129, 8), padding="left", bias="row", seldom=True), (64, 40, True)),
    Biased(Case((1, 1, 1, 137, 137, 128), seldom=True), (4, 1000, True)),
    Biased(Case((6, 4, 2, 7, 5, 8), padding="left", bias="head", seldom=True), each(7)),
    Biased(Case((2, 4, 2, 40, 70, 16), is_causal=True, dropout_p=0.2), each(90)),
    Biased(Case((1, 1, 1, 1, 1, 8), seldom=True), each(1)),
    Biased(Case((1, 2, 1, 137, 137, 64), padding="right", seldom=True), each(137)),
]
DECODING = [
    Biased(Case((2, 4, 2, 1, 137, 64)), DECODER),
    Biased(Case((2, 2, 2, 1, 1025, 40), padding="left", seldom=True), DECODER),
    Biased(Case((2, 4, 4, 3, 70, 80), is_causal=True, padding="right"), ENCODER),
    Biased(Case((2, 4, 1, 2, 300, 16), bias="full", seldom=True), DECODER),
    Biased(Case((2, 4, 2, 1, 137, 40), padding="left"), each(137)),
    Biased(Case((1, 2, 2, 2, 200, 64), is_causal=True, seldom=True), each(250)),
]


def make_biased(case, table, dtype, device):
    inputs, options = make(case, dtype, device)
    inputs["table"] = torch.randn(table[0], case.sizes[1], device=device).to(dtype)
    return inputs, options


def fused(inputs, options, table):
    relative = RelativeBias(inputs["table"], table[2], table[1]) if table[1] else DistanceBias(inputs["table"].t())
    return pyfused.attention(**{k: v for k, v in inputs.items() if k != "table"}, relative_bias=relative, **options)


def plain(inputs, options, seed=None, logarithm=False, *, table):
    """Attention with the bias as a dense tensor of the inputs' dtype."""
    sq, sk = inputs["query"].shape[2], inputs["key"].shape[2]
    bias = test_relative_bias.plain(inputs["table"], sq, sk, table[2], table[1], sk - sq).to(inputs["query"].dtype)
    bias = bias + inputs["attn_bias"] if "attn_bias" in inputs else bias
    return plain_attention({**inputs, "attn_bias": bias}, options, seed, logarithm)


def judged(judge, case, dtype, device):
    table = case.table
    judge(
        lambda: make_biased(case.attention, table, dtype, device),
        functools.partial(fused, table=table),
        functools.partial(plain, table=table),
    )


@pytest.mark.parametrize("case", CASES + DECODING, ids=str)
def test_forward(each_backend, dtype, device, case):
    judged(judge_forward, case, dtype, device)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(each_backend, dtype, device, case):
    """Compares with the same plain PyTorch as attention's own test."""
    judged(judge_backward, case, dtype, device)


def test_gradients_are_bitwise_repeatable(each_backend, device):
    inputs, options = make_biased(Case((2, 2, 1, 70, 70, 8), padding="right"), SMALL, torch.float32, device)
    leaves = [t.requires_grad_() for t in inputs.values()]
    first, again = (
        torch.autograd.grad(fused(inputs, options, SMALL).square().sum(), leaves) for _ in range(2)
    )  # fmt: skip
    assert all(torch.equal(*pair) for pair in zip(first, again))


@pytest.mark.parametrize("sizes", [(2, 4, 2, 40, 40, 16), (2, 4, 2, 1, 40, 16)], ids=str)
def test_float32_table_beside_half_tensors(each_backend, device, sizes):
    """A model may keep its parameters in float32: the table and its gradient are float32."""

    def once():
        inputs, options = make_biased(Case(sizes, is_causal=True), DECODER, torch.bfloat16, device)
        inputs["table"] = torch.randn(32, sizes[1], device=device)
        cotangent = torch.randn(inputs["query"].shape, device=device)

        def run(function, change=lambda t: t):
            leaves = {k: change(v).detach().requires_grad_() for k, v in inputs.items()}
            out = function(leaves)
            return out, *torch.autograd.grad(out, list(leaves.values()), cotangent.to(out.dtype))

        actual = run(lambda t: fused(t, options, DECODER))
        expected = run(lambda t: plain(t, options, logarithm=True, table=DECODER))
        truth = run(lambda t: plain(t, options, table=DECODER), lambda t: t.double())
        assert actual[-1].dtype == torch.float32
        return {what: found for what, *found in zip(("out", *inputs), actual, expected, truth)}

    check(once)


@pytest.mark.parametrize("table", [ENCODER, DECODER], ids=["both", "before"])
def test_decoding_gives_the_rows_of_the_whole(each_backend, device, table):
    """A query beside a cache of Sk - 1 tokens stands at position Sk - 1."""

    def once():
        inputs, options = make_biased(Case((2, 4, 2, 60, 60, 16), is_causal=True), table, torch.float32, device)
        whole, found = fused(inputs, options, table), {}
        for sk in (1, 2, 37, 60):
            step = {
                k: v[:, :, sk - 1 : sk] if k == "query" else v[:, :, :sk] for k, v in inputs.items() if k != "table"
            }
            one = fused({**step, "table": inputs["table"]}, options, table)
            wide = {k: v.double() for k, v in step.items()} | {"table": inputs["table"].double()}
            found[f"{sk} keys"] = one, whole[:, :, sk - 1 : sk], plain(wide, options, table=table)
        return found

    check(once)


def test_dead_rows_are_zero(each_backend, device):
    query, key, value = (torch.randn(2, 2, 6, 8, device=device, requires_grad=True) for _ in range(3))
    table = torch.randn(32, 2, device=device, requires_grad=True)
    mask = torch.tensor([[0, 0, 0, 0, 0, 0], [0] * 6], device=device)
    out = pyfused.attention(query, key, value, padding_mask=mask, relative_bias=RelativeBias(table, True))
    assert (out == 0).all()
    out.backward(torch.ones_like(out))
    assert all((t.grad == 0).all() for t in (query, key, value, table))


def test_tables_of_any_strides(each_backend, device):
    query, key, value = (torch.randn(1, 3, 20, 8, device=device) for _ in range(3))
    table = torch.randn(3, 64, device=device).T[::2]
    outs = [
        pyfused.attention(query, key, value, relative_bias=RelativeBias(t, True)) for t in (table, table.contiguous())
    ]
    assert torch.equal(*outs)


@pytest.mark.parametrize("wanted", ["table", "query"])
def test_only_what_is_asked_gets_a_gradient(each_backend, device, wanted):
    inputs, options = make_biased(Case((1, 2, 2, 20, 20, 8)), SMALL, torch.float32, device)
    inputs[wanted].requires_grad_()
    fused(inputs, options, SMALL).sum().backward()
    assert [k for k, v in inputs.items() if v.grad is not None] == [wanted]


def test_gradcheck_by_distance():
    """test_double_backward.py has T5's table."""
    table = each(5)
    inputs, options = make_biased(Case((2, 2, 1, 4, 5, 3), padding="left", bias="head"), table, torch.float64, "cpu")
    leaves = [t.requires_grad_() for t in inputs.values()]
    assert torch.autograd.gradcheck(lambda *t: fused(dict(zip(inputs, t)), options, table), leaves)


def test_alibi(each_backend, device):
    """The slopes of ALiBi as a table by distance; in packed sequences and under autocast too."""
    query, key, value = (torch.randn(1, 4, 30, 8, device=device) for _ in range(3))
    slopes = 2.0 ** -torch.arange(1, 5, device=device)
    table = -slopes[:, None] * torch.arange(-31, 32, device=device).abs()
    places = torch.arange(30, device=device)
    dense = -slopes[:, None, None] * (places - places[:, None]).abs()

    def found(**options):
        return pyfused.attention(query, key, value, is_causal=True, **options)

    torch.testing.assert_close(found(relative_bias=DistanceBias(table)), found(attn_bias=dense[None]))
    ends = torch.tensor([0, 12, 30], dtype=torch.int32, device=device)
    packed = found(relative_bias=DistanceBias(table), cu_seqlens=ends, max_seqlen=18)
    query, key, value = (t[:, :, :12] for t in (query, key, value))
    torch.testing.assert_close(packed[:, :, :12], found(relative_bias=DistanceBias(table)))
    with torch.autocast(device, torch.bfloat16):
        low = found(relative_bias=DistanceBias(table))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), packed[:, :, :12], rtol=0.05, atol=0.05)


def test_a_table_by_distance_compiled():
    query, table = torch.randn(1, 2, 6, 8), torch.randn(2, 15, requires_grad=True)

    def run(query, table):
        return pyfused.attention(query, query, query, relative_bias=DistanceBias(table))

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for got, expected in zip(
        *((out := f(query, table), *torch.autograd.grad(out.sum(), table)) for f in (compiled, run))
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 8), r"relative_bias.table has shape \(2, 8\); it takes \(H, 2 L - 1\)"),
        ((9,), r"relative_bias.table has shape \(9,\); it takes \(H, 2 L - 1\)"),
        ((2, 7), r"relative_bias.table has 7 distances; it takes 2 L - 1 of them, and L at least 5"),
        ((3, 9), r"relative_bias.table has 3 heads; it takes query's 2"),
    ],
    ids=str,
)
def test_tables_by_distance_that_do_not_fit(shape, message):
    query, key, value = torch.randn(1, 2, 4, 8), *torch.randn(2, 1, 2, 5, 8)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            pyfused.attention(query, key, value, relative_bias=DistanceBias(torch.randn(shape)))
    with pytest.raises(TypeError, match=r"relative_bias\.table is a list; it takes a torch.Tensor"):
        pyfused.attention(query, key, value, relative_bias=DistanceBias([1.0]))
    pyfused.attention(query, key, value, relative_bias=DistanceBias(torch.randn(2, 9)))
    with pytest.raises(
        ValueError, match=r"relative_bias\.max_distance is 0; it takes more than"
    ):  # not even afterwards
        pyfused.attention(query, key, value, relative_bias=RelativeBias(torch.randn(2, 9).t(), True, 0))


def test_opcheck(each_backend, device):
    query, key, value = (torch.randn(1, 2, n, 8, device=device, requires_grad=True) for n in (4, 5, 5))
    table = torch.randn(8, 2, device=device, requires_grad=True)
    common, relative = (True, None, None, 0.3, 0.0, None), (True, 20)
    check_registered("attention", (query, key, value, *common, True, table, *relative), save=9)
    args = [t.detach() for t in (query, key, value)]
    out, lse = torch.ops.pyfused.attention(*args, *common, True, table.detach(), *relative)
    args = (torch.randn_like(out), *args, out, lse, *common, False, table.detach(), *relative, True)
    opcheck(torch.ops.pyfused.attention_backward, args)


def test_compiles_without_a_break(device):
    query = torch.randn(1, 2, 6, 8, device=device, requires_grad=True)
    table = torch.randn(32, 2, device=device, requires_grad=True)

    def call(query, table):
        return pyfused.attention(query, query, query, relative_bias=RelativeBias(table, True)).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    grads = [torch.autograd.grad(f(query, table), (query, table)) for f in (call, compiled)]
    for a, b in zip(*grads):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "bias, error, message",
    [
        (object(), TypeError, "relative_bias is a object; it takes a pyfused.RelativeBias"),
        ((ones(32, 4), True, 128), TypeError, "relative_bias is a tuple"),
        (RelativeBias([1.0], True), TypeError, "relative_bias.table is a list"),
        (
            RelativeBias(ones(32, 4, dtype=torch.float64), True),
            TypeError,
            "relative_bias.table is float64; .* float32$",
        ),
        (RelativeBias(ones(32, 4, device="meta"), True), ValueError, "relative_bias.table is on meta"),
        (RelativeBias(ones(32), True), ValueError, r"relative_bias.table has shape \(32,\)"),
        (RelativeBias(ones(32, 3), True), ValueError, "relative_bias.table has 3 heads; it takes query's 4"),
        (RelativeBias(ones(3, 4), True), ValueError, "relative_bias.table has 3 buckets"),
        (RelativeBias(ones(32, 4), 1), TypeError, "relative_bias.bidirectional is a int"),
        (RelativeBias(ones(32, 4), True, 8.0), TypeError, "relative_bias.max_distance is a float"),
        (RelativeBias(ones(32, 4), False, 16), ValueError, "relative_bias.max_distance is 16; it takes more than 16"),
    ],
)
def test_bad_input_names_the_argument(bias, error, message):
    with pytest.raises(error, match=message):
        pyfused.attention(ones(2, 4, 3, 8), ones(2, 2, 5, 8), ones(2, 2, 5, 8), relative_bias=bias)
