"""Do pyfused models and fused models train with PyTorch's usual tools?

Checkpointing, accumulation, functional_call, copies and pickles, autocast with a GradScaler, accelerate, DDP and FSDP2; and
the memory that the backward needs.
"""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training_processes
from compiled_cases import FAMILIES, backbone, gradients, inputs, results
from torch.utils.checkpoint import checkpoint

import pyfused
from pyfused.testing.tolerance import assert_close

FUSED = "fused GPT2Model"


def model_of(name, dtype=torch.float32):
    return training_processes.model_of(name).to(dtype)


def gradients_of(model, name, rows=slice(None)):
    model.zero_grad()
    training_processes.loss_for(model, name, rows).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert found
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def assert_by_the_rule(found, plain, truth):
    assert found.keys() == plain.keys() == truth.keys()
    for name in plain:
        assert_close(found[name], plain[name], truth[name].double(), name)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_gives_the_same_gradients(name, dropout, reentrant):
    """Dropout too: the recomputation draws the same mask."""
    model = backbone(name, dropout=dropout).train()
    given = inputs(name, 2, 9)
    torch.manual_seed(5)
    expected = gradients(model, model(given))
    anchor = torch.zeros((), requires_grad=True)  # the reentrant form needs an input with a gradient

    def call(anchor):
        return results(model(given))

    torch.manual_seed(5)
    found = checkpoint(call, anchor, use_reentrant=reentrant)
    assert_same(gradients(model, dict(enumerate(found))), expected)


@pytest.mark.parametrize("name", [*FAMILIES, FUSED])
def test_accumulated_gradients_are_those_of_one_batch(name):
    """Two halves, each with half the weight, by the tolerance rule: the order of the sums differs."""
    model, exact = model_of(name), model_of(name, torch.float64)
    expected, truth = gradients_of(model, name), gradients_of(exact, name)
    for rows in (slice(0, 2), slice(2, 4)):
        (training_processes.loss_for(model, name, rows) / 2).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_by_the_rule(found, expected, truth)


@pytest.mark.parametrize("name", [*FAMILIES, FUSED])
def test_functional_call_takes_other_parameters(name):
    model, exact = model_of(name), model_of(name, torch.float64)
    other = {n: (p.detach() * 1.25).requires_grad_() for n, p in model.named_parameters()}

    def call(*args, **kwargs):
        return torch.func.functional_call(model, other, args, kwargs)

    training_processes.loss_for(call, name, slice(None)).backward()
    with torch.no_grad():
        for parameter in (*model.parameters(), *exact.parameters()):
            assert parameter.grad is None
            parameter.mul_(1.25)
    found = {n: p.grad for n, p in other.items() if p.grad is not None}
    assert_by_the_rule(found, gradients_of(model, name), gradients_of(exact, name))


def pickled(model, path):
    return pickle.loads(pickle.dumps(model))


def saved(model, path):
    torch.save(model, path / "model.pt")
    return torch.load(path / "model.pt", weights_only=False)


@pytest.mark.parametrize("copied", [lambda model, path: copy.deepcopy(model), pickled, saved])
@pytest.mark.parametrize("name", [*FAMILIES, FUSED])
def test_a_copy_computes_the_same_and_is_a_model_of_its_own(name, copied, tmp_path):
    model = model_of(name)
    expected = gradients_of(model, name)
    twin = copied(model, tmp_path)
    assert type(twin) is type(model)
    assert twin.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert_same(gradients_of(twin, name), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*FAMILIES, FUSED])
def test_autocast_with_a_scaler_trains(name, dtype):
    """Compares float32 parameters' gradients with the reference backend's under the same autocast, by the tolerance rule."""
    model, exact = model_of(name), model_of(name, torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, enabled=dtype == torch.float16)

    def unscaled():
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = training_processes.loss_for(model, name, slice(None))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    with pyfused.backend("reference"):
        plain = unscaled()
        scaler.update()
    found = unscaled()
    assert all(grad.dtype == torch.float32 for grad in found.values())
    flat, of_plain, truth = (
        torch.cat([grads[n].flatten() for n in plain]) for grads in (found, plain, gradients_of(exact, name))
    )
    assert_close(flat, of_plain, truth)
    before = copy.deepcopy(model.state_dict())
    scaler.step(optimizer)
    scaler.update()
    assert any(not torch.equal(value, before[n]) for n, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["t5", FUSED])
