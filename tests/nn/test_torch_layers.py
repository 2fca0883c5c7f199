"""Do the drop-ins for torch.nn's attention and layers equal the originals? State dicts, values, gradients, masks, dropout, and
the cases left to torch."""

import copy
import warnings

import draws
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyfused.nn
from pyfused import notices
from pyfused.testing import assert_close

E, H, B, SQ, SK = 24, 4, 3, 7, 5


def twin(kind, *args, **options):
    """pyfused's module, torch's with the same weights, and torch's in float64; biases and norms are random."""
    theirs = getattr(nn, kind)(*args, **options)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    mine = getattr(pyfused.nn, kind)(*args, **options)
    mine.load_state_dict(theirs.state_dict(), strict=True)
    copy.deepcopy(theirs).load_state_dict(mine.state_dict(), strict=True)
    assert isinstance(mine, type(theirs))
    return mine, theirs, copy.deepcopy(theirs).double()


def compare(mine, theirs, wide, inputs, options, training=False):
    """Judges values and gradients by the tolerance rule, on new inputs of the same shapes; mine must not reach torch's
    forward. A tensor given twice stays one tensor, because torch's and pyfused's paths depend on that."""

    def run(module, leaves, convert):
        module.train(training)
        with pytest.MonkeyPatch.context() as patch:
            if module is mine:
                for kind in (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
                    patch.setattr(kind, "forward", lambda *_, **__: pytest.fail("the call was left to torch"))
            out = module(*leaves, **{k: convert(v) for k, v in options.items()})
        out = out[0] if isinstance(out, tuple) else out
        contiguous.append(out.is_contiguous())
        return out

    contiguous = []
    draws.check_modules((mine, theirs, wide), inputs, run)
    assert contiguous[0] or not contiguous[1]


def causal(size):
    return torch.ones(size, size, dtype=torch.bool).triu(1)


def hidden(*shape):
    """A bool mask that hides about a third, but never a whole row."""
    mask = torch.rand(shape) < 0.35
    mask[..., 0] = False
    return mask


def added(*shape):
    return torch.randn(shape).masked_fill(hidden(*shape), float("-inf"))


ATTENTION = {  # constructor, key and value, masks
    "self": ({}, "self", {}),
    "self, no bias": ({"bias": False}, "self", {}),
    "encoder": ({}, "memory", {}),
    "three inputs": ({}, "all", {}),
    "kdim": ({"kdim": 10, "vdim": 6}, "wide", {}),
    "kdim, no bias": ({"kdim": 10, "vdim": 6, "bias": False}, "wide", {}),
    "bias_kv": ({"add_bias_kv": True}, "memory", {"key_padding_mask": (B, SK), "attn_mask": (SQ, SK)}),
    "zero": ({"add_zero_attn": True, "add_bias_kv": True}, "self", {"attn_mask": (B * H, SQ, SQ)}),
    "padding": ({}, "memory", {"key_padding_mask": (B, SK)}),
    "masks 2-D": ({}, "self", {"key_padding_mask": (B, SQ), "attn_mask": (SQ, SQ)}),
    "mask 3-D": ({}, "memory", {"attn_mask": (B * H, SQ, SK)}),
}


@pytest.mark.parametrize("masks", [hidden, added])
@pytest.mark.parametrize("layout", ["batch first", "batch second"])
@pytest.mark.parametrize("case", ATTENTION)
def test_multihead_attention(case, layout, masks):
    constructor, inputs, shapes = ATTENTION[case]
    if masks is added and not shapes:
        return
    mine, theirs, wide = twin("MultiheadAttention", E, H, batch_first=layout == "batch first", **constructor)
    query = torch.randn(B, SQ, E)
    tensors = {
        "self": [query] * 3,
        "memory": [query, *[torch.randn(B, SK, E)] * 2],
        "all": [query, torch.randn(B, SK, E), torch.randn(B, SK, E)],
        "wide": [query, torch.randn(B, SK, 10), torch.randn(B, SK, 6)],
    }[inputs]
    if layout == "batch second":
        moved = {id(t): t.transpose(0, 1).contiguous() for t in tensors}
        tensors = [moved[id(t)] for t in tensors]
    options = {name: masks(*shape) for name, shape in shapes.items()}
    compare(mine, theirs, wide, tensors, {**options, "need_weights": False})


@pytest.mark.parametrize("options", [{}, {"key_padding_mask": (SQ,)}, {"attn_mask": (H, SQ, SQ)}], ids=str)
def test_multihead_attention_unbatched(options):
    mine, theirs, wide = twin("MultiheadAttention", E, H)
    options = {name: hidden(*shape) for name, shape in options.items()}
    compare(mine, theirs, wide, [torch.randn(SQ, E)] * 3, {**options, "need_weights": False})


@pytest.mark.parametrize("padding", [False, True])
def test_multihead_attention_by_the_causal_hint(padding):
    mine, theirs, wide = twin("MultiheadAttention", E, H, batch_first=True)
    options = {"attn_mask": causal(SQ), "is_causal": True, "need_weights": False}
    if padding:
        options["key_padding_mask"] = hidden(B, SQ)
    compare(mine, theirs, wide, [torch.randn(B, SQ, E)] * 3, options)


def test_weights_are_torchs_and_that_is_said_once(monkeypatch):
    monkeypatch.setattr(notices, "_said", set())
    mine, theirs, _ = twin("MultiheadAttention", E, H, batch_first=True)
    x = torch.randn(B, SQ, E)
    with pytest.warns(notices.FallbackWarning, match="need_weights=False"):
        actual = mine(x, x, x, average_attn_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = mine(x, x, x, average_attn_weights=False)
    expected = theirs(x, x, x, average_attn_weights=False)
    assert actual[1].shape == (B, H, SQ, SQ)
    for mine_out, theirs_out in ((actual, expected), (again, expected)):
        torch.testing.assert_close(mine_out, theirs_out)


def test_a_query_that_sees_nothing_gets_zeros():
    mine, theirs, _ = twin("MultiheadAttention", E, H, batch_first=True)
    x, mask = torch.randn(B, SQ, E), hidden(B, SQ)
    mask[1] = True
    out = mine(x, x, x, key_padding_mask=mask, need_weights=False)[0]
    assert torch.equal(out[1], mine.out_proj.bias.expand(SQ, E))
    torch.testing.assert_close(out[::2], theirs(x, x, x, key_padding_mask=mask, need_weights=False)[0][::2])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"is_causal": True}, "Need attn_mask"),
        ({"attn_mask": torch.zeros(2, 2)}, "2D attn_mask"),
        ({"attn_mask": torch.zeros(SQ, SQ, dtype=torch.long)}, "only bool and floating types"),
        ({"key_padding_mask": torch.zeros(B, SQ, dtype=torch.bool)[0]}, "key_padding_mask"),
    ],
)
def test_bad_masks_raise_torchs_errors(options, message):
    mine, _, _ = twin("MultiheadAttention", E, H, batch_first=True)
    x = torch.randn(B, SQ, E)
    with pytest.raises((RuntimeError, AssertionError), match=message):
        mine(x, x, x, need_weights=False, **options)


