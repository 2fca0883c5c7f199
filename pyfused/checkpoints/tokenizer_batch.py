"""How does a batch of texts become arrays? It is encoded, cut to a length, and padded.

A `tokenizers.Tokenizer` would cut and pad too, but by settings of its own that threads would share. Here they are arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np

Side = Literal["left", "right"]
Truncation = Literal["longest_first", "only_first", "only_second"]
TRUNCATIONS: tuple[Truncation, ...] = ("longest_first", "only_first", "only_second")


class Cut(NamedTuple):
    """To how many tokens, special ones included, texts are cut; which of two texts; and on which side tokens go."""

    max_length: int
    strategy: Truncation
    side: Side


class Padded(NamedTuple):
    """token_ids (B, S) and, if wanted, segments (B, S), int64; padding_mask (B, S), True for a real token."""

    token_ids: np.ndarray
    segments: np.ndarray | None
    padding_mask: np.ndarray


def encoded(
    backend: Any, texts: Sequence[str], pairs: Sequence[str] | None, special: bool, cut: Cut | None
) -> list[Any]:
    """The encodings of texts or of pairs. special: whether tokens are added that begin and end a text.

    Raises ValueError naming the text if it cannot be cut as `cut` says.
    """
    if cut is None:
        inputs: Sequence[Any] = texts if pairs is None else list(zip(texts, pairs))
        whole: list[Any] = backend.encode_batch_fast(inputs, add_special_tokens=special)
        return whole
    room = cut.max_length - (backend.num_special_tokens_to_add(pairs is not None) if special else 0)
    if room < 0:
        least = cut.max_length - room
        raise ValueError(f"max_length is {cut.max_length}; it takes at least {least}, the tokens that are always added")
    alone = [texts] if pairs is None else [texts, pairs]
    found = []
    for row, parts in enumerate(zip(*(backend.encode_batch_fast(side, add_special_tokens=False) for side in alone))):
        sizes = [len(part) for part in parts]
        if sum(sizes) > room:
            new_sizes = _shortened(sizes, room, cut.strategy)
            if new_sizes is None:
                which = "the second text" if cut.strategy == "only_second" else "the first text"
                raise ValueError(
                    f"texts[{row}]: truncation is {cut.strategy!r}, and without {which} it is too long already"
                )
            for part, size in zip(parts, new_sizes):
                part.truncate(size, direction=cut.side)
        found.append(backend.post_process(*parts, add_special_tokens=special))
    return found


def _shortened(sizes: list[int], room: int, strategy: Truncation) -> list[int] | None:
    """The sizes that fit into `room` together; None if the one text that may be cut is too short for that."""
    if len(sizes) == 1 and strategy != "only_second":
        return [min(sizes[0], room)]
    if strategy == "longest_first":
        short, long = sorted(sizes)
        short, long = (short, room - short) if short <= room - short else (room // 2, room - room // 2)
        return [short, long] if sizes[0] <= sizes[1] else [long, short]
    place = 0 if strategy == "only_first" else 1
    left = room - sum(size for i, size in enumerate(sizes) if i != place)
    if place >= len(sizes) or left <= 0:
        return None
    return [left if i == place else size for i, size in enumerate(sizes)]


def padded(encodings: Sequence[Any], fill: int, length: int | None, side: Side, segments: bool) -> Padded:
    """length: of every row; None is the longest row's. fill: the id of padding. segments: whether they are wanted.

    Raises ValueError for a row that is longer than `length`.
    """
    rows = [encoding.ids for encoding in encodings]
    lengths = np.array([len(ids) for ids in rows], np.int64)
    longest = int(lengths.max(initial=0))
    if length is not None and longest > length:
        row = int(lengths.argmax())
        raise ValueError(
            f"texts[{row}] has {longest} tokens; padding takes at most max_length = {length}, or truncation=True"
        )
    width = longest if length is None else length
    places = np.arange(width) - (width - lengths[:, None] if side == "left" else 0)
    mask = (places >= 0) if side == "left" else places < lengths[:, None]
    token_ids = np.full(mask.shape, fill, np.int64)
    token_ids[mask] = np.fromiter(chain.from_iterable(rows), np.int64, lengths.sum())
    if not segments:
        return Padded(token_ids, None, mask)
    of_segment = np.zeros(mask.shape, np.int64)
    of_segment[mask] = np.fromiter(chain.from_iterable(e.type_ids for e in encodings), np.int64, lengths.sum())
    return Padded(token_ids, of_segment, mask)
