"""How does text become a model's inputs, and how do token ids become text again?

The `tokenizers` library does the work, from any of the sets of files that presets have (tokenizer_files.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pyfused.checkpoints.presets import resolve_preset
from pyfused.checkpoints.tokenizer_batch import TRUNCATIONS, Cut, Padded, Side, Truncation, encoded, padded
from pyfused.checkpoints.tokenizer_bytes import BYTE_OF_CHARACTER, token_bytes
from pyfused.checkpoints.tokenizer_files import TokenizerFiles, read_tokenizer
from pyfused.checkpoints.tokenizer_options import NAMES
from pyfused.checkpoints.tokenizer_stream import StreamDecoder
from pyfused.rules import SIZE, check, its_kind

IGNORED = -100  # the label that torch's cross_entropy leaves out


class Tokenizer:
    """Text to ids and back, and texts to the inputs of a backbone. Made by `from_preset`. Threads may share one.

    Ids and texts are those of transformers' tokenisers for the same files. A special token that is written out in a text, such
    as <|endoftext|>, becomes its one id.

    directory: the folder that it was read from.
    backend: the `tokenizers.Tokenizer` that does the work.
    family: the name of the model that `__call__` makes inputs for: "gpt2", "albert", "t5" or "fnet"; None if no file says.
    model_max_length: the longest text in tokens by the files; None if they name none. Truncation's default.
    padding_side, truncation_side: "right", or what the files say.
    bos_token, eos_token, unk_token, sep_token, pad_token, cls_token, mask_token: the special tokens, as text; None
        where the vocabulary has none. Each has an id: bos_token_id and so on. As in KerasHub, GPT-2 has no
        token for padding but pads with its end token.
    sentinel_ids: the ids of T5's <extra_id_0>, <extra_id_1> and so on, in this order. Empty for other vocabularies.
    end_token_id: the token that ends a text and at which generation stops: eos_token_id.

    Example:
        tokenizer = pyfused.Tokenizer.from_preset("albert_tiny_en")
        outputs = model(**tokenizer(["Jesus wept.", "Let there be light."]))
    """

    bos_token_id: int | None
    eos_token_id: int | None
    unk_token_id: int | None
    sep_token_id: int | None
    pad_token_id: int | None
    cls_token_id: int | None
    mask_token_id: int | None

    def __init__(self, directory: Path, files: TokenizerFiles) -> None:
        self.directory, self.backend = directory, files.backend
        self._kind, self._family, options = files.kind, files.family, files.options
        self.family = None if files.family is None else files.family.name
        self.backend.no_padding()
        self.backend.no_truncation()
        self._vocabulary: dict[str, int] = self.backend.get_vocab(with_added_tokens=True)
        self._written = {index: token for token, index in self._vocabulary.items()}
        sentinels = takewhile(self._vocabulary.__contains__, (f"<extra_id_{i}>" for i in count()))
        self.sentinel_ids = tuple(self._vocabulary[token] for token in sentinels)
        self.model_max_length = options.max_length
        self.padding_side, self.truncation_side = options.side("padding_side"), options.side("truncation_side")
        names = files.names
        self.bos_token, self.eos_token, self.unk_token = names.get("bos"), names.get("eos"), names.get("unk")
        self.sep_token, self.pad_token = names.get("sep"), names.get("pad")
        self.cls_token, self.mask_token = names.get("cls"), names.get("mask")
        for name in NAMES:
            setattr(self, f"{name}_token_id", self._vocabulary[names[name]] if name in names else None)
        if self.pad_token_id is None:
            self.pad_token, self.pad_token_id = self.eos_token, self.eos_token_id
        self.end_token_id = self.eos_token_id
        self._start_id = options.start_id(self.pad_token_id)
        added = self.backend.get_added_tokens_decoder()
        self._special = frozenset(index for index, token in added.items() if token.special)
        self._added = sorted((token.content for token in added.values()), key=len, reverse=True)
        self._missing = {byte for c, byte in BYTE_OF_CHARACTER.items() if c not in self._vocabulary}
        if self._kind != "byte-level":
            self._missing = set()

    @classmethod
    def from_preset(cls, preset: str | os.PathLike[str]) -> Tokenizer:
        """The tokeniser of a preset: a bundled name, a directory in Hugging Face or Keras format, a KerasHub name,
        hf://owner/repo or kaggle://... (see `pyfused.checkpoints.resolve_preset`).

        The first of these files counts: Hugging Face's tokenizer.json, vocab.json with merges.txt, or spiece.model; Keras's
        assets/tokenizer/vocabulary.json with merges.txt, or vocabulary.spm. ByT5 needs none.

        Raises:
            ValueError: a file is missing, damaged, or neither byte-level BPE nor a unigram SentencePiece model nor bytes; a
                file beside it asks for what pyfused does not do. The message names the file.
            ImportError: the `tokenizers` package is missing.
        """
        directory = resolve_preset(preset, "tokenizer")
        return cls(directory, read_tokenizer(directory))

    def __call__(
        self,
        texts: str | Sequence[str],
        pair: str | Sequence[str] | None = None,
        *,
        padding: bool | Literal["max_length"] = True,
        max_length: int | None = None,
        truncation: bool | Truncation = False,
        side: Side | None = None,
        truncation_side: Side | None = None,
        add_special_tokens: bool = True,
        device: str | torch.device | None = None,
    ) -> dict[str, Tensor]:
        """The inputs of the tokeniser's backbone for a batch: ``model(**tokenizer(texts))``.

        GPT-2 gets token_ids and padding_mask; ALBERT token_ids, segment_ids and padding_mask; FNet, which has no mask,
        token_ids and segment_ids; T5 encoder_token_ids and encoder_padding_mask, and `targets` makes its decoder's inputs.
        All are (B, S): ids and segments int64, the mask bool, True for a real token.

        Args:
            texts: B texts. A str is a batch of one.
            pair: a second text for each: [CLS] a [SEP] b [SEP] with segments 0 and 1 for ALBERT and FNet, a </s> b </s> for
                T5, one behind the other for GPT-2.
            padding: True pads to the longest text, "max_length" to max_length. False takes texts of equal length only.
            max_length: the most tokens of a row, with the special ones. None is model_max_length.
            truncation: True or "longest_first" cuts longer rows, of a pair the longer text first. "only_first" and
                "only_second" cut one of a pair.
            side, truncation_side: where padding goes and where tokens are cut; None is the attribute.
            add_special_tokens: False leaves out [CLS], [SEP] and T5's </s>.
            device: where the tensors go; None is torch's default device.

        Raises:
            TypeError: texts or pair are not str or a list of str.
            ValueError: a text is not Unicode (lone surrogates); pair has another number of texts; the lengths cannot be made
                equal as asked; max_length is given but neither padding nor truncation uses it.
        """
        rows = self._encoded(texts, pair, padding, max_length, truncation, side, truncation_side, add_special_tokens)
        if self._family is None:
            raise ValueError(
                f"{self.directory}: no file names the model, so its inputs are unknown; put its config.json beside it"
            )
        ids, mask = self._family.texts[0]
        found = {ids: rows.token_ids}
        if rows.segments is not None:
            found["segment_ids"] = rows.segments
        if mask is not None:
            found[mask] = rows.padding_mask
        place = torch.get_default_device() if device is None else device
        return {name: torch.from_numpy(array).to(place) for name, array in found.items()}

    def targets(
        self,
        texts: str | Sequence[str],
        *,
        padding: bool | Literal["max_length"] = True,
        max_length: int | None = None,
        truncation: bool | Truncation = False,
        device: str | torch.device | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What T5's decoder gets, and what it has to say: (inputs, labels).

        inputs: decoder_token_ids (B, S), which are the texts' ids moved one place to the right behind the start token, and
        decoder_padding_mask (B, S). labels (B, S): the texts' ids, and -100 for padding: torch's cross_entropy leaves it out.
        Arguments and errors are those of a call. Raises ValueError for a model without a decoder of its own.

        Example:
            inputs, labels = tokenizer.targets(answers)
            outputs = model(**tokenizer(questions), **inputs)
        """
        if self._family is None or len(self._family.texts) < 2 or self._start_id is None:
            raise ValueError(
                f"targets are for a model with a decoder of its own, like T5; this tokeniser is for {self.family}"
            )
        rows = self._encoded(texts, None, padding, max_length, truncation, "right", None, True)
        place = torch.get_default_device() if device is None else device
        ids, mask = (torch.from_numpy(array).to(place) for array in (rows.token_ids, rows.padding_mask))
        labels = ids.masked_fill(~mask, IGNORED)
        names = self._family.texts[1]
        moved = torch.cat([torch.full_like(ids[:, :1], self._start_id), ids[:, :-1]], 1)
        return {name: tensor for name, tensor in zip(names, (moved, mask)) if name is not None}, labels

    def encode(self, text: str, pair: str | None = None, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, or of a pair. T5's tokenisers add their end token, as its encoder expects. ALBERT's and FNet's add
        [CLS] before the text and [SEP] after it. GPT-2's adds nothing.

        Raises TypeError for anything but str. Raises ValueError for text that is not Unicode (lone surrogates) or that needs
        a byte missing from a reduced vocabulary.
        """
        self._check(text, "text")
        if pair is not None:
            self._check(pair, "pair")
        given = text if pair is None else (text, pair)
        ids: list[int] = self.backend.encode_batch_fast([given], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def decode(self, ids: Sequence[int] | Tensor, *, skip_special_tokens: bool = False) -> str:
        """The text of ids, (S,). Bytes that are not UTF-8 become U+FFFD.

        skip_special_tokens: leave out [CLS], </s>, <|endoftext|> and their like.
        Raises IndexError for an id that is not in the vocabulary.
        """
        values = ids.tolist() if isinstance(ids, Tensor) else ids
        kept = [index for index in values if index not in self._special] if skip_special_tokens else values
        content = [self._content(index, first=not place) for place, index in enumerate(kept)]
        return b"".join(content).decode("utf-8", errors="replace")

    def stream(self, *, skip_special_tokens: bool = False) -> StreamDecoder:
        """A decoder to feed one id after another."""
        return StreamDecoder(self._content, skip=self._special if skip_special_tokens else frozenset())

    def token_bytes(self, index: int, first: bool = False) -> bytes:
        """The bytes of one token; they may be part of a character. ``first``: whether the token begins a text, whose first
        piece is written with a space that is not part of the text. Raises IndexError for an unknown id."""
        return self._content(index, first)

    def token_to_id(self, token: str) -> int:
        """The id of a token as the vocabulary writes it. Raises ValueError if it has none."""
        if token not in self._vocabulary:
            raise ValueError(f"token is {token!r:.100}; the vocabulary of {len(self)} tokens does not have it")
        return self._vocabulary[token]

    def id_to_token(self, index: int) -> str:
        """The token as the vocabulary writes it: "Ġlight", "▁light". Raises IndexError for an unknown id."""
        return self._written[self._known(index)]

    @property
    def vocabulary_size(self) -> int:
        """The number of tokens, with added ones."""
        return len(self._vocabulary)

    def __len__(self) -> int:
        return len(self._vocabulary)

    def __repr__(self) -> str:
        return f"Tokenizer({str(self.directory)!r}, family={self.family!r}, vocabulary_size={len(self)})"

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that decoding leaves out with skip_special_tokens=True."""
        return self._special

    def _encoded(
        self, texts: Any, pair: Any, padding: Any, max_length: Any, truncation: Any, side: Any, truncation_side: Any,
        special: bool,
    ) -> Padded:  # fmt: skip
        first = self._texts(texts, "texts")
        second = None if pair is None else self._texts(pair, "pair")
        if second is not None and (len(first) != len(second) or isinstance(texts, str) != isinstance(pair, str)):
            raise ValueError(f"pair has {len(second)} texts; it takes one for each of the {len(first)} in texts")
        if padding not in (True, False, "max_length"):
            raise ValueError(f"padding is {padding!r}; it takes True, False or 'max_length'")
        if truncation not in (True, False, *TRUNCATIONS):
            raise ValueError(f"truncation is {truncation!r}; it takes True, False, {', '.join(map(repr, TRUNCATIONS))}")
        length = self._length(max_length, bool(truncation) or padding == "max_length")
        cut = None
        if truncation and length is not None:
            strategy: Truncation = "longest_first" if truncation is True else truncation
            if second is None and strategy == "only_second":
                raise ValueError("truncation is 'only_second', and there is no pair")
            cut = Cut(length, strategy, _side(truncation_side, "truncation_side", self.truncation_side))
        found = encoded(self.backend, first, second, special, cut)
        sizes = {len(encoding.ids) for encoding in found}
        if len(sizes) > 1 and (padding is False or self.pad_token_id is None):
            why = "padding is False" if padding is False else "the vocabulary has no token to pad with"
            raise ValueError(
                f"texts have {min(sizes)} to {max(sizes)} tokens, and {why}; it takes texts of equal length"
            )
        segments = self._family is not None and self._family.segments
        width, left = length if padding == "max_length" else None, _side(side, "side", self.padding_side)
        return padded(found, self.pad_token_id or 0, width, left, segments)

    def _length(self, max_length: Any, used: bool) -> int | None:
        if max_length is None:
            if used and self.model_max_length is None:
                raise ValueError(
                    "max_length is None, and the tokeniser's files name no model_max_length; it takes an int"
                )
            return self.model_max_length if used else None
        check(SIZE, max_length=max_length)
        if not used:
            raise ValueError(f"max_length is {max_length}, but neither truncation nor padding='max_length' uses it")
        return max_length

    def _texts(self, value: Any, name: str) -> list[str]:
        if isinstance(value, bytes) or not isinstance(value, str | Sequence):
            raise TypeError(f"{name} is {its_kind(value)}; it takes a str or a list of str")
        if isinstance(value, str):
            self._check(value, name)
            return [value]
        for row, text in enumerate(value):
            self._check(text, f"{name}[{row}]")
        return list(value)

    def _check(self, text: Any, name: str) -> None:
        if not isinstance(text, str):
            raise TypeError(f"{name} must be str, got {type(text).__name__}")
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(f"{name} has no UTF-8 form: {error}") from error
        if self._missing:
            self._check_known(text, name)

    def _check_known(self, text: str, name: str) -> None:
        for token in self._added:
            text = text.replace(token, "")
        for character in text:
            if self._missing.intersection(character.encode("utf-8")):
                raise ValueError(
                    f"{name} holds {character!r}, for which this vocabulary of {len(self)} tokens has no token"
                )

    @cached_property
    def _contents(self) -> dict[int, bytes]:
        content = token_bytes(self._kind)
        return {index: content(token) for token, index in self._vocabulary.items()}

    def _known(self, index: int) -> int:
        if int(index) not in self._written:
            raise IndexError(f"token id {index} is not in the vocabulary of {len(self)} tokens")
        return int(index)

    def _content(self, index: int, first: bool) -> bytes:
        content = self._contents.get(index)
        if content is None:
            content = self._contents[self._known(index)]
        return content.removeprefix(b" ") if first and self._kind == "pieces" else content


def _side(value: Any, name: str, default: Side) -> Side:
    if value not in (None, "left", "right"):
        raise ValueError(f"{name} is {value!r}; it takes 'left' or 'right'")
    return default if value is None else value