@pytest.mark.parametrize("case", ["float64", "head size", "mixed", "nested"])
def test_what_is_left_to_torch(case):
    """Equals torch bit for bit."""
    heads, width = (1, 264) if case == "head size" else (H, E)
    kinds = ["MultiheadAttention", "TransformerEncoderLayer"]
    for kind in kinds:
        mine, theirs, wide = twin(
            kind, width, heads, **({} if kind == kinds[0] else {"dropout": 0.0}), batch_first=True
        )
        x = torch.randn(B, SQ, width)
        if case == "float64":
            mine, theirs, x = mine.double(), wide, x.double()
        if case == "mixed":
            for module in (mine, theirs):
                module.to(torch.bfloat16)
            with torch.autocast("cpu", enabled=False), pytest.raises(RuntimeError, match="dtype"):
                mine.eval()(
                    *([x] * 3 if kind == kinds[0] else [x]), **({"need_weights": False} if kind == kinds[0] else {})
                )
            continue
        if case == "nested":
            x = torch.nested.as_nested_tensor([x[0], x[1, :3]])
        with torch.no_grad():
            calls = [
                m.eval()(x, x, x, need_weights=False)[0] if kind == kinds[0] else m.eval()(x) for m in (mine, theirs)
            ]
        if case == "nested":
            calls = [t.to_padded_tensor(0.0) for t in calls]
        assert torch.equal(*calls)


LAYERS = {  # constructor, masks of the encoder layer
    "relu": ({"activation": "relu"}, {}),
    "gelu": ({"activation": F.gelu, "bias": False}, {"src_key_padding_mask": (B, SQ)}),
    "GELU tanh": ({"activation": nn.GELU("tanh")}, {"src_mask": (SQ, SQ)}),
    "leaky": ({"activation": F.leaky_relu}, {"src_mask": (B * H, SQ, SQ), "src_key_padding_mask": (B, SQ)}),
}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("case", LAYERS)
def test_encoder_layer(case, batch_first, norm_first):
    options, shapes = LAYERS[case]
    options = {**options, "dropout": 0.0, "batch_first": batch_first, "norm_first": norm_first}
    twins = twin("TransformerEncoderLayer", E, H, 40, **options)
    x = torch.randn(B, SQ, E) if batch_first else torch.randn(SQ, B, E)
    compare(*twins, [x], {k: hidden(*shape) for k, shape in shapes.items()}, training=batch_first)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("case", ["plain", "batch second", "causal", "masks", "unbatched"])
