"""May threads share a model and a Generator? Each gets the same result as alone, and the model does not change."""

import copy
import pickle
import threading

import pytest
import torch
from backbone_cases import hf_gpt2, hf_t5, like_hf

from pyfused import AlbertBackbone, Generator, encode

PROMPTS = [[[1, 2, 3]], [[4, 5], [6, 7, 8, 9]], [[10]], [[11, 12, 13, 14, 15]]]


def gpt2():
    return like_hf(hf_gpt2())


def t5():
    return like_hf(hf_t5())


def together(*calls):
    """Runs the calls in overlapping threads; returns their results."""
    found = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def run(i, call):
        barrier.wait()
        found[i] = call()

    threads = [threading.Thread(target=run, args=(i, call)) for i, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def partly_trained(model):
    """Puts the model in training mode except for a frozen part."""
    model.train()
    next(m for name, m in model.named_modules() if name.endswith("layers.0")).eval()
    return model


@pytest.mark.parametrize("make", [gpt2, t5])
def test_a_generator_in_several_threads(make):
    model = make()
    expected = [Generator(model).generate(p, 12) for p in PROMPTS]
    partly_trained(model)
    before = modes(model)
    generator = Generator(model)
    for _ in range(3):
        found = together(*[lambda p=p: generator.generate(p, 12) for p in PROMPTS])
        assert found == expected
        assert modes(model) == before
    beams = lambda: generator.generate(PROMPTS[1], 6, num_beams=2)  # noqa: E731
    alone = beams()
    assert together(beams, lambda: generator.generate(PROMPTS[0], 12), beams) == [alone, expected[0], alone]
    assert modes(model) == before


def test_the_first_call_to_end_leaves_the_others_in_evaluation_mode():
    """Two calls that always overlap: the second continues after the first has ended."""
    model = gpt2().train()
    model.layers[0].eval()
    before = modes(model)
    generator, seen = Generator(model), []
    inner = threading.Event()
    outer = threading.Event()

    def first(row, token):
        inner.set()
        assert outer.wait(60)

    def second(row, token):
        outer.set()
        if not seen:
            thread.join(60)  # the first call began before this one and ends now
        seen.append(any(modes(model).values()))

    thread = threading.Thread(target=lambda: generator.generate([[1, 2]], 1, on_token=first))
    thread.start()
    assert inner.wait(60)
    generator.generate([[3, 4]], 6, on_token=second)
    assert seen == [False] * 6
    assert modes(model) == before
    with pytest.raises(RuntimeError, match="stop"):
        generator.generate([[1]], 4, on_token=lambda row, token: (_ for _ in ()).throw(RuntimeError("stop")))
    assert modes(model) == before


def test_encode_leaves_a_model_as_it_was():
    model = partly_trained(AlbertBackbone(50, 2, 2, 16, 24, 32))
    before, names = modes(model), set(vars(model))
    texts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    expected = encode(copy.deepcopy(model).eval(), texts)
    seen = []
    model.embedding_norm.register_forward_hook(lambda *_: seen.append(model.skip_padding))
    found = together(*[lambda: encode(model, texts)] * 3)
    assert all(torch.equal(a, b) for row in found for a, b in zip(row, expected, strict=True))
    assert modes(model) == before
    assert set(vars(model)) == names
    assert seen
    assert not any(seen)  # otherwise another thread's own call of the model would leave padding out too


def test_a_generator_is_still_copied_and_pickled():
    generator = Generator(gpt2())
    expected = generator.generate([[1, 2]], 4)
    for again in (copy.deepcopy(generator), pickle.loads(pickle.dumps(generator))):
        assert again.generate([[1, 2]], 4) == expected
