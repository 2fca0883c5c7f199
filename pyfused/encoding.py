"""How do texts become vectors? Batches of similar lengths, padding left out, and one vector a token or a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .models import inputs as model_inputs
from .models.backbone import Backbone
from .models.evaluation import evaluating, skipping_padding


def encode(
    model: Backbone,
    texts: Sequence[Sequence[int]],
    *,
    pool: Literal["cls", "mean"] | None = None,
    batch_size: int = 32,
) -> list[Tensor] | Tensor:
    """Hidden states of texts: of T5 the encoder's, of the others those of the last layer.

    The model is used in evaluation mode, without gradients and with its padding left out (skip_padding), and left as it
    was. Threads may share it. FNet, which has no padding mask, takes texts of equal length together.

    Args:
        model: a backbone, on any device and in any dtype.
        texts: token ids; their lengths may differ.
        pool: None gives a vector for each token; "mean" their mean, added up in float32; "cls" the first token's (ALBERT,
            FNet: texts that their tokenisers made begin with [CLS]).
        batch_size: texts computed at a time.

    Returns:
        In the order of the texts, of the model's dtype and device: without pool a list of (S, D), else (len(texts), D).

    Raises:
        ValueError: an empty text or one too long for the model, an unknown pool, "cls" for a model without it.
        TypeError: a wrong type. IndexError: a token id outside the vocabulary.

    Example:
        vectors = pyfused.encode(model, [tokenizer.encode("Let there be light.")], pool="mean")
    """
    if not isinstance(model, Backbone):
        raise TypeError(f"model is a {type(model).__name__}; it takes a backbone")
    if pool not in (None, "cls", "mean"):
        raise ValueError(f"pool is {pool!r}; it takes None, 'cls' or 'mean'")
    if pool == "cls" and not model.begins_with_cls:
        raise ValueError(
            f"pool is 'cls', and a {type(model).__name__} has no token that stands for a text; it takes 'mean'"
        )
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"batch_size is {batch_size!r}; it takes an int")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it takes at least 1")
    config = model.get_config()
    arrays = model_inputs.texts(texts, "texts", config["vocabulary_size"])
    places = config.get("max_sequence_length")
    for row, array in enumerate(arrays):
        if places is not None and len(array) > places:
            raise ValueError(f"texts[{row}] has {len(array)} tokens; it takes at most max_sequence_length = {places}")
    device = model.device
    found: list[Tensor] = [torch.empty(0)] * len(arrays)
    with evaluating(model), skipping_padding(), torch.no_grad():
        for rows in _batches(arrays, batch_size, mixed=model.texts[0][1] is not None):
            ids, lengths = model_inputs.padded([arrays[row] for row in rows])
            real = torch.from_numpy(np.arange(ids.shape[1]) < lengths[:, None])
            mask = None if bool(real.all()) else real.to(device)
            states = model.text_states(torch.from_numpy(ids).to(device), mask)
            for row, text, length in zip(rows, states, lengths.tolist()):
                found[row] = _pooled(text[:length], pool)
    if pool is None:
        return found
    return torch.stack(found) if found else torch.empty(0, config["hidden_dim"], dtype=model.dtype, device=device)


def _batches(texts: list[np.ndarray], batch_size: int, mixed: bool) -> Iterator[list[int]]:
    """Rows of similar length together; of equal length, unless mixed."""
    batch: list[int] = []
    for row in sorted(range(len(texts)), key=lambda row: len(texts[row])):
        other = bool(batch) and not mixed and len(texts[batch[0]]) != len(texts[row])
        if len(batch) == batch_size or other:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _pooled(states: Tensor, pool: str | None) -> Tensor:
    """(S, D) -> (D,), or a copy: a view would keep the whole batch."""
    if pool == "mean":
        return states.float().mean(0).to(states.dtype) if states.dtype != torch.float64 else states.mean(0)
    return states[0].clone() if pool == "cls" else states.clone()
