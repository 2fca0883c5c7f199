"""Do measurements decide which backend runs, and does a bad file do no harm?"""

import json

import pytest
import torch
from evidence_cases import empty_cache, row

import pyfused
from pyfused import dispatch, evidence
from pyfused.evidence import storage
from pyfused.ops.decode import step_of

X, W = torch.randn(16, 8), torch.randn(8, 8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    with empty_cache(tmp_path, monkeypatch) as write:
        yield write


def runs(operator, *args, **options):
    """"library" or "kernel"."""
    said = next(v.reason for v in pyfused.explain(operator, *args, **options).verdicts if v.runs)
    return "library" if "by PyTorch's own code" in said else "kernel"


def test_the_nearest_size_decides(cache):
    cache(row(**{"1": 0.5, "16": 2.0, "256": 0.5}))
    found = {rows: runs("linear", torch.randn(rows, 8), W) == "kernel" for rows in (1, 3, 5, 16, 60, 70, 5000)}
    assert found == {1: False, 3: False, 5: True, 16: True, 60: True, 70: False, 5000: False}


def test_huge_weights_go_by_large_ones_where_only_these_were_measured(cache):
    x, weight = torch.empty(4, 4096, device="meta"), torch.empty(4096, 4096, device="meta")
    shapes, size = evidence.shapes_of("linear", "forward", (x, weight, None, None))
    assert (shapes, size) == ("huge", 4)
    asked = "cpu", "linear", "forward", "cpu", torch.float32, shapes, size
    large = row(shapes="large", **{"4": 0.5})
    cache(large)
    assert "2.00 times" in evidence.slower(*asked)
    cache(large, row(shapes="huge", **{"4": 1.5}))
    assert evidence.slower(*asked) is None


@pytest.mark.parametrize("rows, expected", [(2, "decoder, narrow, few rows"), (5, "decoder, narrow, many rows")])
def test_classes_of_a_generation_step(rows, expected):
    model = pyfused.GPT2Backbone.from_preset("gpt2_tiny_en")
    plan, cache = pyfused.plan_of(model), model.new_cache(rows, 8)
    step = step_of(torch.zeros(rows, dtype=torch.int64), cache)
    assert evidence.shapes_of("decode", "forward", (plan.dtype_and_device, plan, step)) == (expected, rows)


def test_explain_names_the_line(cache):
    path = cache(row(**{"16": 0.5}))
    said = str(pyfused.explain("linear", X, W))
    assert f"plain PyTorch is 2.00 times as fast ({path.name}, 2026-01-02: float32, small, size 16, one thread)" in said
    cache(row(**{"16": 1.5}))
    assert f"1.50 times the speed of plain PyTorch ({path.name}, 2026-01-02" in str(pyfused.explain("linear", X, W))


@pytest.mark.parametrize("name, tensors", [("linear", (X, W)), ("ffn", (X, W, None, W, None)), ("gated_ffn", (X, W, W, W))])
def test_what_explain_says_is_what_runs(cache, monkeypatch, name, tensors):
    calls = []
    library = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: calls.append(1) or library(*args))
    options = {} if name == "linear" else {"activation": "relu"}
    results = []
    for speed, expected in ((0.5, "library"), (2.0, "kernel")):
        cache(row(name, **{"16": speed}))
        calls.clear()
        results.append(getattr(pyfused, name)(*tensors, **options))
        assert ("library" if calls else "kernel") == expected == runs(name, *tensors, **options)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name, tensors", [("ffn", (X, W, None, W, None)), ("gated_ffn", (X, W, W, W))])
def test_networks_go_by_the_products_where_only_these_were_measured(cache, name, tensors):
    """One's own products count before another machine's networks. A call that keeps what a gradient needs was not measured."""
    for speed, expected in ((0.5, "library"), (2.0, "kernel")):
        cache(row(**{"16": speed}))
        assert runs(name, *tensors, activation="relu") == expected
    cache(row(**{"16": 0.5}), row(name, **{"16": 2.0}))
    assert runs(name, *tensors, activation="relu") == "kernel"
    assert runs(name, X.clone().requires_grad_(), *tensors[1:], activation="relu") == "library"


