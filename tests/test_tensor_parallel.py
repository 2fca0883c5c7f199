"""Do models spread over several processes compute what one process computes, each with its share of the memory?"""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import parallel_processes as processes
import parallel_transformers
import pytest
import torch
import torch.distributed as dist
from compiled_cases import FAMILIES, backbone, inputs, loss_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

import pyfused
from pyfused import Tokenizer, notices
from pyfused.checkpoints import open_checkpoint
from pyfused.checkpoints.save import save_hf
from pyfused.models import Backbone
from pyfused.notices import FallbackWarning
from pyfused.testing.tolerance import assert_close

ROOT = Path(__file__).resolve().parents[1]


# ---- four processes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "parallel_processes.py", folder],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(processes.RANKS)]


def one_process(name, dtype=torch.float32):
    """Outputs, gradients and the parameters after a step."""
    model = backbone(name, dtype).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=processes.RATE)
    out = model(inputs(name, 4, 9))
    loss_of(out).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    out = out if isinstance(out, dict) else {"states": out}
    return {"out": {n: t.detach() for n, t in out.items()}, "grads": grads, "after": model.state_dict()}


def assert_same(found, plain, truth, rows=slice(None)):
    assert found.keys() == plain.keys()
    for name in plain:
        assert_close(found[name], plain[name][rows], truth[name][rows].double(), name)


@pytest.mark.parametrize("case", processes.STEPS)
def test_a_step_is_that_of_one_process(ranks, case):
    kind, name = case.split(":")
    plain, truth = one_process(name), one_process(name, torch.float64)
    for rank, found in enumerate(ranks):
        found = found[case]
        assert found["plain"]
        assert_same(found["out"], plain["out"], truth["out"], processes.rows_of(kind, rank))
        assert_same(found["grads"], plain["grads"], truth["grads"])
    assert_same(ranks[0][case]["after"], plain["after"], truth["after"])
    assert not ranks[1][case]["after"]


@pytest.mark.parametrize("case", processes.STEPS)
def test_each_rank_holds_its_share(ranks, case):
    """Of what tensor parallelism copies (norms, positions, small projections) a rank holds all; fully_shard divides it."""
    kind, name = case.split(":")
    model = backbone(name)
    whole = sum(p.nbytes for p in model.parameters())
    inside = ("attention.", "feed_forward.", "token_embedding.")
    spread = sum(p.nbytes for n, p in model.named_parameters() if any(part in n for part in inside))
    tensor, data = {"tp2": (2, 1), "tp4": (4, 1), "fsdp": (1, 4), "2d": (2, 2)}[kind]
    share = (spread / tensor + whole - spread) / data
    for found in ranks:
        assert found[case]["bytes"] <= 1.05 * share


@pytest.mark.parametrize("case", processes.TOKENS)
def test_generated_tokens_are_those_of_one_process(ranks, case):
    expected = processes.generated(pyfused.Generator(backbone(case.split(":")[1])))
    for found in ranks:
        assert found[f"tokens {case}"] == expected


def test_collected_states_have_all_heads(ranks):
    def call(dtype):
        given = inputs("gpt2", 2, 7) | {"attention_mask": processes.masks()}
        return backbone("gpt2", dtype).train()(given, return_attentions=True, return_hidden_states=True)

    plain, truth = call(torch.float32), call(torch.float64)
    for found in ranks:
        found = found["states"]
        for name, own, exact in (
            ("attentions", plain.attentions, truth.attentions),
            ("hidden_states", plain.hidden_states, truth.hidden_states),
            ("out", [plain.last_hidden_state], [truth.last_hidden_state]),
        ):
            got = [found[name]] if name == "out" else found[name]
            assert len(got) == len(own)
            for one, other, third in zip(got, own, exact):
                assert_close(one.detach(), other.detach(), third.detach(), name)


