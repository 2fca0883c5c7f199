"""Does attention give cuDNN the calls that it takes, as it takes them, and keep what it would get wrong? Without a GPU a
stand-in (tests/cudnn_on_cpu.py) takes the calls of torch's operators."""

import cudnn_on_cpu
import pytest
import torch
from attention_cases import plain
from draws import check

import pyfused
from pyfused import dispatch, evidence, extensions
from pyfused.arguments import AttentionForward
from pyfused.ops.explain import verdicts
from pyfused.testing import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("query", "key", "value")
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def cudnn(monkeypatch):
    """Dispatch treats CPU tensors as GPU tensors, and the stand-in is cuDNN."""
    if DEVICE == "cuda":
        if dispatch.missing("cudnn"):
            pytest.skip(dispatch.missing("cudnn"))
        yield
        return
    monkeypatch.setitem(dispatch.PREFERENCES, "cpu", dispatch.PREFERENCES["cuda"])
    with cudnn_on_cpu.installed():
        yield
        monkeypatch.undo()


def stored(order, *shape, dtype=HALF):
    """A random (B, H, S, D) tensor: "bshd" and so on in memory; "qkv" is the middle third of a projection."""
    b, h, s, d = shape
    if order == "qkv":
        return torch.randn(b, s, 3, h, d, device=DEVICE).to(dtype)[:, :, 1].transpose(1, 2)
    sizes = dict(zip("bhsd", shape))
    t = torch.randn([sizes[letter] for letter in order], device=DEVICE).to(dtype)
    return t.permute([order.index(letter) for letter in "bhsd"])


# sizes (B, H, Hkv, Sq, Sk, D), how query and then key and value are stored, options
CASES = [
    ((2, 4, 4, 20, 36, 16), "bshd", "bshd", {}),
    ((2, 4, 4, 20, 20, 8), "qkv", "qkv", {"is_causal": True}),
    ((2, 4, 2, 24, 17, 24), "bhsd", "bhsd", {"scale": 0.3}),
    ((1, 3, 1, 130, 130, 64), "sbhd", "bhsd", {"is_causal": True}),
    ((3, 1, 1, 2, 2, 8), "bhsd", "bshd", {"is_causal": True, "scale": -0.4}),
]


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("sizes, of_query, of_key, options", CASES)
def test_values_and_gradients(sizes, of_query, of_key, options, half):
    b, h, hkv, sq, sk, d = sizes
    options = {"is_causal": False, "scale": None, **options}

    def once():
        orders, shapes = (of_query, of_key, of_key), ((b, h, sq, d), (b, hkv, sk, d), (b, hkv, sk, d))
        inputs = [stored(order, *shape, dtype=half) for order, shape in zip(orders, shapes)]
        cotangent, found = stored("bhsd", b, h, sq, d, dtype=half), []
        for call in ("own", "plain", "logarithm", "double"):
            leaves = [t.double() if call == "double" else t.detach() for t in inputs]
            leaves = [t.requires_grad_() for t in leaves]
            if call == "own":
                out = pyfused.attention(*leaves, **options)
                assert out.transpose(1, 2).is_contiguous()
            else:
                out = plain(dict(zip(NAMES, leaves)), options, logarithm=call == "logarithm")
            grads = torch.autograd.grad(out, leaves, cotangent.to(out.dtype))
            found.append((out.detach(), *grads))
        own, by_softmax, by_logarithm, truth = found
        names = ("output", *(f"gradient of {name}" for name in NAMES))
        return {n: (o, [p, q], t) for n, o, p, q, t in zip(names, own, by_softmax, by_logarithm, truth, strict=True)}

    with pyfused.backend("cudnn", strict=True):
        check(once)
    if DEVICE == "cpu":
        assert cudnn_on_cpu.calls[:2] == [cudnn_on_cpu.FORWARD, cudnn_on_cpu.BACKWARD]


