"""What is a preset, how much memory does it take, and which kernels would run it here? The facts behind `pyfused info`.

No weights are read, only the configuration and the headers of weight files that are on this machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .checkpoints import Checkpoint, open_checkpoint
from .evidence import name_of
from .families import FAMILIES
from .models import Backbone
from .nn import FourierMixing, GatedMlp, LayerNorm, Linear, Mlp, ReversibleEmbedding, RMSNorm
from .nn.attention import RelativeSelfAttention, SelfAttention
from .ops.explain import explain
from .quantize import format_for
from .weight_format import FORMATS

_TOKENS = 128  # the length of the text that the operators are asked about


def describe(preset: str | os.PathLike[str]) -> dict[str, Any]:
    """A preset as plain data.

    Returns:
        A dict with `preset`, `directory`, `format` ("hf" or "keras"), `class`, `dtype` (None if the files do not say),
        `weights` ("float", "int8", "int4", or None if their files are not here), `config`, `parameters`, `bytes` (of the
        weights by dtype), `cache_bytes_per_token` (of a decoder's keys and values by dtype; None for an encoder), `layers`,
        `vocabulary`, `device`, and `operators`: a row with `operator`, `module`, `backend` and `reason` for each kind of call.

    Raises:
        ValueError: what `open_checkpoint` refuses.
    """
    checkpoint, has_weights = _open(preset)
    model = Backbone.from_preset(
        checkpoint.directory, load_weights=False, device="meta", dtype="float32", **checkpoint.config
    )
    config, device = model.get_config(), "cuda" if torch.cuda.is_available() else "cpu"
    dtype = _dtype(checkpoint)
    counts = {"float32": 4, "bfloat16": 2}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    cached = None
    if hasattr(model, "new_cache") and model.predicts_tokens:
        decoder: Any = model
        cached = sum(tensor.numel() for tensor in decoder.new_cache(1, 1).tensors)
    asked: torch.dtype = getattr(torch, dtype or "float32")
    return {
        "preset": str(preset),
        "directory": str(checkpoint.directory),
        "format": "keras" if checkpoint.is_keras else "hf",
        "class": FAMILIES[checkpoint.model].class_name,
        "dtype": dtype,
        "weights": (checkpoint.variant or "float") if has_weights else None,
        "config": checkpoint.config,
        "parameters": parameters,
        "bytes": {name: size * parameters for name, size in counts.items()}
        | {name: _integer_bytes(model, name) for name in FORMATS},
        "cache_bytes_per_token": None if cached is None else {name: size * cached for name, size in counts.items()},
        "layers": {name: config[name] for name in ("num_layers", "num_decoder_layers") if name in config},
        "vocabulary": config["vocabulary_size"],
        "device": device,
        "operators": list(_operators(model, asked, device)),
    }


def render(facts: dict[str, Any]) -> str:
    """The result of `describe` as lines of text."""
    layers = facts["layers"]
    depth = str(layers["num_layers"]) + (f" + {layers['num_decoder_layers']}" if "num_decoder_layers" in layers else "")
    kinds = {None: "not on this machine", "float": facts["dtype"] or "several dtypes"}
    weights = kinds.get(facts["weights"], facts["weights"])
    lines = [
        f"{facts['preset']}: {facts['class']}, {'Keras' if facts['format'] == 'keras' else 'Hugging Face'} format",
        f"  directory   {facts['directory']}",
        f"  weights     {weights}",
        f"  layers      {depth}",
        f"  vocabulary  {facts['vocabulary']:,}",
        f"  parameters  {facts['parameters']:,}",
        f"  memory      {_sizes(facts['bytes'])}",
    ]
    if facts["cache_bytes_per_token"] is not None:
        lines.append(f"  cache       {_sizes(facts['cache_bytes_per_token'])} for each token of a text")
    lines += ["  options", *(f"    {name} = {value!r}" for name, value in facts["config"].items())]
    lines.append(f"  operators on {facts['device']}, a text of {_TOKENS} tokens")
    lines += [
        f"    {row['operator']:<12} {row['backend']:<10} {row['module']}: {row['reason']}" for row in facts["operators"]
    ]
    return "\n".join(lines)


def _open(preset: str | os.PathLike[str]) -> tuple[Checkpoint, bool]:
    """The checkpoint, and whether its weight files are here; nothing but the configuration is downloaded."""
    checkpoint = open_checkpoint(preset, weights=False)
    directory = checkpoint.directory
    if not any(any(directory.glob(names)) for names in ("*.safetensors", "*.weights.h5", "pytorch_model*.bin")):
        return checkpoint, False
    return open_checkpoint(directory), True


def _dtype(checkpoint: Checkpoint) -> str | None:
    try:
        return name_of(checkpoint.dtype)
    except ValueError:  # several, and the configuration states none
        return None


def _integer_bytes(model: nn.Module, scheme: str) -> int:
    """The bytes of a float32 model after `quantize_`: linear layers and token tables as integers with scales."""
    total = sum(4 * parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, Linear | ReversibleEmbedding):
            for name in ("weight", "reverse_weight"):
                if (weight := module._parameters.get(name)) is not None:
                    form = format_for(module, scheme)
                    total += form.nbytes(*weight.shape) - 4 * weight.numel()
    return total


def _sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{_size(count)} in {name}" for name, count in sizes.items())


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("GB takes any number")


@torch.no_grad()
def _operators(model: Any, dtype: torch.dtype, device: str) -> Iterator[dict[str, str]]:
    """A row for each operator and shape, with the first module that makes such a call."""
    seen = set()
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):  # the linear layers of a feed-forward network are part of its operator
            continue
        if isinstance(module, Mlp | GatedMlp):
            inside = (*inside, f"{name}.")
        found = _call(model, name, module, dtype, device)
        if found is None:
            continue
        operator, args, options = found
        key = (operator, *(tuple(value.shape) for value in args if value is not None), *options)
        if key not in seen:
            seen.add(key)
            answer = explain(operator, *args, **options)
            reason = next(verdict.reason for verdict in answer.verdicts if verdict.runs)
            yield {"operator": operator, "module": name, "backend": answer.backend, "reason": reason}


def _call(
    model: Any, name: str, module: Any, dtype: torch.dtype, device: str
) -> tuple[str, tuple[Any, ...], dict[str, Any]] | None:
    """The operator that a module calls, its tensors (unfilled: nothing is computed) and its options."""

    def make(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def like(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else make(*tensor.shape)

    if isinstance(module, LayerNorm):
        return "layer_norm", (make(1, _TOKENS, module.weight.shape[0]), like(module.weight), like(module.bias)), {}
    if isinstance(module, RMSNorm):
        return "rms_norm", (make(1, _TOKENS, module.weight.shape[0]), like(module.weight)), {}
    if isinstance(module, Mlp):
        inner, outer = module.inner, module.outer
        weights = like(inner.weight), like(inner.bias), like(outer.weight), like(outer.bias)
        return "ffn", (make(1, _TOKENS, inner.in_features), *weights), {"activation": module.activation}
    if isinstance(module, GatedMlp):
        gated = like(module.gate.weight), like(module.up.weight), like(module.outer.weight)
        return "gated_ffn", (make(1, _TOKENS, module.gate.in_features), *gated), {"activation": module.activation}
    if (
        isinstance(module, SelfAttention) and getattr(module, "relative_bias", module) is not None
    ):  # T5's first stands for all
        parts = [make(1, module.num_heads, _TOKENS, module.head_size) for _ in range(3)]
        causal = model.predicts_tokens and not name.startswith("encoder.")
        options: dict[str, Any] = {"is_causal": True} if causal else {}
        if isinstance(module, RelativeSelfAttention) and (bias := module.position_bias()) is not None:
            options["relative_bias"] = bias._replace(table=make(*bias.table.shape))
        return "attention", tuple(parts), options
    if isinstance(module, FourierMixing):
        return "fourier_mix", (make(1, _TOKENS, model.get_config()["hidden_dim"]),), {}
    if isinstance(module, Linear):
        return "linear", (make(1, _TOKENS, module.in_features), like(module.weight), like(module.bias)), {}
    return None
