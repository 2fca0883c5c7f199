"""Does a captured generation step find its memory again? A replay uses the addresses and numbers of the capture.

Without a GPU the step runs operator by operator, and a dispatch mode logs each operator's inputs. Any tensor from outside the
step must be the same tensor, alive and at the same address, in every run of the step.
"""

import numpy as np
import pytest
import shim
import torch
from fake_cuda import Machine
from replayed import Replayed
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from pyfused import extensions
from pyfused.generation import steps
from pyfused.generation.beam_search import BeamSearch
from pyfused.generation.beam_steps import GraphBeams
from pyfused.generation.sampling import Sampler
from pyfused.generation.steps import GraphSteps
from pyfused.models.gpt2 import GPT2Backbone
from pyfused.models.t5 import T5Backbone
from pyfused.testing import running

SIZES = {"vocabulary_size": 61, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 24}
SHAPES = {"gpt2": (3, 30), "t5": (3, 7, 30)}


@pytest.fixture(params=SHAPES)
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    if kind == "gpt2":
        return GPT2Backbone(**SIZES, dropout=0.1, max_sequence_length=80).eval()
    return T5Backbone(**SIZES).eval()


class ReplayedBeams(GraphBeams):
    """Replayed's twin for beams; `seen` has what each step read."""

    def _capture(self):
        self.seen = []
        return self

    def replay(self):
        with Reads() as reads:
            self._step()
        self.seen.append(reads)


class Reads(TorchDispatchMode):
    """Logs every operator and its inputs: tensors made since the start by number, other tensors by address."""

    def __init__(self):
        super().__init__()
        self.calls, self.made, self.found = [], {}, {}

    def _describe(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata in self.made:
            where = f"made {self.made[storage._cdata][0]}"
        else:
            self.found.setdefault(storage._cdata, StorageWeakRef(storage))
            where = f"at {tensor.data_ptr():#x}"
        return f"{where} {tuple(tensor.shape)} {tensor.stride()} {tensor.dtype}"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = tree_map_only(torch.Tensor, self._describe, (args, kwargs or {}))
        self.calls.append(f"{func} {given}")
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.found:
                storage = tensor.untyped_storage()
                self.made.setdefault(
                    storage._cdata, (len(self.made), storage)
                )  # kept alive, so none reuses its address
        return out


def prompts(seed):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 61, n) for n in generator.integers(1, 24, 3)]


@torch.inference_mode()
@pytest.mark.parametrize("sampler", [Sampler(), Sampler(2.0, 9, 0.8), Sampler(1.0)], ids=["greedy", "top", "all"])
def test_every_step_reads_the_same_memory(model, kind, sampler):
    steps = Replayed(model, SHAPES[kind], sampler)
    seen, elsewhere = [], []
    for seed in range(3):
        steps.start(prompts(seed), torch.rand(3, dtype=torch.float64))
        elsewhere.append([torch.empty(n, dtype=torch.int64) for n in (1, 3, 61) * 50])  # reuses freed memory
        for _ in range(2):
            with Reads() as reads:
                steps.next(torch.rand(3, dtype=torch.float64))
            seen.append(reads)
    assert any("pyfused.attention" in call for call in seen[0].calls)
    assert len(seen[0].found) > 20  # weights, caches and everything else that outlives a step
    for reads in seen[1:]:
        # The first operator copies the caller's random draws into a fixed place; no graph contains that copy.
        assert reads.calls[1:] == seen[0].calls[1:]
    _draws, *read = seen[0].found.values()
    assert not any(storage.expired() for storage in read)


@torch.inference_mode()
def test_every_step_of_a_beam_search_reads_the_same_memory(model, kind):
    """Two searches one after the other. The caches are reordered inside the step."""
    search, elsewhere = BeamSearch(4), []
    steps = ReplayedBeams(model, SHAPES[kind], 1, 4, search.candidates(1))
    for seed in range(2):
        search.run(steps, prompts(seed), 5, frozenset([7]))
        elsewhere.append([torch.empty(n, dtype=torch.int64) for n in (1, 3, 61) * 50])  # reuses freed memory
    assert len(steps.seen) > 4
    assert any("aten.index_select" in call for call in steps.seen[0].calls)
    for reads in steps.seen[1:]:
        assert reads.calls == steps.seen[0].calls
    assert not any(storage.expired() for storage in steps.seen[0].found.values())