def test_many_rows_by_columns_have_to_be_measured(cache, tmp_path, monkeypatch):
    """On this kind of machine: a similar kind's lines do not count, nor those of few rows."""
    columns, many, similar = W.t().contiguous().t(), "small, by columns, many rows", tmp_path / "similar.json"
    similar.write_text(json.dumps({"kind": evidence.kind(), "lines": [row(shapes=many, **{"16": 2.0})]}))
    monkeypatch.setattr(storage, "files", lambda device="cpu": [evidence.own_file(device), similar])
    for shapes, expected in (("small, by columns", "library"), (many, "kernel")):
        cache(row(shapes=shapes, **{"8": 2.0}))
        assert runs("linear", X, columns) == expected
        assert runs("ffn", X, columns, None, columns, None, activation="relu") == expected
        with pyfused.backend("cpu"):
            assert runs("linear", X, columns) == "kernel"


def test_the_reference_runs_what_a_faster_backend_has_not(cache):
    cache(row(dtype="float64", **{"16": 2.0}))
    said = pyfused.explain("linear", X.double(), W.double())
    assert said.backend == "reference"
    with pyfused.backend("reference", strict=True):
        pyfused.linear(X, W)


def test_a_forced_backend_ignores_what_is_faster(cache, monkeypatch):
    cache(row(**{"16": 0.5}))
    assert runs("linear", X, W) == "library"
    with pyfused.backend("cpu"):
        assert runs("linear", X, W) == "kernel"
    monkeypatch.setenv("PYFUSED_BACKEND", "cpu")
    dispatch._forced_by_environment.cache_clear()
    try:
        assert runs("linear", X, W) == "kernel"
    finally:
        monkeypatch.undo()
        dispatch._forced_by_environment.cache_clear()


@pytest.mark.parametrize("residual", [None, X * 2])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_norms_run_on_torch_where_that_is_faster(cache, name, residual):
    function, weight = getattr(pyfused, name), W[0]
    expected = function(X, weight, residual=residual)
    cache(row(name, shapes="plain", **{"1": 0.5}), row(name, shapes="residual", **{"1": 0.5}))
    torch.testing.assert_close(function(X, weight, residual=residual), expected)
    torch.testing.assert_close(torch.compile(function, fullgraph=True)(X, weight, residual=residual), expected)
    assert runs(name, X, weight, residual=residual) == "library"


def test_threads(cache):
    cache(row(threads=1, **{"16": 0.5}), row(threads=2, **{"16": 2.0}))
    assert runs("linear", X, W) == "library"
    torch.set_num_threads(2)
    try:
        assert runs("linear", X, W) == "kernel"
    finally:
        torch.set_num_threads(1)


def test_a_launch_follows_the_number_of_threads(cache, monkeypatch):
    """A launch prepared for another number of threads must not stay. If the lines agree, one launch serves all numbers."""
    calls = []
    library = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: calls.append(1) or library(*args))
    cache(row(threads=1, **{"16": 0.5, "1": 2.0}), row(threads=2, **{"16": 2.0, "1": 3.0}))

    def by_library(x, threads):
        torch.set_num_threads(threads)
        calls.clear()
        pyfused.linear(x, W)
        return bool(calls)

    try:
        with torch.no_grad():
            found = [by_library(X, threads) for threads in (1, 1, 2, 2, 1, 3, 1)]
            assert found == [True, True, False, False, True, False, True]
            assert [by_library(X[:1], threads) for threads in (1, 1, 2, 1)] == [False] * 4
    finally:
        torch.set_num_threads(1)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Dispatch treats CPU tensors as GPU tensors; returns a function that sets this GPU's evidence lines."""
    monkeypatch.setitem(dispatch.PREFERENCES, "cpu", dispatch.PREFERENCES["cuda"])

    def use(speeds, operator="layer_norm", shapes="plain"):
        about = {"operator": operator, "function": "forward", "dtype": "float32", "shapes": shapes, "date": "2026-01-02"}
        speed = {name: {"1024": value} for name, value in (speeds or {}).items()}
        found = (evidence.line_from({**about, "speed": speed}, "gpu.json"),) if speeds else ()
        monkeypatch.setattr(evidence, "lines", lambda device="cpu": found)
        dispatch.forget()

    return use