@pytest.mark.parametrize("case", processes.FUSED)
def test_fused_transformers_models_take_torchs_own_plan(ranks, case):
    name = case.split(":")[1]
    model = parallel_transformers.model_of(name).eval()
    plain = parallel_transformers.call(model, name).detach()
    prompt = parallel_transformers.IDS[:1, :4]
    tokens = model.generate(prompt, max_new_tokens=5, do_sample=False) if name == "gpt2" else None
    truth = parallel_transformers.call(model.double(), name).detach()
    for found in ranks:
        out, generated = found[f"fused {case}"]
        assert_close(out, plain, truth)
        assert tokens is None or torch.equal(generated, tokens)


def test_operators_take_dtensors(ranks):
    for found in ranks:
        found = found["operators"]
        x, w = found["x"], found["w"]
        torch.testing.assert_close(found["linear"], x @ w.t())
        torch.testing.assert_close(found["rms_norm"], torch.nn.functional.rms_norm(x, (8,), w[0], 1e-6))
        torch.testing.assert_close(found["grad"], x.sum(0).expand(6, 8))


# ---- one of several ranks, the others simulated --------------------------------------------------------------------------


@contextmanager
def simulated(rank, ranks, *shape):
    """A mesh on which collectives do nothing."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    _clear_sharding_prop_cache()  # it holds the last rank's sizes

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield init_device_mesh("cpu", shape or (ranks,), mesh_dim_names=("dp", "tp")[-len(shape or (1,)) :])
    finally:
        dist.destroy_process_group()


def parts(model):
    return {name: p.to_local() for name, p in model.named_parameters()}


@pytest.fixture(scope="module", params=[*FAMILIES, "keras"])
def preset(request, tmp_path_factory):
    """A checkpoint in Hugging Face format, or GPT-2 in Keras's, whose matrices are transposed and split into heads."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param != "keras":
        save_hf(backbone(request.param), folder)
        return folder
    sys.path.insert(0, str(ROOT / "tests" / "checkpoints"))
    try:
        import test_memory
    finally:
        sys.path.pop(0)
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"vocabulary_size": 61, "num_layers": 2, "num_heads": 4, "hidden_dim": 24, "intermediate_dim": 40}
        patch.setattr(test_memory, "POSITIONS", 48)
        test_memory.write_keras(folder, sizes)
    return folder


@pytest.mark.parametrize("rank, count", [(1, 2), (2, 4)])
def test_a_rank_reads_its_own_part(preset, rank, count):
    """torch's own distribution of the whole model gives the same parts."""
    whole = Backbone.from_preset(preset)
    with simulated(rank, count) as mesh:
        model = Backbone.from_preset(preset, mesh=mesh)
        assert type(model) is type(whole)
        parallelize_module(whole, mesh, whole.tensor_parallel_plan(), src_data_rank=None)
        expected, found = parts(whole), parts(model)
    assert found.keys() == expected.keys()
    for name, part in expected.items():
        assert torch.equal(found[name], part), name


@pytest.mark.parametrize("preset", ["t5", "keras"], indirect=True)
@pytest.mark.parametrize("kind, rank", [("fsdp", 1), ("2d", 3)])
def test_load_into_fills_what_fully_shard_left(preset, kind, rank):
    """On the meta device first, as large models are made; the weights come last."""

    def wrapped(model, mesh):
        if kind == "2d":
            parallelize_module(model, mesh["tp"], model.tensor_parallel_plan(), src_data_rank=None)
        for block in model.blocks():
            fully_shard(block, mesh=mesh["dp"])
        return fully_shard(model, mesh=mesh["dp"])

    checkpoint = open_checkpoint(preset)
    whole = Backbone.from_preset(preset)
    with simulated(rank, 4, *((2, 2) if kind == "2d" else (4, 1))) as mesh:
        expected = parts(wrapped(whole, mesh))
        with torch.device("meta"):
            model = type(whole)(**checkpoint.config)
        model = wrapped(model, mesh).to_empty(device="cpu")
        checkpoint.load_into(model)
        found = parts(model)
    for name, part in expected.items():
        assert torch.equal(found[name], part), name