@torch.inference_mode()
@pytest.mark.skipif(not extensions.emulating_cuda(), reason="on a GPU the CUDA kernel runs in a graph")
@pytest.mark.parametrize("sampler", [Sampler(), Sampler(2.0, 9, 0.8)], ids=["greedy", "top"])
def test_decode_runs_in_the_graph_where_cuda_is_forced(model, kind, sampler, monkeypatch):
    """One launch a step, the tokens of the modules' path. Without evidence for this chip it is not used by itself."""
    launches, forward = [], shim.load().decode_forward
    monkeypatch.setattr(shim.load(), "decode_forward", lambda *args: launches.append(args) or forward(*args))

    def tokens(backend):
        draws = torch.Generator().manual_seed(4)
        uniform = [torch.rand(3, dtype=torch.float64, generator=draws) for _ in range(6)]
        with running(backend, strict=False):
            steps = Replayed(model, SHAPES[kind], sampler)
            found = [steps.start(prompts(2), uniform[0]).tolist()]
            return [*found, *(steps.next(u).tolist() for u in uniform[1:])]

    expected = tokens("reference")
    assert not launches
    assert tokens("cuda") == expected
    assert len(launches) == 5 + (kind == "t5")  # T5 begins with a step


@torch.inference_mode()
def test_weights_written_in_place_are_read(model, kind):
    """A training step between two calls writes weights in place. The step must not read values derived from old weights."""

    def logits(decoding):
        decoding.start(prompts(1))
        return decoding.fixed_step(torch.tensor([5, 60, 0]))

    def new():
        return steps.decoding_of(model)(model, SHAPES[kind], fixed=True)

    kept = new()
    before = logits(kept)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter))
    after = logits(new())
    assert not torch.allclose(before, after)
    assert torch.equal(logits(kept), after)


@torch.inference_mode()
def test_a_capture_happens_on_the_models_device(model, kind, monkeypatch):
    """Not on the current device, where torch would make its capture stream."""
    machine = Machine(monkeypatch)
    steps = GraphSteps(model, SHAPES[kind], Sampler())
    steps.start(prompts(0), torch.zeros(3, dtype=torch.float64))
    steps._device, where = torch.device("cuda", 1), []
    step = steps._step
    monkeypatch.setattr(
        steps, "_step", lambda: (where.append((machine.device, machine.streams[1], machine.capturing)), step())
    )
    default = machine.streams[1]
    steps.next(torch.zeros(3, dtype=torch.float64))
    assert [(device, capturing) for device, _, capturing in where] == [(1, False), (1, False), (1, True)]
    assert all(stream is not default for _, stream, _ in where)  # neither warm-up nor capture uses the default stream
    assert ("wait", 1, 1) in machine.log
    assert ("synchronize", 0) not in machine.log
    assert machine.device == 0


@torch.inference_mode()
def test_capturing_a_beam_search_moves_no_beam(model, kind, monkeypatch):
    """The warm-up runs the step twice. The caches and positions that the replay finds are those before it."""
    machine = Machine(monkeypatch)

    class Recorded(GraphBeams):
        def _step(self):
            if not machine.capturing:  # a capture records the step and does not run it
                super()._step()

    rows, running, found = np.array([[1, 0], [0, 0], [1, 1]]), np.array([[0.0, -1.0]] * 3, np.float32), []
    for cls in (Recorded, ReplayedBeams):
        one = cls(model, SHAPES[kind], 1, 2, 4)
        best = one.start(prompts(0), running)
        for step in range(2):
            before = len(machine.log)
            one.move(np.zeros((3, 2, 9), np.int64), rows, step)
            one.next(best.tokens[:, :2], running)
            if cls is Recorded:
                assert [event[0] for event in machine.log[before:]].count("replay") == 1
                one._step()
        found.append((one._scores.clone(), one._places.clone(), *(t.clone() for t in one._decoding.state)))
    assert all(map(torch.equal, *found))


def test_a_graph_is_kept_for_weights_of_one_dtype(model, kind):
    """Weights of another dtype may reuse the memory of freed float32 weights."""
    key = GraphSteps.key(model, SHAPES[kind], Sampler())
    assert GraphSteps.key(model, SHAPES[kind], Sampler()) == key
    for parameter in model.parameters():
        parameter.data = parameter.data.view(torch.float16)[..., ::2]
    assert GraphSteps.key(model, SHAPES[kind], Sampler()) != key