gpu_order = pytest.mark.parametrize(
    "speeds, order",
    [
        (None, ["triton", "cuda", "reference"]),
        ({"triton": 1.3}, ["triton", "reference", "cuda"]),
        ({"triton": 1.3, "cuda": 1.5}, ["cuda", "triton", "reference"]),
        ({"triton": 0.8, "cuda": 0.9}, ["reference", "cuda", "triton"]),
        ({"triton": 0.8, "cuda": 1.1}, ["cuda", "reference", "triton"]),
        ({"cuda": 0.7}, ["triton", "reference", "cuda"]),
        ({"cuda": 1.2}, ["cuda", "triton", "reference"]),
        ({"triton": 0.0, "cuda": 1.2}, ["cuda", "reference", "triton"]),
        ({"triton": 0.0}, ["reference", "triton", "cuda"]),
        ({"triton": 0.9, "reference": 0.5}, ["triton", "reference", "cuda"]),
    ],
)


@gpu_order
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_the_order_of_a_gpu_is_what_was_measured(on_a_gpu, name, speeds, order):
    on_a_gpu(speeds, operator=name)
    x, weight = torch.randn(4, 256), torch.randn(256)
    explained = pyfused.explain(name, x, weight)
    assert explained.backend == order[0]
    others = "cpu", "cudnn", "gluon"  # none of them is for a GPU's norms
    assert [verdict.backend for verdict in explained.verdicts if verdict.backend not in others] == order
    if speeds:
        assert "gpu.json, 2026-01-02: float32, plain, size 1024" in str(explained)
    if "cuda" not in (speeds or {}):
        assert "unproven on this device" in str(explained)
    chosen = dispatch.choose(name, "forward", pyfused.ops.MODULES[name].bind(x, weight))
    assert chosen is dispatch.kernel(order[0], name).forward


def test_the_fastest_that_has_the_case_runs(on_a_gpu, monkeypatch):
    on_a_gpu({"triton": 1.2, "cuda": 1.5})
    monkeypatch.setattr(dispatch.kernel("cuda", "layer_norm"), "unsupported_forward", lambda *args: "no", raising=False)
    dispatch.forget()
    said = pyfused.explain("layer_norm", X, W[0])
    assert said.backend == "triton"
    assert [v.backend for v in said.verdicts][:3] == ["cuda", "triton", "reference"]


def test_evidence_of_another_class_proves_nothing(on_a_gpu):
    on_a_gpu({"cuda": 3.0, "triton": 0.5}, shapes="residual")
    assert pyfused.explain("layer_norm", X, W[0]).backend == "triton"
    assert pyfused.explain("layer_norm", X, W[0], residual=X).backend == "cuda"
    assert pyfused.explain("layer_norm", X.half(), W[0].half(), residual=X.half()).backend == "triton"


def test_a_forced_backend_comes_first_whatever_was_measured(on_a_gpu):
    on_a_gpu({"triton": 0.5, "cuda": 3.0})
    with pyfused.backend("triton"):
        assert pyfused.explain("layer_norm", X, W[0]).backend == "triton"
    assert pyfused.explain("layer_norm", X, W[0]).backend == "cuda"


def attend(sq, d=64, hkv=4, **options):
    query, key = torch.randn(2, 4, sq, d), torch.randn(2, hkv, 32, d)
    return evidence.shapes_of("attention", "forward", pyfused.ops.MODULES["attention"].bind(query, key, key, **options))


def test_classes_of_attention():
    assert attend(1) == ("few queries, D 64", 2 * 4 * 32)
    assert attend(16)[0] == "few queries, D 64"
    assert attend(16, hkv=2)[0] == attend(17)[0] == "many queries, D 64"
    assert [attend(32, d)[0] for d in (8, 80, 129)] == [f"many queries, D {d}" for d in (64, 128, 256)]
    table = pyfused.RelativeBias(torch.randn(32, 4), True, 128)
    assert attend(32, relative_bias=table)[0] == "many queries, D 64, relative bias"
    assert attend(32, attn_bias=torch.randn(32, 32))[0] == "many queries, D 64, dense bias"


