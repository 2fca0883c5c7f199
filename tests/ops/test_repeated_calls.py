"""Does a call with a known signature, which skips the checks, give the same result? And is every other call checked?"""

import subprocess
import sys

import pytest
import torch

import pyfused
from pyfused import dispatch, evidence, extensions
from pyfused.ops.registration import Operator

pytestmark = pytest.mark.skipif(bool(extensions.missing("_cpu")), reason="needs the CPU extension")


def mask(x):
    return x[..., 0, :, 0] > -0.5


def ffn(x, w_out):
    return pyfused.ffn(x, x[0].flatten(0, 1), None, w_out, x[0, 0, 0], activation="gelu_new")


# Functions of x (2, 3, 4, 8), whose first values change from call to call
CALLS = {
    "layer_norm": lambda x: pyfused.layer_norm(x, x[0, 0, 0], x[0, 0, 1], eps=1e-3),
    "layer_norm residual": lambda x: pyfused.layer_norm(x, x[0, 0, 0], residual=x.transpose(1, 2).reshape(x.shape)),
    "layer_norm strides": lambda x: pyfused.layer_norm(x[..., :5], x[0, 0, 0, :5], residual=x[..., 3:]),
    "layer_norm copies": lambda x: pyfused.layer_norm(x.mT, x[0, 0, :, 0], x[0, 0, :, 1]),
    "rms_norm": lambda x: pyfused.rms_norm(x, x[0, 0, 0]),
    "rms_norm residual": lambda x: pyfused.rms_norm(x[:, :, ::2], x[0, 0, 0], residual=x[:, :, 1::2]),
    "linear": lambda x: pyfused.linear(x, x[0].flatten(0, 1), x[0, :, :, 0].reshape(-1).contiguous(), residual=None),
    "linear residual": lambda x: pyfused.linear(x, x[0].flatten(0, 1)[:8], None, residual=x),
    "linear transposed": lambda x: pyfused.linear(x, x.view(6, 4, 8)[:2].reshape(8, 8).t()),
    "ffn": lambda x: ffn(x, x[1].flatten(0, 1).t().contiguous()),
    "ffn by the library": lambda x: ffn(x, x[1].flatten(0, 1).t()),
    "gated_ffn": lambda x: pyfused.gated_ffn(x, *(x.view(3, 8, 8)), activation="silu", residual=x),
    "gated_ffn by the library": lambda x: pyfused.gated_ffn(x, *(x.view(3, 8, 8).mT), activation="gelu_new"),
    "attention": lambda x: pyfused.attention(x, x * 2, x.flip(2)),
    "attention strides": lambda x: pyfused.attention(*(x.transpose(1, 2) for _ in range(3)), is_causal=True, scale=2.0),
    "attention mask": lambda x: pyfused.attention(x, x, x, padding_mask=mask(x)),
    "attention mask of floats": lambda x: pyfused.attention(x, x, x, padding_mask=mask(x).float()),
    "attention bias": lambda x: pyfused.attention(x, x, x, attn_bias=x[..., :4]),
    "attention bias of all heads": lambda x: pyfused.attention(x, x, x, attn_bias=x[0, 0, :1, :4]),
    "attention table": lambda x: pyfused.attention(x, x, x, relative_bias=pyfused.RelativeBias(x[0, :, 0].t(), True, 9)),
    "attention one query": lambda x: pyfused.attention(x[:, :, :1], x, x, is_causal=True),
    "relative_bias": lambda x: pyfused.relative_bias(x[0, :, 0].t(), 5, 6, bidirectional=True, max_distance=9, query_offset=1),
    "fourier_mix": lambda x: pyfused.fourier_mix(x[0]),
    "fourier_mix copies": lambda x: pyfused.fourier_mix(x[0, :, :, :1]),
}  # fmt: skip


# Inputs that the checks or the kernel replace by another tensor, and by a view, which a launch reads like its memory
CONVERTED, VIEWED = ("transposed", "floats"), ("of all heads",)
WAYS = {
    "kernel": lambda: evidence.one_way(False),
    "library": lambda: evidence.one_way(True),
    "reference": lambda: pyfused.backend("reference"),  # no launch is prepared, but the choice is kept
}


@pytest.fixture(autouse=True)
def nothing_remembered():
    dispatch.forget()
    yield
    dispatch.forget()


@pytest.fixture
def checks(monkeypatch):
    """Counts the calls whose arguments are checked."""
    count = []
    original = Operator.call_checked
    monkeypatch.setattr(Operator, "call_checked", lambda *args: count.append(1) or original(*args))
    return count


