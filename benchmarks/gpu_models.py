"""How fast does a model generate tokens, and are they right? GPT-2 124M and T5 1.1 base, beside transformers.

Weights are random and made on the device, so nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from gpu_correct import stored_by_columns
from gpu_device import DEVICE, DRY, Row, error_row, medians, seconds_of

import pyfused
from pyfused.decode_plan import Matrix
from pyfused.generation import plan_of
from pyfused.ops.decode import run as run_decode
from pyfused.ops.decode import step_of
from pyfused.testing import judge, running

GPT2 = {"vocabulary_size": 50257, "num_layers": 12, "num_heads": 12, "hidden_dim": 768, "intermediate_dim": 3072}
T5 = {"vocabulary_size": 32128, "num_layers": 12, "num_heads": 12, "hidden_dim": 768, "intermediate_dim": 2048}
T5 |= {"key_value_dim": 64, "activation": "gelu_new", "tie_embedding_weights": False}
TINY = {"vocabulary_size": 60, "num_layers": 1, "num_heads": 2, "hidden_dim": 32, "intermediate_dim": 48}
# (prompts, tokens of each, new tokens)
SHAPES = ((2, 3, 3),) if DRY else ((1, 32, 128), (1, 128, 128), (4, 100, 64))


def backbone(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """GPT-2 124M or T5 1.1 base with random weights, created on the device."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        if name == "gpt2":
            model: Any = pyfused.GPT2Backbone(
                **(TINY if DRY else GPT2), max_sequence_length=64 if DRY else 1024, dtype=dtype
            )
        else:
            model = pyfused.T5Backbone(**{**T5, **TINY, "key_value_dim": 16} if DRY else T5, dtype=dtype)
    return model.eval()


def compile(start: int) -> Iterator[Row]:
    """Compiles the Triton kernels of both models in 12 processes. Later items find them in Triton's cache."""
    from pyfused.generation.warm import warm

    for name in ("gpt2", "t5"):
        report = warm(backbone(name), lengths=sorted({shape[1] for shape in SHAPES}), workers=12)
        yield {"model": name, "ok": not report["failed"], **report}


@torch.inference_mode()
def decode(start: int) -> Iterator[Row]:
    """Device time of a step that sees 129 tokens: decode's persistent kernel, called and as a CUDA graph, and the bytes of
    weights that it reads in a second. "gpt2 by columns": with weights stored as transformers' are, and no head, as in a fused
    model. csrc/cuda/decode.cu has the prediction."""
    for name, rows in product(("gpt2", "gpt2 by columns", "t5"), (1, 2) if DRY else (1, 4, 8)):
        about = {"model": name, "rows": rows}
        try:
            call = OneStep(name, rows)
            first = [t.clone() for t in call()]
            calls = {"called": call} if DRY else {"called": call, "graph": _graph(call).replay}
            seconds = medians(calls)
            same = all(torch.equal(*pair) for pair in zip(first, call(), strict=True))
            figures = {f"us_{how}": s * 1e6 for how, s in seconds.items()}
            yield {**about, "ok": same, **figures, "gb_per_s": call.bytes / min(seconds.values()) / 1e9}
        except Exception as error:
            yield {**about, **error_row(error)}


class OneStep:
    """A call of decode's persistent kernel for rows that see 129 tokens; it returns the logits and the chosen tokens. `bytes`:
    of the weights that it reads."""

    def __init__(self, name: str, rows: int):
        model = backbone(name.split()[0])
        cache, plan, cached = model.new_cache(rows, 16 if DRY else 192), plan_of(model), 9 if DRY else 128
        for keys in cache.tensors:
            keys.normal_()
        if name == "t5":
            _, heads, size, dtype, _ = cache.signature
            sizes = 2, rows, heads, cached, size
            cache.cross = [tuple(torch.randn(sizes, dtype=dtype, device=DEVICE)) for _ in cache.cross]
        cache.at_positions(torch.full((rows,), cached, device=DEVICE), cache.capacity)
        self._plan = _as_in_transformers(plan) if name == "gpt2 by columns" else plan
        self._chooses = self._plan.head.weight is not None
        self._step = step_of(torch.arange(rows, device=DEVICE), cache, choose=self._chooses)
        self.bytes = sum(m.weight.nbytes for m in self._plan.matrices() if m.weight is not None)

    @torch.inference_mode()
    def __call__(self) -> Any:
        with running("cuda"):
            return run_decode(self._plan, self._step)[: 1 + self._chooses]


def _as_in_transformers(plan: Any) -> Any:
    """The plan of a fused GPT-2: Conv1D's weights are stored transposed, and the model's own head multiplies the states."""

    def of(value: Any) -> Any:
        is_matrix = isinstance(value, Matrix) and value.weight is not None
        return value._replace(weight=stored_by_columns(value.weight)) if is_matrix else value

    return replace(plan, layers=[type(layer)(*map(of, layer)) for layer in plan.layers], head=Matrix())


