"""How is a SentencePiece unigram model (Kudo 2018, arXiv:1804.10959) read from its file? T5, ALBERT and FNet have one.

This file reads the model file, and the `tokenizers` library runs it, as in transformers. A control piece that is written out
in a text, such as </s>, becomes its id. (SentencePiece itself, and with it KerasHub, splits it into letters.) A model with the
pieces [CLS] and [SEP] belongs to ALBERT or FNet: [CLS] begins a text, [SEP] ends it.
Format: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pyfused.checkpoints.diagnose import looks_like
from pyfused.checkpoints.tokenizer_bytes import SPACE

START, SEPARATOR = "[CLS]", "[SEP]"
_UNIGRAM = 1
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_LARGEST = 64 << 20  # T5's has 0.8 MB, mT5's 4 MB


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int


def read_model(
    tokenizers: Any, path: Path, extra_ids: int, *, added: Sequence[Any] = (), encoder: bool | None = None,
    lower: bool = False, strip: bool = False, quotes: bool = False, split_first: bool = False,
) -> Any:  # fmt: skip
    """A `tokenizers.Tokenizer` made from the model file. It adds the tokens that begin and end a text.

    extra_ids: the number of sentinels <extra_id_0>, ... after T5's pieces, the last one first, as in transformers.
    added: `tokenizers.AddedToken`s of the files beside it; their flags count, where a piece has the same text.
    encoder: whether [CLS] and [SEP] surround a text; None means that they do if the model has both.
    lower, strip, quotes: transformers' changes to an encoder's text: lower case, no accents, plain quotation marks.
    split_first: split a text at user-defined pieces before anything else, as transformers does.
    Raises ValueError naming the file if it is damaged or not a unigram model like T5's.
    """
    try:
        size = path.stat().st_size
        if size > _LARGEST:
            raise ValueError(f"{size} bytes; at most {_LARGEST} are read")
        pieces, trainer, normalizer = _parse(path.read_bytes())
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise ValueError(f"{path}: cannot be read as a SentencePiece model: {error}{looks_like(path)}") from error
    if trainer.get(3, _UNIGRAM) != _UNIGRAM:
        raise ValueError(f"{path}: model_type is {trainer[3]}; pyfused reads unigram models (1), like T5's")
    for number, name in ((3, "add_dummy_prefix"), (4, "remove_extra_whitespaces"), (5, "escape_whitespaces")):
        if not normalizer.get(number, 1):
            raise ValueError(f"{path}: {name} is off; pyfused reads models with it on, like T5's")
    if trainer.get(24, 0):
        raise ValueError(f"{path}: treat_whitespace_as_suffix is on; pyfused reads models with it off, like T5's")
    unknown = next((index for index, piece in enumerate(pieces) if piece.kind == _UNKNOWN), None)
    # SentencePiece does not split at user-defined pieces first; their score of 0 makes them its first choice
    kinds = (_UNKNOWN, _CONTROL, _USER_DEFINED) if split_first else (_UNKNOWN, _CONTROL)
    special = [piece.text for piece in pieces if piece.kind in kinds]
    encoder = START in special and SEPARATOR in special if encoder is None else encoder
    end, extra_ids = (SEPARATOR, 0) if encoder else ("</s>", extra_ids)
    if unknown is None or end not in special:
        raise ValueError(f"{path}: the model has no unknown piece or no {end!r}")
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(extra_ids))]
    vocabulary = [(piece.text, piece.score) for piece in pieces] + [(name, 0.0) for name in sentinels]
    if len({text for text, _ in vocabulary}) != len(vocabulary):
        raise ValueError(f"{path}: a piece occurs twice")
    fallback = any(piece.kind == _BYTE for piece in pieces)
    try:
        backend = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unknown, fallback))
        normalizers = _encoder_normalizers(tokenizers.normalizers, lower, strip, quotes) if encoder else []
        if charsmap := normalizer.get(2):
            normalizers.append(tokenizers.normalizers.Precompiled(charsmap))
        if normalizers:
            backend.normalizer = tokenizers.normalizers.Sequence(normalizers)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: {error}") from error
    steps = tokenizers.pre_tokenizers
    metaspace = {"replacement": SPACE, "prepend_scheme": "always", "split": True}
    backend.pre_tokenizer = steps.Sequence([steps.WhitespaceSplit(), steps.Metaspace(**metaspace)])
    backend.decoder = tokenizers.decoders.Metaspace(**metaspace)
    add_tokens(backend, added)
    backend.add_special_tokens([*special, *reversed(sentinels)])
    backend.post_processor = surroundings(tokenizers, backend, encoder)
    return backend


def add_tokens(backend: Any, added: Sequence[Any]) -> None:
    """Adds `tokenizers.AddedToken`s in this order: their flags decide which are special."""
    for token in added:
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])


def surroundings(tokenizers: Any, backend: Any, encoder: bool) -> Any:
    """What is put around texts, as in transformers: [CLS] a [SEP] b [SEP], or T5's a </s> b </s>."""
    end = SEPARATOR if encoder else "</s>"
    single, pair = [f"$A:0 {end}:0", f"$B:1 {end}:1"] if encoder else [f"$A {end}", f"$B {end}"]
    first = f"{START}:0 {single}" if encoder else single
    names = [START, end] if encoder else [end]
    special = [(token, backend.token_to_id(token)) for token in names]
    return tokenizers.processors.TemplateProcessing(single=first, pair=f"{first} {pair}", special_tokens=special)


def _encoder_normalizers(steps: Any, lower: bool, strip: bool, quotes: bool) -> list[Any]:
    chosen = [steps.Replace("``", '"'), steps.Replace("''", '"')] if quotes else []
    chosen += [steps.NFKD(), steps.StripAccents()] if strip else []
    return [*chosen, steps.Lowercase()] if lower else chosen


def _parse(data: bytes) -> tuple[list[_Piece], dict[int, Any], dict[int, Any]]:
    """The pieces, and trainer_spec and normalizer_spec by field number."""
    pieces: list[_Piece] = []
    specs: dict[int, dict[int, Any]] = {2: {}, 3: {}}
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            fields = dict(_fields(value))
            (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
            pieces.append(_Piece(fields.get(1, b"").decode("utf-8"), score, fields.get(3, _NORMAL)))
        elif number in specs and isinstance(value, bytes):
            specs[number] = dict(_fields(value))
    if not pieces:
        raise ValueError("it has no pieces")
    return pieces, specs[2], specs[3]


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of one protocol buffer message; a value is int or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"field {key >> 3} has the wire type {kind}")
        if at + size > len(data):
            raise ValueError("it is truncated")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number has more than 64 bits")