def test_decoder_layer(case, norm_first):
    options = {"dropout": 0.0, "batch_first": case != "batch second", "norm_first": norm_first, "activation": "gelu"}
    twins = twin("TransformerDecoderLayer", E, H, 40, **options)
    tgt, memory = torch.randn(B, SQ, E), torch.randn(B, SK, E)
    if case == "batch second":
        tgt, memory = torch.randn(SQ, B, E), torch.randn(SK, B, E)
    if case == "unbatched":
        tgt, memory = torch.randn(SQ, E), torch.randn(SK, E)
    masks = {
        "causal": {"tgt_mask": causal(SQ), "tgt_is_causal": True, "memory_key_padding_mask": hidden(B, SK)},
        "masks": {"tgt_mask": added(SQ, SQ), "tgt_key_padding_mask": added(B, SQ), "memory_mask": added(B * H, SQ, SK)},
    }
    compare(*twins, [tgt, memory], masks.get(case, {}), training=True)


@pytest.mark.parametrize("mode", ["no_grad", "grad", "train"])
def test_inside_torchs_encoder_and_decoder(mode):
    """Puts the layers into torch's stacks by hand, which in inference turn padding into nested tensors, then fuses them."""
    options = {"dropout": 0.0, "batch_first": True}
    models = []
    for kinds in (pyfused.nn, nn):
        encoder = nn.TransformerEncoder(kinds.TransformerEncoderLayer(E, H, 40, **options), 2)
        decoder = nn.TransformerDecoder(kinds.TransformerDecoderLayer(E, H, 40, **options), 2)
        models.append(nn.Transformer(E, H, custom_encoder=encoder, custom_decoder=decoder, batch_first=True))
    mine, theirs = models
    mine.load_state_dict(theirs.state_dict())
    src, tgt, padding = torch.randn(B, SQ, E), torch.randn(B, SK, E), torch.arange(SQ) >= torch.tensor([[7], [2], [5]])
    masks = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(SK), "src_key_padding_mask": padding}
    with torch.set_grad_enabled(mode != "no_grad"):
        expected, encoded = theirs.train(mode == "train")(src, tgt, **masks), theirs.encoder(src, None, padding)
        for module in (mine.train(mode == "train"), mine if pyfused.fuse_(mine).replaced else None):
            torch.testing.assert_close(module(src, tgt, **masks), expected)
            torch.testing.assert_close(module.encoder(src, None, padding), encoded)