@pytest.fixture
def choices(monkeypatch):
    """Counts the calls for which a backend is chosen."""
    count = []
    original = dispatch.chosen
    monkeypatch.setattr(dispatch, "chosen", lambda *args: count.append(1) or original(*args))
    return count


def parts(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CALLS)
def test_same_as_when_every_call_is_checked(name, dtype, way, checks, choices):
    call, inputs = CALLS[name], [torch.randn(2, 3, 4, 8).to(dtype) for _ in range(3)]
    with WAYS[way]():
        expected = [parts(call(x)) for x in inputs]  # enabled gradients check each call
        assert len(checks) == 3
        with torch.no_grad():
            actual = [parts(call(x)) for x in inputs]
    for a, e in zip(actual, expected, strict=True):
        assert all(map(torch.equal, a, e))
        assert all(one.stride() == other.stride() for one, other in zip(a, e))
    assert len({a[0].data_ptr() for a in actual}) == 3
    assert len(choices) == 1
    if not any(word in name for word in (*CONVERTED, *(VIEWED if way == "reference" else ()))):
        assert len(checks) <= 4  # the later two need none


NARROW = {  # kernels need no copy of these, whatever their strides
    "layer_norm of one number": lambda x: pyfused.layer_norm(x[..., :1], x[0, 0, 0, :1], x[0, 0, 1, :1]),
    "rms_norm of one number": lambda x: pyfused.rms_norm(x[..., :1], x[0, 0, 0, :1], residual=x[..., 1:2]),
    "linear of one number": lambda x: pyfused.linear(x[0, 0, :, :1], x[0, 0, :1, :1], x[0, 0, 0, :1], residual=x[0, 0, :, 1:2]),
    "ffn of one number": lambda x: pyfused.ffn(x[0, 0, :, :1], *one(x), activation="silu"),
    "attention of one number": lambda x: pyfused.attention(*(x[..., i : i + 1] for i in range(3))),
    "attention distances": lambda x: pyfused.attention(x, x, x, relative_bias=pyfused.DistanceBias(x[0, :, 0, :7])),
}  # fmt: skip


def one(x):
    """ffn's weights and biases of one number each."""
    return x[0, 1, :1, :1], x[0, 1, 1, :1], x[0, 1, 2:3, :1], x[0, 1, 3, :1]


@pytest.mark.parametrize("name", [*CALLS, *NARROW])
def test_a_view_with_the_other_sign(name):
    """z.conj().imag. A call with the same strides came before, without the sign."""
    call, numbers = (CALLS | NARROW)[name], torch.complex(torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8))
    view = numbers.conj().imag
    assert view.is_neg()
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            expected = parts(call((-numbers.imag).requires_grad_(gradients)))
            for _ in range(2):
                call(numbers.imag.requires_grad_(gradients) * 1 if gradients else numbers.imag)
            for _ in range(2):
                for ours, theirs in zip(parts(call(view)), expected):
                    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", [*CALLS, *NARROW])
def test_a_gradient_with_the_other_sign(name):
    """Of torch.complex(0, y).conj().imag = -y."""
    call, found = (CALLS | NARROW)[name], []
    for negate in (lambda y: torch.complex(torch.zeros_like(y), y).conj().imag, torch.neg):
        torch.manual_seed(0)
        x = torch.randn(2, 3, 4, 8, requires_grad=True)
        (negate(parts(call(x))[0]) * 3.0).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("forced", [None, "reference", "cpu:baseline", "cpu:avx2"])
def test_the_backend_that_is_forced_runs(forced, monkeypatch):
    from pyfused.testing import available, running

    if forced is not None and forced not in available():
        pytest.skip(f"no {forced} here")
    x, w, ran = torch.randn(3, 8), torch.randn(8), []
    for name in ("reference", "cpu"):
        module = dispatch.kernel(name, "layer_norm")
        monkeypatch.setattr(module, "forward", noting(module.forward, name, ran))
    isa = extensions.isa()
    with torch.no_grad():
        pyfused.layer_norm(x, w)  # remembered, and not to be used for another backend
        pyfused.layer_norm(x, w)
        assert set(ran) == {("cpu", isa)}
        ran.clear()
        if forced is not None:
            with running(forced):
                pyfused.layer_norm(x, w)
                pyfused.layer_norm(x, w)
            name, _, isa = forced.partition(":")
            assert {r[0] for r in ran} == {name}
            if isa:
                assert {r[1] for r in ran} == {isa}