def _graph(call: Callable[[], Any]) -> Any:
    """The call, which has run before, as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def texts(shape: tuple[int, int, int], vocabulary: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(3, vocabulary, shape[:2], generator=draw).tolist()


def generate(start: int, names: str) -> Iterator[Row]:
    """Generates twice per shape, with other allocations between. Both must agree with the reference. Microseconds per token by
    default and with each backend forced."""
    models: dict[str, Any] = {}
    cases = product(names.split(","), (None, "cuda", "triton"), SHAPES)
    for number, (name, backend, shape) in enumerate(cases):
        if number < start:
            continue
        about = {"model": name, "backend": backend or "default", "shape": "x".join(map(str, shape))}
        yield {"begun": number, **about}
        try:
            models = models if name in models else {name: backbone(name)}
            yield {**about, **_generate(models[name], backend, shape)}
        except Exception as error:
            yield {**about, **error_row(error)}


def _generate(model: Any, backend: str | None, shape: tuple[int, int, int]) -> Row:
    prompts, count = texts(shape, model.get_config()["vocabulary_size"]), shape[2]
    generator = pyfused.Generator(model)
    with running(backend, strict=False) if backend else contextlib.nullcontext():
        tokens = generator.generate(prompts, count)
        # If a CUDA graph reads memory that was freed, these tensors overwrite it and the tokens change.
        kept = [torch.full((n << 10,), float("nan"), device=DEVICE) for n in ((1,) if DRY else (1, 64, 4096, 65536))]
        again = generator.generate(prompts, count)
        del kept
        whole = seconds_of(lambda: generator.generate(prompts, count), 1 if DRY else 5)
        beginning = seconds_of(lambda: generator.generate(prompts, 1), 1 if DRY else 5)
    with running("reference", strict=False):
        expected = pyfused.Generator(model).generate(prompts, count)
    agree = [_agree(model, *row) for row in zip(prompts, tokens, expected)]
    return {
        "ok": tokens == again and all(agree),
        "same_again": tokens == again,
        "as_reference": sum(agree),
        "equal_tokens": sum(a == b for row in zip(tokens, expected) for a, b in zip(*row)),
        "us_per_token": (whole - beginning) / (count - 1) * 1e6,
        "ms_first_token": beginning * 1e3,
    }


@torch.inference_mode()
def _agree(model: Any, prompt: list[int], found: list[int], expected: list[int]) -> bool:
    """Whether two greedy texts are equal, or first differ at tokens whose logits differ less than rounding errors."""
    at = next((i for i, pair in enumerate(zip(found, expected)) if pair[0] != pair[1]), None)
    if at is None:
        return len(found) == len(expected)

    def logits(model: Any) -> torch.Tensor:
        with running("reference", strict=False):
            if isinstance(model, pyfused.GPT2Backbone):
                ids = torch.tensor([prompt + found[:at]], device=DEVICE)
                return model.logits(model(token_ids=ids, padding_mask=torch.ones_like(ids))[:, -1])[0]
            ids = torch.tensor([prompt], device=DEVICE)
            target = torch.tensor([[0, *found[:at]]], device=DEVICE)
            masks = {"encoder_padding_mask": torch.ones_like(ids), "decoder_padding_mask": torch.ones_like(target)}
            hidden = model(encoder_token_ids=ids, decoder_token_ids=target, **masks)
            return model.logits(hidden["decoder_sequence_output"][:, -1])[0]

    truth, rounded = logits(copy.deepcopy(model).double()), logits(model)
    best, other = truth[[found[at], expected[at]]]
    return abs(best - other).item() <= 2 * judge(rounded, rounded, truth).worst_bound


def _theirs(name: str) -> Any:
    """Hugging Face's model of the same size."""
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    small = {"vocab_size": 60, "n_embd": 32, "n_layer": 1, "n_head": 2} if DRY else {}
    smaller = {"vocab_size": 60, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
    base = {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12}
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
    with torch.device(DEVICE):
        if name == "gpt2":
            model: Any = GPT2LMHeadModel(GPT2Config(**small))
        else:
            model = T5ForConditionalGeneration(T5Config(**(smaller if DRY else base), **gated))
    return model.to(torch.bfloat16).eval()


def transformers(start: int, names: str) -> Iterator[Row]:
    """Hugging Face's models: eager, with a static cache, for which transformers compiles the step on a GPU, and after fuse_, by
    default and with the kernel for a whole step."""
    from torch._dynamo.utils import counters

    ways: dict[str, Row] = {how: {} for how in ("eager", "fused", "fused, cuda")}
    ways["static cache, compiled"] = {"cache_implementation": "static"}
    shape = SHAPES[0]
    for name, (how, options) in product(names.split(","), ways.items()):
        about = {"model": name, "how": how, "shape": "x".join(map(str, shape))}
        try:
            model = _theirs(name)
            if "fused" in how:
                pyfused.fuse_(model)
            backend = running("cuda", strict=False) if "cuda" in how else contextlib.nullcontext()
            ids = torch.tensor(texts(shape, model.config.vocab_size), device=DEVICE)

            def call(count: int, model: Any = model, ids: torch.Tensor = ids, options: Row = options) -> Any:
                fixed = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
                with torch.no_grad():
                    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **fixed)

            with backend:
                for _ in range(1 if DRY else 3):  # the first compiles, the second records a CUDA graph
                    call(shape[2])
                whole, beginning = (seconds_of(partial(call, n), 1 if DRY else 3) for n in (shape[2], 2))
            figure = (whole - beginning) / (shape[2] - 2) * 1e6
            yield {**about, "us_per_token": figure, "graphs": counters["stats"]["unique_graphs"]}
        except Exception as error:
            yield {**about, **error_row(error)}