@pytest.mark.parametrize("name", ["attention", "ffn", "gated_ffn", "layer_norm", "rms_norm", "relative_bias"])
def test_backwards_have_classes_too(monkeypatch, name):
    """The class follows from the arguments that autograd passes."""
    import operator_calls

    asked = []
    judged = dispatch.judged
    monkeypatch.setattr(dispatch, "judged", lambda *call: asked.append(call) or judged(*call))
    call = next(call for call in operator_calls.CALLS if call.startswith(name))
    if name in ("layer_norm", "rms_norm"):
        operator_calls.prepared(call, "cpu", torch.float32)()
    else:
        tensors = {
            "attention": [torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(3)],
            "ffn": [torch.randn(8, 8, requires_grad=True) for _ in range(2)] + [None, torch.randn(8, 8), None],
            "gated_ffn": [torch.randn(8, 8, requires_grad=True) for _ in range(4)],
            "relative_bias": [torch.randn(8, 2, requires_grad=True), 4, 4],
        }[name]
        options = {"ffn": {"activation": "relu"}, "gated_ffn": {"activation": "relu"}, "relative_bias": {"bidirectional": True}}
        with pyfused.backend("triton"):
            getattr(pyfused, name)(*tensors, **options.get(name, {})).sum().backward()
    functions = {(operator, function) for operator, function, _ in asked if operator == name}
    assert (name, "backward") in functions
    for operator, function, args in asked:
        if operator == name:
            shapes, size = evidence.shapes_of(operator, function, args)
            assert shapes
            assert size > 0


def test_own_file_before_shipped_ones_line_by_line(cache):
    """Lines that the user's own file lacks come from the next file."""
    before = {line[:5]: line for line in evidence.lines()}
    assert before
    cache(row(**{"16": 123.0}))
    after = {line[:5]: line for line in evidence.lines()}
    assert after["linear", "forward", "float32", "small", 1].speed == {"cpu": {16: 123.0}}
    assert {key for key in before if key[3] != "small"} <= set(after)


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"kind": "cpu_of_another_kind", "lines": []}', "it is about 'cpu_of_another_kind'"),
        (json.dumps({"lines": []}), "KeyError: 'kind'"),
        ("\0" * 100, "JSONDecodeError"),
    ],
)
def test_a_damaged_or_foreign_file_is_named_and_left_out(cache, text, said):
    expected = runs("linear", X, W)
    path = cache(text=text)
    with pytest.warns(RuntimeWarning, match=f"{path}.*{said}"):
        assert runs("linear", X, W) == expected


@pytest.mark.parametrize("speed", [{}, {"0": 1.0}, {"16": -1.0}, {"16": float("nan")}, {"16": "fast"}, {"many": 1.0}])
def test_a_line_that_makes_no_sense_leaves_the_file_out(cache, speed):
    cache(row(**speed))
    with pytest.warns(RuntimeWarning, match="its lines are ignored"):
        evidence.lines()


def test_a_processor_that_multiplies_matrices_is_another_kind(monkeypatch):
    """A virtual machine may have AVX512_BF16 alone, on the same chip."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    kinds = []
    for has_it in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_it=has_it: has_it)
        dispatch.forget()
        kinds.append(evidence.kind())
        assert "cpu_bfloat16.json" in {path.name for path in evidence.files()}
    assert kinds[1] == f"{kinds[0]}_amx"


def test_shipped_files_are_whole():
    found = list(evidence.SHIPPED.glob("*.json"))
    assert {"cpu_amd_avx2.json", "cpu_amd_baseline_torch_avx2.json", "cpu_bfloat16.json"} <= {path.name for path in found}
    for path in found:
        content = json.loads(path.read_text())
        assert content["kind"]
        assert [evidence.line_from(line, path.name) for line in content["lines"]] or content["tiles"]


@pytest.mark.parametrize("name, capability", [("NVIDIA H100 80GB HBM3", (9, 0)), ("NVIDIA A100-SXM4-80GB", (8, 0))])
def test_every_hopper_chip_goes_by_what_one_showed(monkeypatch, tmp_path, name, capability):
    monkeypatch.setenv("PYFUSED_EVIDENCE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    dispatch.forget()
    speed = evidence.rank("cuda:0", "attention", "forward", torch.bfloat16, "many queries, D 64", 1 << 26)
    monkeypatch.undo()
    dispatch.forget()
    assert (speed.get("cudnn", 0.0) > speed.get("triton", 0.0)) == (capability == (9, 0))