def test_without_a_gradient_no_log_sum_exp_is_asked_for():
    tensors = [stored("bshd", 2, 2, 16, 8) for _ in NAMES]
    with pyfused.backend("cudnn", strict=True), torch.no_grad():
        out = pyfused.attention(*tensors)
        assert torch.equal(out, torch.ops.pyfused.attention_inference(*pyfused.ops.MODULES["attention"].bind(*tensors)))
    inputs = dict(zip(NAMES, tensors))
    options = {"is_causal": False, "scale": None}
    assert_close(out, plain(inputs, options), plain({k: t.double() for k, t in inputs.items()}, options), "cudnn")


@pytest.mark.parametrize("forward, backward", [("cudnn", "reference"), ("reference", "cudnn")])
def test_backends_share_their_log_sum_exps(forward, backward):
    """One backend's forward may be followed by another's backward."""
    tensors = [stored("bshd", 2, 2, 33, 16) for _ in NAMES]
    args = pyfused.ops.MODULES["attention"].bind(*tensors, is_causal=True)._replace(save=True)
    grad = stored("bshd", 2, 2, 33, 16)
    found = {}
    for first, second in ((forward, backward), ("reference", "reference")):
        out, lse = dispatch.kernel(first, "attention").forward(*args)
        assert lse.shape == (2, 2, 33)
        call = args.backward(grad, out, lse, wants_bias=False, wants_table=False)
        found[first, second] = dispatch.kernel(second, "attention").backward(*call)[:3]
    mixed, plainly = found.values()
    for a, b in zip(mixed, plainly, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


Q, K = (2, 2, 16, 8), (2, 2, 24, 8)
REFUSED = {
    "bias by distance": lambda: (
        Q,
        K,
        {"relative_bias": pyfused.RelativeBias(torch.randn(32, 2, device=DEVICE), True)},
    ),
    "dense bias": lambda: (Q, K, {"attn_bias": torch.zeros(16, 24, dtype=HALF, device=DEVICE)}),
    "padding": lambda: (Q, K, {"padding_mask": torch.ones(2, 24, device=DEVICE)}),
    "packed": lambda: ((1, 2, 16, 8),) * 2 + ({"cu_seqlens": torch.tensor([0, 9, 16], device=DEVICE)},),
    "dropout": lambda: (Q, K, {"dropout_p": 0.5}),
    "top left": lambda: (Q, K, {"is_causal": True}),
    "one query": lambda: ((2, 2, 1, 8), K, {"is_causal": True}),
    "one key": lambda: (Q, (2, 2, 1, 8), {}),
    "multiple of 8": lambda: ((2, 2, 16, 12), (2, 2, 24, 12), {}),
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_cudnn_gets_wrong_runs_elsewhere_and_explain_says_why(word):
    of_query, of_key, options = REFUSED[word]()
    tensors = [stored("bshd", *shape) for shape in (of_query, of_key, of_key)]
    with pyfused.backend("cudnn"):
        said = pyfused.explain("attention", *tensors, **options)
        assert word in next(v.reason for v in said.verdicts if v.backend == "cudnn")
        assert said.backend != "cudnn"
    with pyfused.backend("cudnn", strict=True), pytest.raises(pyfused.BackendError, match=word):
        pyfused.attention(*tensors, **options)


def refusal(query, key, value, function="forward"):
    args = pyfused.ops.MODULES["attention"].bind(query, key, value)
    if function == "backward":
        args = args.backward(query, query, query[..., 0].float(), wants_bias=False, wants_table=False)
    with pyfused.backend("cudnn"):
        return next(v.reason for v in verdicts("attention", function, args) if v.backend == "cudnn")


def test_tensors_in_places_that_a_graph_does_not_expect():
    good = stored("bshd", *K)
    assert "forced" in refusal(good, good, good)
    shifted = torch.randn(2 * 2 * 24 * 8 + 1, device=DEVICE).to(HALF)[1:].view(2, 24, 2, 8).transpose(1, 2)
    narrow = torch.randn(2, 24, 2, 9, device=DEVICE).to(HALF)[..., :8].transpose(1, 2)
    expanded = good[:, :1].expand(K)
    for odd in (shifted, narrow, expanded):
        assert "aligned" in refusal(good, odd, good)
    many = torch.zeros(1, 1, 2, 8, dtype=HALF, device=DEVICE).expand(70_000, 1, 2, 8)
    assert "65535" in refusal(many, many, many)
    assert "float32" in refusal(good.float(), good.float(), good.float())


def test_a_gradient_of_wide_heads_is_refused():
    wide = stored("bshd", 1, 2, 16, 136)
    assert "head size above 128" in refusal(wide, wide, wide, "backward")
    narrow = stored("bshd", 1, 2, 16, 128)
    assert "forced" in refusal(narrow, narrow, narrow, "backward")


@pytest.fixture
def asked(monkeypatch):
    """torch's settings can be changed, and torch answers by them. Returns what it was asked."""
    questions, wants = [], torch.backends.cuda.cudnn_sdp_enabled
    repeatable = torch.are_deterministic_algorithms_enabled, torch.is_deterministic_algorithms_warn_only_enabled

    def answer(params):
        questions.append(params)
        return wants() and not (repeatable[0]() and not repeatable[1]())

    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", answer)
    yield questions
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.use_deterministic_algorithms(False)


def test_torch_has_the_last_word(asked):
    """About the GPU, cuDNN's version, and what the user switched off; asked anew after each change of a setting."""
    tensors = stored("bshd", 2, 4, 16, 8), *[stored("bshd", 2, 2, 16, 8) for _ in range(2)]
    with pyfused.backend("cudnn", strict=True):
        for _ in range(3):
            pyfused.attention(*tensors, is_causal=True)
        assert len(asked) == 1
        torch.backends.cuda.enable_cudnn_sdp(False)
        with pytest.raises(pyfused.BackendError, match="debug=True"):
            pyfused.attention(*tensors, is_causal=True)
    for params in asked:
        assert (params.dropout, params.attn_mask, params.is_causal, params.enable_gqa) == (0.0, None, True, True)
        assert [t.shape for t in (params.query, params.key, params.value)] == [t.shape for t in tensors]


@pytest.mark.skipif(DEVICE == "cuda", reason="the stand-in counts its calls")
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    "switch",
    [
        lambda on: torch.backends.cuda.enable_cudnn_sdp(on),
        lambda on: torch.use_deterministic_algorithms(not on),
        lambda on: torch.use_deterministic_algorithms(True, warn_only=on),
    ],
    ids=["enable_cudnn_sdp", "deterministic", "warn_only"],
)
def test_a_setting_that_changes_is_seen_by_the_next_call(asked, switch, gradient):
    """In both directions, with prepared launches for both answers, also in the backward and in the registered operator."""
    leaves = [stored("bshd", 2, 2, 16, 8).requires_grad_(gradient) for _ in NAMES]
    wanted = [cudnn_on_cpu.FORWARD, cudnn_on_cpu.BACKWARD][: 1 + gradient]

    def ran():
        cudnn_on_cpu.calls.clear()
        out = pyfused.attention(*leaves)
        if gradient:
            torch.autograd.grad(out.sum(), leaves)
        else:
            torch.ops.pyfused.attention_inference(*pyfused.ops.MODULES["attention"].bind(*leaves))
        return cudnn_on_cpu.calls[: 1 + gradient], len(cudnn_on_cpu.calls)

    with pyfused.backend("cudnn"), torch.set_grad_enabled(gradient):
        for on in (True, True, False, False, True, True):
            switch(on)
            assert ran() == ((wanted, 2) if on else ([], 0))


def test_a_launch_reads_settings_only_where_they_decide(monkeypatch):
    """cuDNN takes no padding, whatever they are."""
    tensors, mask = [stored("bshd", 2, 2, 16, 8) for _ in NAMES], torch.ones(2, 16, dtype=torch.bool, device=DEVICE)
    read, module = [], dispatch.kernel("cudnn", "attention")
    original = module.settings
    monkeypatch.setattr(module, "settings", lambda: read.append(1) or original())
    dispatch.forget()
    with pyfused.backend("cudnn"), torch.no_grad():
        for _ in range(3):
            pyfused.attention(*tensors, padding_mask=mask)
        assert not read
        for _ in range(3):
            pyfused.attention(*tensors)
        assert len(read) >= 3


def test_another_order_of_log_sum_exps_is_refused(monkeypatch):
    good = stored("bshd", *Q)
    monkeypatch.setenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "1")
    assert "AVOID_RECOMPILE" in refusal(good, good, good)
    monkeypatch.setenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "0")
    assert "forced" in refusal(good, good, good)