def noting(forward, name, ran):
    """The same kernel; it notes where it runs and the instruction set it was prepared for."""

    def noted(*args):
        ran.append((name, extensions.isa()))
        return forward(*args)

    if hasattr(forward, "prepare"):

        def prepare(*args):
            launch, isa = forward.prepare(*args), extensions.isa()
            return lambda *args: ran.append((name, isa)) or launch(*args)

        noted.prepare = prepare
    return noted


CHANGES = [
    ({"weight": torch.ones(4, 7)}, ValueError, r"weight has shape \(4, 7\)"),
    ({"weight": torch.ones(4, 8, dtype=torch.float16)}, TypeError, "weight is float16"),
    ({"weight": torch.ones(4, 8, device="meta")}, ValueError, "weight is on meta"),
    ({"x": [1.0]}, TypeError, "x is a list"),
    ({"x": torch.ones(2, 8, dtype=torch.int32)}, TypeError, "x is int32"),
    ({"bias": 1.0}, TypeError, "bias is a float"),
    ({"residual": torch.ones(4)}, ValueError, "residual has shape"),
]


@pytest.mark.parametrize("change, error, message", CHANGES)
def test_what_differs_is_checked(change, error, message):
    arguments = {"x": torch.ones(2, 8), "weight": torch.ones(4, 8), "bias": None, "residual": None}
    with torch.no_grad():
        for _ in range(2):
            pyfused.linear(**arguments)
        with pytest.raises(error, match=message):
            pyfused.linear(**arguments | change)


def test_a_call_without_a_signature_is_not_remembered():
    class Number(float):
        pass

    x = torch.ones(1, 2, 3, 8)
    with torch.no_grad():
        for _ in range(2):
            pyfused.attention(x, x, x, scale=Number(2.0))
        with pytest.raises(TypeError, match="query is a list"):
            pyfused.attention([1.0], x, x, scale=Number(2.0))


def test_what_looks_like_a_relative_bias_is_checked():
    x, table = torch.ones(1, 2, 3, 8), torch.ones(4, 2)
    with torch.no_grad():
        for _ in range(2):
            pyfused.attention(x, x, x, relative_bias=pyfused.RelativeBias(table, True, 128))
        with pytest.raises(TypeError, match="relative_bias is a tuple"):
            pyfused.attention(x, x, x, relative_bias=(table, True, 128))
        with pytest.raises(TypeError, match="relative_bias is a Tensor"):
            pyfused.attention(x, x, x, relative_bias=table)


def test_values_that_are_checked_are_checked_again():
    x = torch.ones(1, 2, 3, 8)
    with torch.no_grad():
        for _ in range(2):
            pyfused.attention(x, x, x, cu_seqlens=torch.tensor([0, 2, 3], dtype=torch.int32), max_seqlen=2)
        with pytest.raises(ValueError, match="cu_seqlens is"):
            pyfused.attention(x, x, x, cu_seqlens=torch.tensor([0, 5, 3], dtype=torch.int32), max_seqlen=2)


def test_dropout_draws_anew():
    x = torch.ones(1, 2, 3, 8)
    with torch.no_grad():
        results = [pyfused.attention(x, x, x, dropout_p=0.5) for _ in range(4)]
    assert any(not torch.equal(results[0], r) for r in results[1:])


def test_gradients_after_a_call_without():
    x, weight = torch.randn(2, 8), torch.nn.Parameter(torch.randn(8))
    with torch.no_grad():
        for _ in range(2):
            assert not pyfused.rms_norm(x, weight).requires_grad
    pyfused.rms_norm(x, weight).sum().backward()
    assert weight.grad is not None
    with torch.inference_mode():
        assert pyfused.rms_norm(x, weight).is_inference()


@pytest.mark.parametrize("name", CALLS)
def test_gradients_as_when_every_call_is_checked(name, dtype, checks):
    """A call that autograd records also skips the checks, from the second time on."""
    call, inputs = CALLS[name], [torch.randn(2, 3, 4, 8).to(dtype) for _ in range(3)]

    def gradients(x):
        x = x.clone().requires_grad_()
        outputs = parts(call(x))
        return *outputs, *torch.autograd.grad([o.float().sin().sum() for o in outputs], x)

    expected = []
    for x in inputs:
        dispatch.forget()
        expected.append(gradients(x))
    assert len(checks) == 3
    dispatch.forget()
    actual = [gradients(x) for x in inputs]
    assert all(map(torch.equal, a, e) for a, e in zip(actual, expected, strict=True))
    if not any(word in name for word in (*CONVERTED, "mask of", "bias of")):
        assert len(checks) == 4