def test_what_does_not_fit_is_refused_before_anything_changes():
    with simulated(0, 3) as mesh:
        for name, message in (("gpt2", "num_heads is 4; .* 3 ranks"), ("fnet", "intermediate_dim is 40")):
            model = backbone(name)
            with pytest.raises(ValueError, match=message):
                parallelize_module(model, mesh, model.tensor_parallel_plan())
            assert all(type(p) is torch.nn.Parameter for p in model.parameters())
    with simulated(0, 4, 2, 2) as mesh:
        model = backbone("gpt2")
        with pytest.raises(ValueError, match=r"2 dimensions; it takes one, such as mesh\['tp'\]"):
            parallelize_module(model, mesh, model.tensor_parallel_plan())
        parallelize_module(model, mesh["tp"], model.tensor_parallel_plan(), src_data_rank=None)
        with pytest.raises(ValueError, match="spread over a mesh already"):
            parallelize_module(model, mesh["tp"], model.tensor_parallel_plan())
        with pytest.raises(ValueError, match="int8 takes a model on one device"):
            pyfused.quantize_(model)
        with pytest.raises(ValueError, match="seed is None"):
            pyfused.Generator(model).generate([[1]], 2, temperature=1.0)
        notices._said.clear()
        with pytest.warns(FallbackWarning, match="generation calls its modules"):
            pyfused.plan_of(model)
        quantized = backbone("gpt2")
        pyfused.quantize_(quantized)
        with pytest.raises(ValueError, match="int8 weights; it takes floats"):
            parallelize_module(quantized, mesh["tp"], quantized.tensor_parallel_plan())
        with pytest.raises(ValueError, match="fully_shard gathers its weights"):
            pyfused.Generator(fully_shard(backbone("gpt2"), mesh=mesh["dp"]))
        for options, message in (
            ({"load_weights": False}, "mesh is given and load_weights is False"),
            ({"device": "meta"}, "the mesh is of cpu devices"),
        ):
            with pytest.raises(ValueError, match=message):
                Backbone.from_preset("gpt2_tiny_en", mesh=mesh["tp"], **options)
        with pytest.raises(TypeError, match="mesh is a str"):
            Backbone.from_preset("gpt2_tiny_en", mesh="tp")


def test_mixed_dtypes_on_a_mesh():
    """float32 parameters, computation in bfloat16, with one rounding more where a bias is added behind the sum."""
    with simulated(0, 1) as mesh:
        one = Backbone.from_preset("gpt2_tiny_en", dtype="mixed_bfloat16")
        model = Backbone.from_preset("gpt2_tiny_en", dtype="mixed_bfloat16", mesh=mesh)
        ids = torch.arange(10).view(2, 5)
        found, expected = (m(token_ids=ids, padding_mask=None).detach() for m in (model, one))
    exact = Backbone.from_preset("gpt2_tiny_en", dtype="float64")
    assert next(model.parameters()).dtype == torch.float32
    assert found.dtype == torch.bfloat16
    assert_close(found, expected, exact(token_ids=ids, padding_mask=None).detach())


def test_the_example_runs_with_torchrun():
    """Two processes write what one writes."""
    script = ROOT / "examples" / "tensor_parallel.py"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            script,
            "--tokens",
            "8",
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    tokenizer, model = Tokenizer.from_preset("gpt2_tiny_en"), Backbone.from_preset("gpt2_tiny_en")
    (tokens,) = pyfused.Generator(model).generate([tokenizer.encode("In the beginning")], 8)
    first, _, text = done.stdout.partition("\n")
    assert first.startswith("rank 0 of 2 holds ")
    assert text.strip() == tokenizer.decode(tokens).strip()