def test_accelerate_prepares_and_trains(name):
    accelerate = pytest.importorskip("accelerate")
    model = model_of(name)
    expected = gradients_of(model, name)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(training_processes.loss_for(prepared, name, slice(None)))
    assert_same(
        {n: p.grad for n, p in accelerator.unwrap_model(prepared).named_parameters() if p.grad is not None}, expected
    )
    optimizer.step()


CASES = (("ddp", "t5"), ("fsdp2", "gpt2"), ("ddp", FUSED), ("fsdp2", FUSED))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """A folder with two processes' results for each case. One pair runs all cases, because importing takes longest."""
    folder, here = tmp_path_factory.mktemp("ranks"), Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(here), *sys.path)), "OMP_NUM_THREADS": "1"}
    cases = [f"{kind}:{name}" for kind, name in CASES]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(here / "training_processes.py"), str(rank), str(folder), *cases],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(training_processes.RANKS)
    ]
    errors = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    return folder


@pytest.mark.parametrize("kind, name", CASES)
def test_two_processes_compute_the_step_of_one(kind, name, two_processes):
    """DDP and FSDP2 with gloo: each process takes half of the batch; gradients and step equal the whole batch's."""
    found = torch.load(two_processes / f"{kind}:{name}.pt")
    model, exact = model_of(name), model_of(name, torch.float64)
    assert_by_the_rule(found["grads"], gradients_of(model, name), gradients_of(exact, name))
    for m in (model, exact):
        optimizer = torch.optim.SGD(m.parameters(), lr=training_processes.RATE)
        training_processes.loss_for(m, name, slice(None)).backward()
        optimizer.step()
    assert_by_the_rule(found["after"], dict(model.named_parameters()), dict(exact.named_parameters()))


def kept(call):
    """A call's outputs, and the tensors that autograd keeps for the backward."""
    tensors = []

    def pack(t):
        tensors.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call()
    return out if isinstance(out, tuple) else (out,), tensors


def storages(tensors):
    return {t.untyped_storage().data_ptr() for t in tensors}


@pytest.mark.parametrize("kind", ["relative bias", "causal", "dropout", "padding mask"])
def test_attention_keeps_nothing_of_the_size_of_its_scores(kind):
    b, h, s, d = 2, 3, 96, 8  # H * S * S is by far the largest size
    query, key, value = (torch.randn(b, s, h, d).transpose(1, 2).requires_grad_() for _ in range(3))
    options = {
        "relative bias": {"relative_bias": pyfused.RelativeBias(torch.randn(32, h, requires_grad=True), True)},
        "causal": {"is_causal": True},
        "dropout": {"dropout_p": 0.2},
        "padding mask": {"padding_mask": torch.rand(b, s) > 0.3},
    }[kind]
    out, tensors = kept(lambda: pyfused.attention(query, key, value, **options))
    assert tensors
    assert max(t.numel() for t in tensors) < s * s
    large = [t for t in tensors if t.numel() >= query.numel()]
    assert storages(large) <= storages((query, key, value, *out))
    assert sum(t.untyped_storage().nbytes() for t in tensors) < 6 * query.nbytes


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_norms_keep_no_second_copy_of_their_input(norm, residual):
    x, other = (torch.randn(4, 16, 32, requires_grad=True) for _ in range(2))
    weight = torch.randn(32, requires_grad=True)
    out, tensors = kept(lambda: getattr(pyfused, norm)(x, weight, residual=other if residual else None))
    large = [t for t in tensors if t.numel() >= x.numel()]
    assert len(storages(large)) == 1
    assert storages(large) <= storages((out[1],) if residual else (x,))
