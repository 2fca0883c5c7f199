"""How do other inference engines run the models? OpenVINO, ONNX Runtime and CTranslate2: the same weights, torch's threads.

As in peers.py each function returns name -> what makes the peer's call. Such a call takes no inputs: they are bound.
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

from .case import Function

INT8 = "ctranslate2-int8"
_PRECISIONS = {
    torch.float32: ("f32", "FP32"),
    torch.bfloat16: ("bf16", "BF16"),
    torch.float16: ("f16", "FP16"),
}  # OpenVINO's


class _Model(torch.nn.Module):
    """A model in float32, and how its result is got of the inputs, as exporters want it."""

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
        model: its dtype is what OpenVINO computes in, if the processor can; ONNX Runtime is a peer in float32 alone.
        call: from the model and the inputs to a tensor.
        inputs: what the model is exported for: the engines get constant shapes.
        after: what is still done with the tensor, in PyTorch.
    """

    def export() -> Any:
        return torch.export.export(_Model(model, call), inputs)

    def openvino() -> Function:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # its stand-in then sends nothing
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
    """CTranslate2: the logits after a prompt (1, S), and the cache filled."""

    def make(kind: str) -> Function:
        generator = _gpt2(model, kind)

        def run() -> torch.Tensor:
            found = generator.generate_batch(_words(ids), max_length=1, **_GPT2)
            return _tensor(found[0].logits[0][0])[None]

        return run

    return _kinds(model, make)


def gpt2_token(model: Any, ids: torch.Tensor) -> dict[str, Callable[[], Function]]:
    """CTranslate2: the logits of one more token. The first call's are those after ids (1, S); then come 31 greedy tokens, and
    the same again."""

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
    """CTranslate2: the logits of one more token on a source (1, S). The first call's have `cached` tokens before it, all 0.
    Then it goes on to twice as many, and starts again from none: over the calls the cache has that size in the mean."""

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


# No token ends a text early (with a least length CTranslate2 would mask that token's logit), and all logits are returned.
_ALL_LOGITS = {"end_token": [1 << 30], "return_logits_vocab": True}
_GPT2 = {"include_prompt_in_result": False, **_ALL_LOGITS}  # the prompt is read at once


def _kinds(model: Any, make: Callable[[str], Function]) -> dict[str, Callable[[], Function]]:
    """In the model's dtype, and a float32 model in int8 too. CTranslate2 raises where the processor lacks the dtype."""
    name = str(model.dtype).removeprefix("torch.")
    kinds = {"ctranslate2": name, INT8: "int8"} if name == "float32" else {"ctranslate2": name}
    return {peer: partial(make, kind) for peer, kind in kinds.items()}


def _tokens(generate: Callable[..., Any]) -> Iterator[torch.Tensor]:
    """The logits of each token, computed when asked for: CTranslate2's thread waits in its callback until the next one is."""
    asked: SimpleQueue[bool] = SimpleQueue()
    given: SimpleQueue[Any] = SimpleQueue()

    def callback(result: Any) -> bool:
        given.put(result)
        return asked.get()  # whether to stop

    while True:
        generate(asynchronous=True, callback=callback)
        last = False
        while not last:
            result = given.get(timeout=600)
            last = result.is_last
            stop = True
            try:
                yield _tensor(result.logits)
                stop = False
            finally:
                asked.put(stop)


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
    if (
        not model.config.scale_decoder_outputs
    ):  # the loader looks at tie_word_embeddings, which transformers 5 always sets
        spec.decoder.scale_outputs = OPTIONAL
    return spec


class _Tokenizer(SimpleNamespace):
    """What the converters ask a tokenizer for: the word of a token is its number."""

    def __init__(self, model: Any) -> None:
        super().__init__(bos_token="0", eos_token="0", unk_token="0", pad_token="0", size=model.config.vocab_size)

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(self.size)}

    def convert_ids_to_tokens(self, token: int) -> str:
        return str(token)


def _words(ids: torch.Tensor) -> list[list[str]]:
    return [[str(token) for token in row] for row in ids.tolist()]


def _loaded(cls: Any, spec: Any, kind: str) -> Any:
    """The engine of a specification, which goes through a file."""
    spec.validate()
    spec.optimize()
    with tempfile.TemporaryDirectory() as directory:
        spec.save(directory)
        return cls(directory, compute_type=kind, intra_threads=torch.get_num_threads())


def _tensor(view: Any) -> torch.Tensor:
    """CTranslate2's array, in float32, which NumPy knows."""
    import ctranslate2

    return torch.from_numpy(np.array(view.to(ctranslate2.DataType.float32)))