def test_which_inputs_want_a_gradient_may_change():
    def call(*wanting):
        inputs = [torch.randn(4, 8) for _ in range(3)]
        for i in wanting:
            inputs[i].requires_grad_()
        residual = torch.randn(4, 8)
        y, total = pyfused.rms_norm(inputs[0], inputs[1][0], residual=residual)
        assert y.requires_grad == bool({0, 1} & {*wanting})
        assert torch.equal(total, inputs[0] + residual)
        return y.grad_fn and [name is not None for name, _ in y.grad_fn.next_functions]

    assert call(0, 1) == call(0, 1)
    for wanting in ((0,), (), (1,), (0, 1), ()):
        call(*wanting)
    seen = []

    def pack(tensor):
        seen.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(0, 1)
    assert len(seen) == 3


def test_another_default_device_changes_nothing():
    x, weight = torch.ones(2, 8), torch.ones(3, 8)
    with torch.no_grad():
        for _ in range(2):
            with torch.device("meta"):
                assert torch.equal(pyfused.linear(x, weight), torch.full((2, 3), 8.0, device="cpu"))


def test_the_number_of_launches_is_bounded():
    weight = torch.ones(1)
    launches = next(o for o in dispatch.Launches.all if not o)
    with torch.no_grad():
        for n in range(1, launches.MOST + 20):
            pyfused.layer_norm(torch.ones(n, 1), weight)
    assert max(map(len, dispatch.Launches.all)) <= launches.MOST


def test_signatures():
    signature = extensions.signature()
    x = torch.ones(2, 3)
    assert signature(x, None, 1, 2.0, "a", True) == signature(torch.zeros(2, 3), None, 1, 2.0, "a", True)
    different = [
        (x,), (x.half(),), (x.bfloat16(),), (x.int(),), (x.bool(),), (x.t(),), (x[:, :2],), (x.view(3, 2),), (x.view(6),),
        (x[None],), (x, x), (), (None,), (None, None), (0,), (1,), (0.0,), (-0.0,), (1.0,), (True,), (False,), ("",),
        ("a",), ("b",), ("ab",),
        ("a", "b"), ("a" * 8,), ("a" * 9,), (-1,), (2**62,), (torch.tensor(1.0),), (torch.ones(0, 3),),
    ]  # fmt: skip
    assert len({signature(*args) for args in different}) == len(different)
    subclass = type("Subclass", (torch.Tensor,), {})
    unknown = [[1], (1,), x.to("meta"), x.to_sparse(), 2**64, 1j, object(), torch.float32, subclass(x)]
    assert [signature(value) for value in unknown] == [None] * len(unknown)
    assert signature(*[x] * 200) is None  # longer than what it keeps


def test_without_torchs_private_names():
    """The fast ways to call an operator and make a tensor use private torch names; without them the slow ways remain."""
    code = (
        "import torch; del torch._C._dynamo.guards._empty_strided_cpu\n"
        "init = torch._ops.OpOverload.__init__\n"
        "def without(self, packet, op, *args): init(self, packet, op, *args); self.kept = self.__dict__.pop('_op')\n"
        "torch._ops.OpOverload.__init__ = without\n"
        "torch._ops.OpOverload.__call__ = lambda self, /, *args, **kwargs: self.kept(*args, **kwargs)\n"
        "torch._ops.OpOverload.__hash__ = lambda self: id(self)\n"
        "import pyfused\n"
        "x, w = torch.ones(2, 8), torch.ones(3, 8)\n"
        "with torch.no_grad():\n"
        "    outputs = [pyfused.linear(x, w) for _ in range(2)]\n"
        "    outputs += [torch.ops.pyfused.linear_inference.default(x, w, None, None) for _ in range(2)]\n"
        "assert pyfused.explain('linear', x, w).backend == 'cpu'\n"
        "print([o.unique().tolist() for o in outputs])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == str([[8.0]] * 4)


def test_without_dlpack_tensors_are_asked_for_their_address():
    """Imitates a torch without a table of C functions for DLPack."""
    code = (
        "import torch; del torch.Tensor.__dlpack_c_exchange_api__; import pyfused\n"
        "x, w = torch.ones(2, 8), torch.nn.Parameter(torch.ones(3, 8))\n"
        "with torch.no_grad(): outputs = [pyfused.linear(x, w) for _ in range(2)]\n"
        "assert pyfused.explain('linear', x, w).backend == 'cpu'\n"
        "print([o.unique().tolist() for o in outputs])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[[8.0], [8.0]]"
