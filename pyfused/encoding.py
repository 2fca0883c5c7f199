"""How do texts become vectors? In batches of similar length without padding, one vector per token or per text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .models import inputs as model_inputs
from .models.backbone import Backbone
from .models.evaluation import evaluating, skipping_padding
from .rules import SIZE, check, its_kind


def encode(
    model: Backbone,
    texts: Sequence[Sequence[int]],
    *,
    pool: Literal["cls", "mean"] | None = None,
    batch_size: int = 32,
) -> list[Tensor] | Tensor:
    """Returns hidden states of texts: the last layer's, or the encoder's for T5.

    The model runs in evaluation mode, without gradients and without computing padding (skip_padding). Its own mode stays as it
    was. Threads may share a model. FNet has no padding mask, so only texts of equal length share a batch.

    Args:
        model: a backbone, on any device and in any dtype.
        texts: token ids; their lengths may differ.
        pool: None returns a vector for each token; "mean" the mean over a text's tokens, summed in float32; "cls" the first
            token's vector (for ALBERT and FNet, whose tokenisers begin a text with [CLS]).
        batch_size: the number of texts in a batch.

    Returns:
        Vectors in the order of the texts, in the model's dtype and on its device. Without pool: a list of (S, D). With pool:
        (len(texts), D).

    Raises:
        ValueError: a text is empty or too long for the model; pool is unknown, or "cls" for a model without [CLS].
        TypeError: an argument has a wrong type.
        IndexError: a token id is outside the vocabulary.

    Example:
        vectors = pyfused.encode(model, [tokenizer.encode("Let there be light.")], pool="mean")
    """
    if not isinstance(model, Backbone):
        raise TypeError(f"model is {its_kind(model)}; it takes a backbone")
    if pool not in (None, "cls", "mean"):
        raise ValueError(f"pool is {pool!r}; it takes None, 'cls' or 'mean'")
    if pool == "cls" and not model.begins_with_cls:
        raise ValueError(
            f"pool is 'cls', but the texts of {its_kind(model)} do not begin with [CLS]; it takes 'mean'"
        )
    check(SIZE, batch_size=batch_size)
    config = model.get_config()
    arrays = model_inputs.texts(texts, "texts", config["vocabulary_size"])
    longest = config.get("max_sequence_length")
    for row, array in enumerate(arrays):
        if longest is not None and len(array) > longest:
            raise ValueError(f"texts[{row}] has {len(array)} tokens; it takes at most max_sequence_length = {longest}")
    device = model.device
    found: list[Tensor] = [torch.empty(0, device="cpu")] * len(arrays)
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
    """Yields batches of rows: texts of similar length if mixed, else of equal length."""
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
    """(S, D) -> (D,), or a copy without pool: a view would keep the whole batch in memory."""
    if pool == "mean":
        return states.float().mean(0).to(states.dtype) if states.dtype != torch.float64 else states.mean(0)
    return states[0].clone() if pool == "cls" else states.clone()
