"""What do the files beside a vocabulary say about a tokeniser? Its class, its named and its added tokens, its limits.

They are tokenizer_config.json and, in folders of transformers before version 4.34, special_tokens_map.json and
added_tokens.json; the model's config.json names its family. Read as transformers 5 reads them: where tokenizer_config.json
has added_tokens_decoder, the two older files do not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pyfused.checkpoints.files import read_json
from pyfused.families import FAMILIES, Family, of_hf_type

NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


@dataclass(frozen=True)
class Added:
    """A token that is taken out of a text before anything else.

    lstrip, rstrip: it takes the space on that side with it. single_word: only where no letter is beside it. normalized: it is
    looked for in the normalised text. special: decoding may skip it.
    """

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False
    special: bool = True


class TokenizerOptions:
    """The options of a folder. Raises ValueError naming the file for a value that cannot be.

    hf_class: the tokeniser's class in transformers, without "Fast"; None if no file names it.
    family: the model's family by its configuration, or else by that class; None if neither tells.
    named: {"eos": Added or None, ...}, only what the files say; None is their null.
    added: id -> token. extra: further special tokens, whose ids no file tells.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / "tokenizer_config.json"
        self.raw = _read(self.path)
        self.model = _read(directory / "config.json")
        name = self.raw.get("tokenizer_class") or self.model.get("tokenizer_class")
        self.hf_class = name.removesuffix("Fast") if isinstance(name, str) else None
        self.family = of_hf_type(self.model.get("model_type")) or family_of_class(self.hf_class)
        legacy = "added_tokens_decoder" not in self.raw
        map_file = directory / "special_tokens_map.json"
        mapped = _read(map_file) if legacy else {}
        self.named = self._named(self.raw, self.path) | self._named(mapped, map_file)
        self.extra = self._extra(self.raw, self.path) or self._extra(mapped, map_file)
        self.added = self._older(directory / "added_tokens.json") if legacy else self._decoder()

    def is_class(self, *names: str) -> bool:
        """Whether the tokeniser's class is one of these. If no file names it, the family's own class counts."""
        if self.hf_class is None and self.family is not None:
            return f"{self.family.keras_name}Tokenizer" in names
        return self.hf_class in names

    @property
    def adds_tokens(self) -> str | None:
        """The option that makes GPT-2's tokeniser add tokens to a text, if it is on."""
        return next((name for name in ("add_bos_token", "add_eos_token") if self.raw.get(name)), None)

    @property
    def prefix_space(self) -> bool:
        """Whether a space is put before a byte-level text."""
        return bool(self.raw.get("add_prefix_space", False))

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.path}: {name} is {value!r}; it takes true or false")
        return value

    def extra_ids(self, default: int) -> int:
        """The number of sentinels, <extra_id_0> and so on."""
        value = self.raw.get("extra_ids", default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 10_000:
            raise ValueError(f"{self.path}: extra_ids is {value!r}; it takes 0 to 9999")
        return value

    def side(self, name: Literal["padding_side", "truncation_side"]) -> Literal["left", "right"]:
        value = self.raw.get(name, "right")
        if value not in ("left", "right"):
            raise ValueError(f"{self.path}: {name} is {value!r}; it takes 'left' or 'right'")
        return value

    @property
    def max_length(self) -> int | None:
        """The longest text in tokens; None if the files name none. (transformers writes 1e30 for no limit.)"""
        value = self.raw.get("model_max_length", self.raw.get("max_len"))
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 1:
            raise ValueError(f"{self.path}: model_max_length is {value!r}; it takes a number of at least 1")
        return int(value) if value < 2**31 else None

    def start_id(self, pad: int | None) -> int | None:
        """The token that a decoder of its own begins with."""
        value = self.model.get("decoder_start_token_id", pad)
        return value if isinstance(value, int) and not isinstance(value, bool) else pad

    def _named(self, raw: dict[str, Any], path: Path) -> dict[str, Added | None]:
        found: dict[str, Added | None] = {}
        for name in NAMES:
            if (key := f"{name}_token") in raw:
                found[name] = None if raw[key] is None else _token(raw[key], key, path)
        return found

    def _extra(self, raw: dict[str, Any], path: Path) -> list[Added]:
        value = raw.get("extra_special_tokens") or raw.get("additional_special_tokens") or []
        if isinstance(value, dict):  # name -> token
            value = list(value.values())
        if not isinstance(value, list):
            raise ValueError(f"{path}: additional_special_tokens is {value!r:.100}; it takes a list of tokens")
        return [_token(token, "additional_special_tokens", path) for token in value]

    def _decoder(self) -> dict[int, Added]:
        value, key = self.raw["added_tokens_decoder"], "added_tokens_decoder"
        if not isinstance(value, dict):
            raise ValueError(f"{self.path}: {key} is {value!r:.100}; it takes an object of ids and tokens")
        found = {}
        for index, token in value.items():
            if not index.isdecimal() or not isinstance(token, dict):
                raise ValueError(f"{self.path}: {key} has {index!r}: {token!r:.100}; it takes an id and an object")
            found[int(index)] = _token(
                {"special": False, "normalized": not token.get("special")} | token, key, self.path
            )
        return found

    def _older(self, path: Path) -> dict[int, Added]:
        special = {token.content for token in (*self.named.values(), *self.extra) if token is not None}
        found = {}
        for content, index in _read(path).items():
            if type(index) is not int or not 0 <= index < 2**31:
                raise ValueError(f"{path}: token {content!r} has the id {index!r}; it takes an integer of at least 0")
            found[index] = Added(content, special=content in special, normalized=content not in special)
        return found


def family_of_class(name: str | None) -> Family | None:
    """The family of a tokeniser's class such as T5Tokenizer, MT5Tokenizer or ByT5Tokenizer, or None."""
    prefix = (name or "").removesuffix("Tokenizer")
    if prefix == "ByT5":
        return FAMILIES["t5"]
    return next((family for family in FAMILIES.values() if prefix in family.hf_classes), None)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _token(value: Any, key: str, path: Path) -> Added:
    """A token of a file: its text, or an object with its text and flags."""
    if isinstance(value, str):
        return Added(value)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise ValueError(f"{path}: {key} is {value!r:.100}; it takes a token or null")
    flags = {name: value[name] for name in _FLAGS if name in value}
    if wrong := [name for name, flag in flags.items() if not isinstance(flag, bool)]:
        raise ValueError(f"{path}: {key}'s {wrong[0]} is {flags[wrong[0]]!r}; it takes true or false")
    return Added(value["content"], **flags)
