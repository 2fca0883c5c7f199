"""Which bytes does a token of each kind of vocabulary stand for? And ByT5's tokeniser, whose tokens are bytes.

ByT5 (Xue et al. 2021, arXiv:2105.13626) needs no file: its ids are UTF-8 bytes plus three.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

SPACE = "▁"  # how SentencePiece writes a space
Kind = Literal[
    "byte-level", "pieces", "bytes"
]  # GPT-2's characters for bytes; SentencePiece's pieces; ByT5's single bytes


def token_bytes(kind: Kind) -> Callable[[str], bytes]:
    """The function from a token, as the vocabulary writes it, to its bytes."""
    return _byte_level_bytes if kind == "byte-level" else _piece_bytes


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE's character -> its byte. Printable bytes stand for themselves, the others are chr(256), ..."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(hidden)}


BYTE_OF_CHARACTER = _byte_of_character()


def _byte_level_bytes(token: str) -> bytes:
    """An added token with characters outside the alphabet is itself, in UTF-8."""
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode("utf-8")


def _piece_bytes(token: str) -> bytes:
    """▁ is a space, <0xE2> is a byte, everything else is itself."""
    if token.startswith("<0x") and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace(SPACE, " ").encode("utf-8")


@dataclass
class ByteEncoding:
    """A text's ids, with what pyfused reads of `tokenizers.Encoding`."""

    ids: list[int]
    type_ids: list[int] = field(default_factory=list)

    def truncate(self, max_length: int, direction: str = "right") -> None:
        self.ids = self.ids[:max_length] if direction == "right" else self.ids[max(len(self.ids) - max_length, 0) :]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class ByteToken:
    """An added token, with what pyfused reads of `tokenizers.AddedToken`. All of ByT5's are special."""

    content: str
    special: bool = True


class ByteBackend:
    """ByT5's tokeniser, with the few methods of `tokenizers.Tokenizer` that pyfused calls.

    Ids 0 to 2 are <pad>, </s> and <unk>; then come the 256 bytes, then the sentinels in order. Spaces around <pad>, </s> and
    <unk> are dropped, as in transformers.
    """

    def __init__(self, extra_ids: int = 125):
        self._special = {"<pad>": 0, "</s>": 1, "<unk>": 2}
        self._added = self._special | {f"<extra_id_{i}>": 259 + i for i in range(extra_ids)}
        stripped = "|".join(re.escape(name) for name in self._special)
        named = "|".join(re.escape(name) for name in sorted(self._added, key=len, reverse=True))
        self._split = re.compile(rf"(\s*(?:{stripped})\s*|{named})")

    def no_padding(self) -> None:
        """Does nothing: this tokeniser never pads."""

    def no_truncation(self) -> None:
        """Does nothing: this tokeniser never truncates."""

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        single = {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
        return single | self._added if with_added_tokens else single

    def get_added_tokens_decoder(self) -> dict[int, ByteToken]:
        return {index: ByteToken(name) for name, index in self._added.items()}

    def num_special_tokens_to_add(self, is_pair: bool) -> int:
        return 2 if is_pair else 1

    def encode_batch_fast(
        self, inputs: Sequence[str | tuple[str, str]], add_special_tokens: bool = True
    ) -> list[ByteEncoding]:
        found = []
        for given in inputs:
            first, second = (given, None) if isinstance(given, str) else given
            pair = None if second is None else ByteEncoding(self._ids(second))
            found.append(self.post_process(ByteEncoding(self._ids(first)), pair, add_special_tokens))
        return found

    def post_process(
        self, encoding: ByteEncoding, pair: ByteEncoding | None = None, add_special_tokens: bool = True
    ) -> ByteEncoding:
        """Joins the texts; </s> ends each of them, unless it does so already."""
        texts = [encoding.ids] if pair is None else [encoding.ids, pair.ids]
        ended = [ids if ids[-1:] == [1] or not add_special_tokens else [*ids, 1] for ids in texts]
        joined = [index for ids in ended for index in ids]
        return replace(encoding, ids=joined, type_ids=[0] * len(joined))

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(self._split.split(text)):
            if i % 2:
                ids.append(self._added[part.strip()])
            else:
                ids += [byte + 3 for byte in part.encode("utf-8")]
        return ids
