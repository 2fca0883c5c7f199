"""How do other inference engines run the models? OpenVINO, ONNX Runtime and CTranslate2: the same weights, torch's threads.

As in peers.py, each function returns peer -> a function that makes the peer's call. The inputs are already bound: the call
takes none.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ..evidence import name_of
from .case import Function

INT8 = "ctranslate2-int8"
_PRECISIONS = {
    torch.float32: ("f32", "FP32"),
    torch.bfloat16: ("bf16", "BF16"),
    torch.float16: ("f16", "FP16"),
}  # OpenVINO's


class _Model(torch.nn.Module):
    """A float32 copy of a model whose forward is `call`, the form that exporters need."""

    def __init__(self, model: torch.nn.Module, call: Function) -> None:
        super().__init__()
        self.model, self.call = copy.deepcopy(model).float().eval(), call

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.call(self.model, *inputs)


def exported(
    model: Any, call: Function, inputs: tuple[torch.Tensor, ...], after: Function = lambda result: result
) -> dict[str, Callable[[], Function]]:
    """OpenVINO and ONNX Runtime.

    Args:
        model: OpenVINO computes in its dtype, if the processor can. ONNX Runtime runs only float32 models.
        call: call(model, *inputs) returns a tensor.
        inputs: the model is exported for exactly these shapes.
        after: the rest of the computation, in PyTorch.
    """

    def export() -> Any:
        return torch.export.export(_Model(model, call), inputs)

    def openvino() -> Function:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # so that it sends nothing
        import openvino

        hint, capability = _PRECISIONS[model.dtype]
        if capability not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise ValueError(f"OpenVINO has no {capability} on this processor")
        options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": hint}
        run = openvino.compile_model(openvino.convert_model(export()), "CPU", options)
        arrays = [tensor.numpy() for tensor in inputs]
        return lambda: after(torch.from_numpy(run(arrays, share_inputs=True, share_outputs=True)[0]))

    def onnxruntime() -> Function:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        onnx = torch.onnx.export(export(), dynamo=True, verbose=False).model_proto.SerializeToString()  # type: ignore[union-attr]
        session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        arrays = {given.name: tensor.numpy() for given, tensor in zip(session.get_inputs(), inputs)}
        return lambda: after(torch.from_numpy(session.run(None, arrays)[0]))

    peers: dict[str, Callable[[], Function]] = {"openvino": openvino}
    if model.dtype == torch.float32:
        peers["onnxruntime"] = onnxruntime
    return peers


def gpt2_prompt(model: Any, ids: torch.Tensor) -> dict[str, Callable[[], Function]]:
    """CTranslate2: reads prompts (B, S) at once, fills the cache and returns each one's next token's logits."""

    def make(kind: str) -> Function:
        generator = _gpt2(model, kind)

        def run() -> torch.Tensor:
            results = generator.generate_batch(_words(ids), max_length=1, **_GPT2)
            return torch.stack([_tensor(result.logits[0][0]) for result in results])

        return run

    return _kinds(model, make)


def gpt2_token(model: Any, ids: torch.Tensor) -> dict[str, Callable[[], Function]]:
    """CTranslate2: each call returns the logits of one more token of each text. The first comes after ids (B, S). After 32
    greedy tokens it starts again."""

    def make(kind: str) -> Function:
        generate = partial(_gpt2(model, kind).generate_batch, _words(ids), max_length=32, **_GPT2)
        return partial(next, _tokens(generate))

    return _kinds(model, make)


def t5_encoder(model: Any, ids: torch.Tensor) -> dict[str, Callable[[], Function]]:
    """CTranslate2: the encoder's states of a source (1, S)."""

    def make(kind: str) -> Function:
        import ctranslate2

        spec = ctranslate2.specs.TransformerEncoderModelSpec(_t5(model).encoder)
        spec.register_vocabulary(list(_Tokenizer(model).get_vocab()))
        spec.config.unk_token = "0"
        encoder = _loaded(ctranslate2.Encoder, spec, kind)
        return lambda: _tensor(encoder.forward_batch(ids.tolist()).last_hidden_state)

    return _kinds(model, make)


