"""Do torch.nn's transformers compute the same after fuse_? Encoders with padding, nn.Transformer, a handwritten model; the
report, hooks, filters, copies."""

import copy
import pickle

import draws
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyfused
from pyfused.own_forward import is_fused

E, H, F, B, S = 24, 4, 40, 3, 9
LENGTHS = torch.tensor([9, 4, 6])
PADDED = torch.arange(S) >= LENGTHS[:, None]  # True hides


def encoder(layers=2, norm=True, nested=True, mask_check=True, **options):
    layer = nn.TransformerEncoderLayer(E, H, F, **{"dropout": 0.0, "batch_first": True, **options})
    norm = nn.LayerNorm(E) if norm else None
    made = nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=nested, mask_check=mask_check)
    return shaken(made)


def shaken(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def fused(model, **options):
    copied = copy.deepcopy(model)
    report = pyfused.fuse_(copied, **options)
    return copied, report


def no_torch_layers(patch):
    """From now on a call of torch's own layer forward is an error."""
    for kind in (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
        patch.setattr(kind, "forward", lambda *_, **__: pytest.fail("the call was left to torch"))


def test_report_of_a_transformer():
    model = nn.Transformer(E, H, 2, 2, F, 0.0, batch_first=True)
    copied, report = fused(model)
    layers = "pyfused.attention, ffn, linear and layer_norm"
    assert {e.name: e.note for e in report.replaced if e.kind.startswith("Transformer")} == {
        "encoder": "its layers on the real tokens alone, where torch's own would give zeros at padding",
        **{f"{side}coder.layers.{i}": layers for side in ("en", "de") for i in (0, 1)},
    }
    assert sum(e.kind == "MultiheadAttention" for e in report.replaced) == 6
    assert not report.left
    assert f"  encoder.layers.* (TransformerEncoderLayer) x2: {layers}" in str(report)
    assert list(copied.state_dict()) == list(model.state_dict())
    assert [type(m) for m in copied.modules()] == [type(m) for m in model.modules()]


@pytest.mark.parametrize("mode", ["no_grad", "grad", "train"])
@pytest.mark.parametrize(
    "options",
    [{}, {"norm": False}, {"nested": False}, {"norm_first": True}, {"mask_check": False}, {"batch_first": False}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_padding_gives_what_torch_gives(options, mode):
    """Before the final norm, zeros stand exactly where torch's nested tensors leave them; all other numbers are equal."""
    model = encoder(**options).train(mode == "train")
    copied, _ = fused(model)

    def once():
        x = torch.randn(B, S, E) if options.get("batch_first", True) else torch.randn(S, B, E)
        with torch.set_grad_enabled(mode != "no_grad"):
            plain, truth = (m(x.to(p), src_key_padding_mask=PADDED) for m, p in with_truth(model))
            with pytest.MonkeyPatch.context() as patch:
                no_torch_layers(patch)
                actual = copied(x, src_key_padding_mask=PADDED)
        if options == {"norm": False}:
            assert (actual[PADDED] == 0).all() == (mode == "no_grad")
        return {"output": (actual, plain, truth)}

    draws.check(once)


def with_truth(model):
    return (model, torch.float32), (copy.deepcopy(model).double(), torch.float64)


@pytest.mark.parametrize("case", ["not left aligned", "float", "causal", "causal by its looks", "mask", "empty row"])
def test_masks_of_an_encoder(case):
    model = encoder(norm=False).eval()
    copied, _ = fused(model)
    x, causal = torch.randn(B, S, E), nn.Transformer.generate_square_subsequent_mask(S)
    options = {
        "not left aligned": {"src_key_padding_mask": PADDED.flip(1)},
        "float": {"src_key_padding_mask": torch.zeros(B, S).masked_fill(PADDED, float("-inf"))},
        "causal": {"mask": causal, "is_causal": True, "src_key_padding_mask": PADDED.float().mul(-1e4)},
        "causal by its looks": {"mask": causal},
        "mask": {"mask": torch.randn(S, S), "src_key_padding_mask": PADDED.float().mul(-1e4)},
        "empty row": {"src_key_padding_mask": PADDED | (torch.arange(B) == 1)[:, None]},
    }[case]
    with torch.set_grad_enabled(case == "mask"):  # torch's inference path turns float masks into bool, whatever their values
        expected = model(x, **options)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        no_torch_layers(patch)
        actual = copied(x, **options)
    torch.testing.assert_close(actual, expected)
    with pytest.raises((RuntimeError, AssertionError)):
        copied(x, src_key_padding_mask=PADDED[:1])


def test_gradients_of_a_transformer():
    model = shaken(nn.Transformer(E, H, 2, 2, F, 0.0, batch_first=True))
    copied, _ = fused(model)
    options = {"src_key_padding_mask": PADDED, "memory_key_padding_mask": PADDED}

    def once():
        src, tgt, found = torch.randn(B, S, E), torch.randn(B, 5, E), []
        for module, dtype in ((copied, torch.float32), *with_truth(model)):
            mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=dtype)
            module.zero_grad()
            out = module(src.to(dtype), tgt.to(dtype), tgt_mask=mask, tgt_is_causal=True, **options)
            out.square().sum().backward()
            found.append({"output": out, **{name: p.grad for name, p in module.named_parameters()}})
        return {what: [one[what] for one in found] for what in found[0]}

    draws.check(once)


def test_exports_with_dynamic_sizes():
    model, _ = fused(encoder().eval())
    b, s = torch.export.Dim("b", min=2, max=64), torch.export.Dim("s", min=2, max=512)
    shapes = {"src": {0: b, 1: s}, "src_key_padding_mask": {0: b, 1: s}}
    with torch.no_grad():
        program = torch.export.export(
            model, (torch.randn(B, S, E),), {"src_key_padding_mask": PADDED}, dynamic_shapes=shapes
        )
        targets = {str(node.target) for node in program.graph.nodes}
        assert {f"pyfused.{name}_inference.default" for name in ("attention", "ffn", "layer_norm")} <= targets
        x, mask = torch.randn(2, 5, E), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        actual, expected = (m(x, src_key_padding_mask=mask) for m in (program.module(), model))
    torch.testing.assert_close(actual[~mask], expected[~mask])  # a trace has torch's values at padding, not zeros


def test_there_and_back():
    model = encoder().eval()
    copied, _ = fused(model)
    x = torch.randn(B, S, E)
    assert not torch.equal(copied(x), model(x))  # other kernels, other rounding
    torch.testing.assert_close(copied(x), model(x))
    assert torch.equal(pyfused.unfuse_(copied)(x), model(x))
    assert not any(is_fused(m) for m in copied.modules())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(clone):
    model, _ = fused(encoder().eval())
    other = clone(model)
    nn.init.zeros_(other.norm.weight)
    x = torch.randn(B, S, E)
    assert torch.equal(other(x), other.norm.bias.expand(B, S, E))
    assert not torch.equal(model(x), other(x))


def test_hooks_of_layers_and_children_run():
    """Each hook runs once per call, also with padding. A hook on a child sends only its layer to torch's forward."""
    model = encoder(3).eval()
    copied, _ = fused(model)
    x, seen = torch.randn(B, S, E), []
    copied.layers[0].register_forward_hook(lambda module, args, output: seen.append("layer"))
    copied.layers[1].linear2.register_forward_hook(lambda module, args, output: seen.append("child"))
    with torch.no_grad():
        out = copied(x, src_key_padding_mask=PADDED)
        torch.testing.assert_close(out, model(x, src_key_padding_mask=PADDED))
    assert seen == ["layer", "child"]
    assert copied(x).requires_grad
    assert seen == ["layer", "child"] * 2


def test_filter_and_reasons():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn = nn.MultiheadAttention(E, H, batch_first=True)

        def forward(self, x, **_):
            return x + self.self_attn(x, x, x, need_weights=False)[0]

    class Quiet(nn.TransformerEncoderLayer):
        def _ff_block(self, x):
            return torch.zeros_like(x)

    model = nn.ModuleDict(
        {
            "own": encoder(1),
            "quiet": Quiet(E, H, F, batch_first=True),
            "hooked": nn.TransformerDecoderLayer(E, H, F),
            "norm": nn.TransformerEncoderLayer(E, H, F),
            "wide": nn.MultiheadAttention(264, 1),
        }
    ).eval()
    model["own"].layers[0] = Own()
    model["hooked"].norm3.register_forward_pre_hook(lambda module, args: None)
    model["norm"].norm1 = nn.Identity()
    before = copy.deepcopy(model)
    report = pyfused.fuse_(model, filter_fn=lambda name, module: name != "own.norm")
    assert {e.name: e.note for e in report.left} == {
        "own": "has layers of class Own",
        "own.norm": "filter_fn says no",
        "quiet": "has a _ff_block of its own",
        "hooked": "has a LayerNorm with hooks or a forward of its own",
        "norm": "has an Identity in place of LayerNorm",
        "wide": "has heads of size 264; the kernels take 256",
    }
    assert is_fused(model["own"].layers[0].self_attn)
    x = torch.randn(B, S, E)
    for name in ("own", "quiet", "norm"):
        torch.testing.assert_close(model[name](x), before[name](x))


def test_layers_that_are_not_fused_in_an_encoder_that_is():
    model = encoder().eval()
    copied, _ = fused(model, filter_fn=lambda name, module: name in ("", "layers.0"))
    x = torch.randn(B, S, E)
    with torch.no_grad():
        torch.testing.assert_close(copied(x, src_key_padding_mask=PADDED), model(x, src_key_padding_mask=PADDED))


class ByHand(nn.Module):
    """A decoder-only model as people write it."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, E)
        self.attention = nn.MultiheadAttention(E, H, batch_first=True)
        self.norm, self.last = nn.LayerNorm(E), nn.RMSNorm(E)
        self.inner, self.outer = nn.Linear(E, F), nn.Linear(F, E)

    def forward(self, ids):
        x, s = self.embedding(ids), ids.shape[1]
        mask = torch.ones(s, s, dtype=torch.bool, device=ids.device).triu(1)
        x = x + self.attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return self.last(x + self.outer(torch.relu(self.inner(self.norm(x)))))


@pytest.mark.parametrize("way", ["eager", "checkpoint", "functional_call", "autocast", "compile"])
def test_a_model_by_hand(way):
    model = shaken(ByHand())
    copied, report = fused(model)
    assert [e.name for e in report.replaced] == ["attention", "norm", "last"]
    compiled = torch.compile(copied, fullgraph=True, backend="aot_eager")

    def call(module, ids):
        if way == "checkpoint":
            return checkpoint(module, ids, use_reentrant=False)
        if way == "functional_call":
            return torch.func.functional_call(module, {name: 2 * p for name, p in module.named_parameters()}, ids)
        return compiled(ids) if way == "compile" and module is copied else module(ids)

    def once():
        ids, found = torch.randint(0, 11, (B, S)), []
        for module in (copied, model, copy.deepcopy(model).double()):
            module.zero_grad()
            autocast = way == "autocast" and next(module.parameters()).dtype == torch.float32
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                out = call(module, ids)
            out.double().square().mean().backward()
            found.append({"output": out, **{name: p.grad for name, p in module.named_parameters()}})
        assert all(found[0][what].dtype == found[1][what].dtype for what in found[0])
        if way == "autocast":  # float32 parameters' gradients went through bfloat16
            found[:2] = [{what: t.bfloat16() for what, t in one.items()} for one in found[:2]]
        return {what: [one[what] for one in found] for what in found[0]}

    draws.check(once)


class Packed(torch.Tensor):
    """A weight as torchao makes them: F.linear alone can use it."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight):
        self.weight = weight

    def __tensor_flatten__(self):
        return ["weight"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors, context, size, stride):
        return cls(tensors["weight"])

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            return function(args[0], args[1].weight, *args[2:])
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].weight)
        raise NotImplementedError(f"{function} of a packed weight")


@pytest.mark.parametrize("packed", [Packed, torch.Tensor.to_sparse_csr])
@pytest.mark.parametrize(
    "kind, places, inputs",
    [
        ("Linear", [""], 1),
        ("TransformerEncoderLayer", ["linear1", "linear2"], 1),
        ("TransformerDecoderLayer", ["linear1"], 2),
    ],
)
def test_weights_that_only_torch_can_read(kind, places, inputs, packed):
    """Quantised or sparse weights, which came before fuse_ or after it, in a module that keeps its class. torch's native
    layers, which run without gradients, cannot read them either."""
    options = {"bias": True} if kind == "Linear" else {"batch_first": True, "dropout": 0.0}
    model = shaken(getattr(nn, kind)(E, E if kind == "Linear" else H, **options)).eval()
    x = torch.randn(B, S, E)
    expected = model(*[x] * inputs)
    pyfused.fuse_(model, linear=True)
    for place in places:
        layer = model.get_submodule(place)
        layer.weight = nn.Parameter(packed(layer.weight.detach()), requires_grad=False)
    for _ in range(2):
        torch.testing.assert_close(model(*[x] * inputs), expected)
        pyfused.fuse_(model, linear=True)