@pytest.mark.parametrize(
    "speeds, function, runs",
    [
        ({}, "forward", "triton"),
        ({"triton": 1.2}, "forward", "triton"),
        ({"triton": 1.2, "cudnn": 1.5}, "forward", "cudnn"),
        ({"triton": 1.2, "cudnn": 1.5}, "backward", "cudnn"),
        ({"triton": 1.2, "cudnn": 1.1}, "forward", "triton"),
        ({"triton": 1.2, "cudnn": 0.0}, "forward", "triton"),
        ({"triton": 0.8, "cudnn": 0.9}, "forward", "reference"),
    ],
)
def test_evidence_chooses(monkeypatch, speeds, function, runs):
    """cuDNN runs where it was measured right and fastest, and only there."""
    about = {
        "operator": "attention",
        "function": function,
        "dtype": "bfloat16",
        "shapes": "many queries, D 64",
        "date": "2026-01-02",
    }
    by_size = {name: {"1024": speed} for name, speed in speeds.items()}
    found = (evidence.line_from({**about, "speed": by_size}, "gpu.json"),) if speeds else ()
    monkeypatch.setattr(evidence, "lines", lambda device=DEVICE: found)
    dispatch.forget()
    tensors = [stored("bshd", 1, 2, 24, 16) for _ in NAMES]
    args: AttentionForward = pyfused.ops.MODULES["attention"].bind(*tensors)
    if function == "backward":
        args = args.backward(
            tensors[0], tensors[0], torch.zeros(1, 2, 24, device=DEVICE), wants_bias=False, wants_table=False
        )
    said = {v.backend: v for v in verdicts("attention", function, args)}
    assert [name for name, verdict in said.items() if verdict.runs] == [runs]
    assert ("gpu.json, 2026-01-02" in said["cudnn"].reason) == (speeds.get("cudnn", 0) > 0)
    assert ("unproven on this device" in said["cudnn"].reason) == (not speeds.get("cudnn"))
    assert dispatch.choose("attention", function, args) is getattr(dispatch.kernel(runs, "attention"), function)
    padded = args._replace(padding_mask=torch.ones(1, 24, dtype=torch.bool, device=DEVICE))
    assert next(v.backend for v in verdicts("attention", function, padded) if v.runs) != "cudnn"


@pytest.mark.parametrize(
    "gpu, cuda, cudnn, said",
    [
        (False, None, False, "no CUDA device"),
        (True, None, True, "this torch has no cuDNN"),
        (True, "13.0", False, "this torch has no cuDNN"),
        (True, "12.8", True, "built for CUDA 12.8; torch trusts cuDNN's attention from 12.9 on"),
        (True, "12.9", True, ""),
        (True, "13.0", True, ""),
    ],
)
def test_a_torch_without_cudnn_says_so(monkeypatch, gpu, cuda, cudnn, said):
    monkeypatch.setattr(extensions, "_emulated_cudnn", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: cudnn)
    assert said in extensions.cudnn_missing()
    assert bool(said) == bool(extensions.cudnn_missing())