@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize("kind", ["MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_compiles_once_without_a_break(kind):
    mine, _, _ = twin(kind, E, H, dropout=0.0, batch_first=True)
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (SQ, SQ + 4):
        x, memory, mask = torch.randn(B, length, E), torch.randn(B, SK, E), hidden(B, length)
        x.requires_grad_(kind != "TransformerEncoderLayer")  # its backward is the same as in the other two
        inputs, options = {
            "MultiheadAttention": ((x, x, x), {"key_padding_mask": mask, "need_weights": False}),
            "TransformerEncoderLayer": ((x,), {"src_key_padding_mask": mask}),
            "TransformerDecoderLayer": ((x, memory), {"tgt_mask": causal(length), "tgt_is_causal": True}),
        }[kind]
        with torch.set_grad_enabled(x.requires_grad):
            outs = [m(*inputs, **options) for m in (mine, compiled)]
        outs = [out[0] if isinstance(out, tuple) else out for out in outs]
        torch.testing.assert_close(outs[1], outs[0])
        if x.requires_grad:
            grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in outs]
            torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("site", ["self_attn", "dropout", "dropout1", "dropout2", "none"])
def test_dropout_has_the_right_mean_at_every_site(site):
    """Norm first, and only linear maps after the attention, so the mean over draws equals evaluation."""
    layer, _, _ = twin("TransformerEncoderLayer", E, H, 40, dropout=0.0, batch_first=True, norm_first=True)
    if site in ("self_attn", "dropout1"):
        nn.init.zeros_(layer.linear2.weight)
    if site == "self_attn":
        layer.self_attn.dropout = 0.3
    elif site != "none":
        getattr(layer, site).p = 0.3
    draws = 2000
    x = torch.randn(1, 4, E).expand(draws, -1, -1)
    expected, out = layer.eval()(x[:1]), layer.train()(x)
    if site == "none":
        torch.testing.assert_close(out[:1], expected)
        return
    spread = out.std(0)
    assert (spread > 0).all()
    assert ((out.mean(0) - expected[0]).abs() < 6 * spread / draws**0.5).all()


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_each_dropout_is_at_its_place(kind, norm_first, monkeypatch):
    """With the same masks for the same shapes in the same order, the result equals torch's."""

    def dropout(x, p=0.5, training=True, inplace=False):  # ignores the strides
        return x * (torch.rand(x.shape) >= p) / (1 - p) if training and p else x

    monkeypatch.setattr(F, "dropout", dropout)
    mine, theirs, _ = twin(kind, E, H, 40, dropout=0.4, batch_first=True, norm_first=norm_first)
    for module in (mine, theirs):
        for child in module.modules():
            if isinstance(child, nn.MultiheadAttention):
                child.dropout = 0.0  # the kernel draws its own mask
    inputs = [torch.randn(B, SQ, E)] + ([torch.randn(B, SK, E)] if kind == "TransformerDecoderLayer" else [])
    outs = []
    for module in (mine, theirs):
        torch.manual_seed(3)
        outs.append(module.train()(*inputs))
    torch.testing.assert_close(*outs)
    torch.manual_seed(4)
    assert not torch.allclose(mine(*inputs), outs[0])
    mine.dropout1.eval()  # a child's own mode counts, as in Monte-Carlo dropout
    theirs.dropout1.eval()
    outs = []
    for module in (mine, theirs):
        torch.manual_seed(3)
        outs.append(module(*inputs))
    torch.testing.assert_close(*outs)


@pytest.mark.parametrize("norm_first", [False, True])
def test_inside_autocast(norm_first):
    """Dtypes, and errors against float64, match torch's under the same autocast."""
    mine, theirs, wide = twin("TransformerDecoderLayer", E, H, 40, dropout=0.0, batch_first=True, norm_first=norm_first)
    inputs = torch.randn(B, SQ, E), torch.randn(B, SK, E)
    options = {"tgt_mask": added(SQ, SQ), "memory_key_padding_mask": hidden(B, SK)}
    outs = []
    for module in (mine, theirs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outs.append(module(*inputs, **options))
        module.zero_grad()
        outs[-1].float().square().sum().backward()
    truth = wide(*(t.double() for t in inputs), **{k: draws.to_double(v) for k, v in options.items()})
    truth.square().sum().backward()
    assert outs[0].dtype == outs[1].dtype
    assert_close(*(out.bfloat16() for out in outs), truth)
    for (name, p), q, r in zip(mine.named_parameters(), theirs.parameters(), wide.parameters(), strict=True):
        assert p.grad.dtype == q.grad.dtype
        assert_close(*(g.grad.bfloat16() for g in (p, q)), r.grad, name)


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class OwnBlock(pyfused.nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return torch.zeros_like(x)


@pytest.mark.parametrize("case", ["hook", "class", "block", "norm", "forward"])
def test_children_are_never_bypassed(case):
    """A user's change to a child counts: torch's forward then calls the child."""
    mine, theirs, _ = twin("TransformerEncoderLayer", E, H, 40, dropout=0.0, batch_first=True)
    x = torch.randn(B, SQ, E)
    if case == "block":
        mine = OwnBlock(E, H, 40, dropout=0.0, batch_first=True)
        mine.load_state_dict(theirs.state_dict())
        theirs._ff_block = torch.zeros_like
    for layer in (mine, theirs):
        if case == "hook":
            layer.linear1.register_forward_hook(lambda module, args, output: 2 * output)
        elif case == "class":
            layer.linear1.__class__ = Doubled
        elif case == "norm":
            layer.norm2 = nn.RMSNorm(E)
        elif case == "forward":
            layer.self_attn.forward = lambda query, *_, **__: (query * 3, None)
    torch.testing.assert_close(mine(x), theirs(x))
    assert not torch.allclose(mine(x), twin("TransformerEncoderLayer", E, H, 40, dropout=0.0)[0](x))


@pytest.mark.parametrize("float_mask", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_probabilities_with_a_row_of_padding_alone(average, float_mask):
    """The other rows and their gradients equal torch's without that row; the padding row has no NaN."""
    theirs = nn.MultiheadAttention(E, 4, batch_first=True)
    mine = pyfused.nn.MultiheadAttention(E, 4, batch_first=True)
    mine.load_state_dict(theirs.state_dict())
    x, hidden = torch.randn(3, SQ, E), torch.zeros(3, SQ, dtype=torch.bool)
    hidden[0, :2], hidden[1], rows = True, True, [0, 2]
    found = []
    for module, kept in ((mine, slice(None)), (theirs, rows)):
        mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf) if float_mask else hidden
        out, weights = module(x[kept], x[kept], x[kept], key_padding_mask=mask[kept], average_attn_weights=average)
        assert out.isfinite().all()
        assert weights.isfinite().all()
        live = rows if module is mine else slice(None)
        (out[live].square().sum() + weights[live].square().sum()).backward()
        found.append([out[live], weights[live], *(p.grad for p in module.parameters())])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
