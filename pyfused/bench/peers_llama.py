"""How does llama.cpp run GPT-2? The same weights in a GGUF file, its C functions by llama-cpp-python, torch's threads.

The functions are as in peers_models.py. llama.cpp looks GELU up in a float16 table and keeps its cache in float16, whatever
the weights' type: no float32 row of it keeps the tolerance rule.
"""

from __future__ import annotations

import logging
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .case import Function
from .peers_models import in_dtype

LLAMA, Q8_0 = "llama.cpp", "llama.cpp-q8_0"
_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def gpt2_prompt(model: Any, ids: torch.Tensor) -> dict[str, Callable[[], Function]]:
    """Reads prompts (B, S) at once, fills the cache and returns each one's next token's logits."""

    def make(kind: str) -> Function:
        texts = _Texts(model, kind, *ids.shape)
        prompts = texts.batch(ids, 0)
        return lambda: texts.logits(prompts)

    return in_dtype(model, make, _kinds(model))


def gpt2_token(model: Any, ids: torch.Tensor) -> dict[str, Callable[[], Function]]:
    """Each call reads the last token of ids (B, S) and returns the next one's logits. The cache holds the tokens before it."""

    def make(kind: str) -> Function:
        texts, cached = _Texts(model, kind, *ids.shape), ids.shape[1] - 1
        texts.logits(texts.batch(ids[:, :cached], 0))
        last = texts.batch(ids[:, cached:], cached)
        return lambda: texts.logits(last)

    return in_dtype(model, make, _kinds(model))


def write_gguf(model: Any, path: Path, kind: str) -> None:
    """Writes transformers' GPT-2 as a GGUF file.

    Args:
        kind: the type of the matrices, "Q8_0" or another of gguf's. Norms, biases and positions are in float32, as in the files
            that llama.cpp's own converter makes.
    """
    import gguf

    config, matrices = model.config, gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the token embedding
        # transformers keeps the weights of its layers' products as (in, out).
        array = (tensor.mT if tensor.dim() == 2 and ".h." in name else tensor).float().contiguous().numpy()
        written = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if array.ndim == 2 and not written.startswith("position"):
            writer.add_tensor(written, gguf.quantize(array, matrices), raw_dtype=matrices)
        else:
            writer.add_tensor(written, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _kinds(model: Any) -> dict[str, str]:
    """In the model's dtype; for a float32 model also in int8."""
    return {LLAMA: _TYPES[model.dtype]} | ({Q8_0: "Q8_0"} if model.dtype == torch.float32 else {})


class _Texts:
    """llama.cpp with a cache for `count` texts of `length` tokens."""

    def __init__(self, model: Any, kind: str, count: int, length: int) -> None:
        import llama_cpp

        self.llama, self.vocabulary = llama_cpp, model.config.vocab_size
        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)  # its names of llama.cpp's levels are off
        llama_cpp.llama_backend_init()
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "gpt2.gguf")
            write_gguf(model, path, kind)
            loaded = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not loaded:
            raise RuntimeError("llama.cpp does not load the model")
        weakref.finalize(self, llama_cpp.llama_model_free, loaded)
        options = llama_cpp.llama_context_default_params()
        options.n_seq_max, options.n_ctx, options.n_batch = count, count * length, count * length
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(loaded, options)
        if not self.context:
            raise RuntimeError("llama.cpp makes no context")
        weakref.finalize(self, llama_cpp.llama_free, self.context)  # the last made is called first

    def batch(self, ids: torch.Tensor, position: int) -> Any:
        """The tokens (B, S) of the texts from this position on. Their last ones' logits are wanted."""
        length = ids.shape[1]
        batch = self.llama.llama_batch_init(ids.numel(), 0, 1)
        weakref.finalize(self, self.llama.llama_batch_free, batch)
        batch.n_tokens = ids.numel()
        for i, token in enumerate(ids.flatten().tolist()):
            batch.token[i], batch.pos[i] = token, position + i % length
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, i // length
            batch.logits[i] = i % length == length - 1
        return batch

    def logits(self, batch: Any) -> torch.Tensor:
        """The logits (B, V) that a batch wants. What the cache held from its first position on is forgotten."""
        memory = self.llama.llama_get_memory(self.context)
        self.llama.llama_memory_seq_rm(memory, -1, batch.pos[0], -1)
        status = self.llama.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode returns {status}")
        wanted = [i for i in range(batch.n_tokens) if batch.logits[i]]
        rows = [self.llama.llama_get_logits_ith(self.context, i) for i in wanted]
        return torch.from_numpy(np.stack([np.ctypeslib.as_array(row, (self.vocabulary,)) for row in rows]))