def t5_token(model: Any, ids: torch.Tensor, cached: int) -> dict[str, Callable[[], Function]]:
    """CTranslate2: each call returns the logits of one more token for a source (1, S). At the first call the cache holds
    `cached` tokens, all 0. It grows to twice as many and then starts again from none, so `cached` is its mean size."""

    def make(kind: str) -> Function:
        import ctranslate2

        translate = partial(
            _loaded(ctranslate2.Translator, _t5(model), kind).translate_batch,
            _words(ids),
            [["0"] * cached],
            beam_size=1,
            min_decoding_length=0,
            max_decoding_length=2 * cached + 1,
            **_ALL_LOGITS,
        )
        tokens = _tokens(translate)
        for _ in range(cached):
            next(tokens)
        return partial(next, tokens)

    return _kinds(model, make)


# Return all logits, and never end a text early. (A minimum length would do that too, but it masks the end token's logit.)
_ALL_LOGITS = {"end_token": [1 << 30], "return_logits_vocab": True}
_GPT2 = {"include_prompt_in_result": False, **_ALL_LOGITS}  # reads the whole prompt in one step


def _kinds(model: Any, make: Callable[[str], Function]) -> dict[str, Callable[[], Function]]:
    """The peer in the model's dtype; for a float32 model also in int8. CTranslate2 raises if the processor lacks the dtype."""
    name = name_of(model.dtype)
    return in_dtype(model, make, {"ctranslate2": name} | ({INT8: "int8"} if name == "float32" else {}))


def in_dtype(model: Any, make: Callable[[str], Function], kinds: dict[str, str]) -> dict[str, Callable[[], Function]]:
    """The peers, each a kind of the same engine. Their results have the model's dtype, as plain PyTorch's."""

    def made(kind: str) -> Function:
        call = make(kind)
        return lambda: call().to(model.dtype)

    return {peer: partial(made, kind) for peer, kind in kinds.items()}


def _tokens(generate: Callable[..., Any]) -> Iterator[torch.Tensor]:
    """Yields the logits (B, V) of one token after another. CTranslate2's thread waits in its callback until the next are
    needed. It calls back for every text of a step. The first text's result has the logits of all."""
    stops: SimpleQueue[bool] = SimpleQueue()
    results: SimpleQueue[Any] = SimpleQueue()
    stopped = False

    def callback(result: Any) -> bool:
        nonlocal stopped
        if result.batch_id == 0:
            results.put(result)
            stopped = stops.get()
        return stopped

    while True:
        generate(asynchronous=True, callback=callback)
        last = False
        while not last:
            result = results.get(timeout=600)
            last = result.is_last
            stop = True
            try:
                yield _tensor(result.logits)
                stop = False
            finally:
                stops.put(stop)


def _gpt2(model: Any, kind: str) -> Any:
    import ctranslate2
    from ctranslate2.converters.transformers import GPT2Loader

    with torch.no_grad():
        return _loaded(ctranslate2.Generator, GPT2Loader()(model, _Tokenizer(model)), kind)


def _t5(model: Any) -> Any:
    from ctranslate2.converters.transformers import T5Loader
    from ctranslate2.specs.model_spec import OPTIONAL

    with torch.no_grad():
        spec = T5Loader()(model, _Tokenizer(model))
    if not model.config.scale_decoder_outputs:  # the loader reads tie_word_embeddings, which transformers 5 always sets
        spec.decoder.scale_outputs = OPTIONAL
    return spec


class _Tokenizer(SimpleNamespace):
    """The part of a tokenizer that the converters use. A token's word is its number."""

    def __init__(self, model: Any) -> None:
        super().__init__(bos_token="0", eos_token="0", unk_token="0", pad_token="0", size=model.config.vocab_size)

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(self.size)}

    def convert_ids_to_tokens(self, token: int) -> str:
        return str(token)


def _words(ids: torch.Tensor) -> list[list[str]]:
    return [[str(token) for token in row] for row in ids.tolist()]


def _loaded(cls: Any, spec: Any, kind: str) -> Any:
    """The engine for a specification; CTranslate2 loads it only from files."""
    spec.validate()
    spec.optimize()
    with tempfile.TemporaryDirectory() as directory:
        spec.save(directory)
        return cls(directory, compute_type=kind, intra_threads=torch.get_num_threads())


def _tensor(view: Any) -> torch.Tensor:
    """CTranslate2's array as a float32 tensor; NumPy does not know bfloat16."""
    import ctranslate2

    return torch.from_numpy(np.array(view.to(ctranslate2.DataType.float32)))
