"""How does text become token ids and back, and how is a stream of ids printed as it comes?

The `tokenizers` library does the work, from any of the sets of files that presets have: byte-level BPE for GPT-2; a
SentencePiece model or bytes for T5, ALBERT and FNet (sentencepiece.py). GPT-2's words are split by OpenAI's own pattern, as in
transformers and in KerasHub with TensorFlow. KerasHub without TensorFlow uses another model's pattern: its ids differ in runs
of newlines and long digit strings, and GPT-2 was not trained on them.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyfused.checkpoints.diagnose import error_answer, looks_like
from pyfused.checkpoints.files import read_json
from pyfused.checkpoints.presets import resolve_preset
from pyfused.checkpoints.sentencepiece import SEPARATOR, SPACE, ByteBackend, end_of, piece_bytes, read_model
from pyfused.families import FAMILIES, of_hf_type

END_OF_TEXT = "<|endoftext|>"


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE's character -> its byte. Printable bytes stand for themselves, the others are chr(256), ..."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(hidden)}


_BYTES = _byte_of_character()


class Tokenizer:
    """Text to ids and back. Made by `load_tokenizer`; ``backend`` is the `tokenizers.Tokenizer` that does the work.

    kind: how the vocabulary writes tokens: "byte-level" characters, SentencePiece's "pieces", or single "bytes". The space of
    a text's first piece is not part of the text.
    """

    def __init__(self, backend: Any, end_token: str | None = END_OF_TEXT, kind: str = "byte-level") -> None:
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self._vocabulary_size = len(vocabulary)
        self._end_token_id = vocabulary.get(end_token) if end_token is not None else None
        written = _token_bytes if kind == "byte-level" else piece_bytes
        self._tokens = {index: written(token) for token, index in vocabulary.items()}
        self._drops_space = kind == "pieces"
        self._pairs = kind == "pieces" and end_token == SEPARATOR
        self._special = sorted(
            (token.content for token in backend.get_added_tokens_decoder().values()), key=len, reverse=True
        )
        self._missing: set[int] = set()
        if kind == "byte-level":
            self._missing = {byte for character, byte in _BYTES.items() if character not in vocabulary}

    @property
    def vocabulary_size(self) -> int:
        """The number of tokens, with added ones."""
        return self._vocabulary_size

    @property
    def end_token_id(self) -> int | None:
        """The token that ends a text, or None if the vocabulary has none."""
        return self._end_token_id

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``. A special token that is written out in it, such as <|endoftext|>, becomes its one id. T5's
        tokenisers add their end token, as its encoder expects. ALBERT's and FNet's add [CLS] before the text and [SEP]
        after it.

        Raises TypeError for anything but str. Raises ValueError for text that is not Unicode (lone surrogates) or that needs
        a byte missing from a reduced vocabulary.
        """
        self._check(text)
        ids: list[int] = self.backend.encode(text).ids
        return ids

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """The ids of [CLS] first [SEP] second [SEP], and their segment ids: 0 up to the first [SEP], then 1.

        Raises the errors of `encode`, and ValueError if the tokeniser is not ALBERT's or FNet's.
        """
        if not self._pairs:
            raise ValueError("this tokeniser makes no pairs; those of ALBERT and FNet do")
        self._check(first)
        self._check(second)
        encoding = self.backend.encode(first, second)
        return encoding.ids, encoding.type_ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens included. Bytes that are not UTF-8 become U+FFFD.

        Raises IndexError for an id that is not in the vocabulary.
        """
        parts = [self.token_bytes(index, first=not i) for i, index in enumerate(ids)]
        return b"".join(parts).decode("utf-8", errors="replace")

    def token_bytes(self, index: int, first: bool = False) -> bytes:
        """The bytes of one token; they may be part of a character. ``first``: whether the token begins a text. Raises
        IndexError for an unknown id."""
        try:
            content = self._tokens[int(index)]
            return content.removeprefix(b" ") if first and self._drops_space else content
        except KeyError:
            raise IndexError(f"token id {index} is not in the vocabulary of {self.vocabulary_size} tokens") from None

    def stream(self) -> StreamDecoder:
        """A decoder to feed one id after another."""
        return StreamDecoder(self)

    def _check(self, text: str) -> None:
        if not isinstance(text, str):
            raise TypeError(f"text must be str, got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"text has no UTF-8 form: {error}") from error
        if self._missing:
            self._check_known(text)

    def _check_known(self, text: str) -> None:
        for token in self._special:
            text = text.replace(token, "")
        for character in text:
            if self._missing.intersection(character.encode("utf-8")):
                raise ValueError(
                    f"text holds {character!r}, for which this vocabulary of {self.vocabulary_size} tokens has no token"
                )


class StreamDecoder:
    """Turns ids into text as they come. Holds back the bytes of a character until it is complete.

    The texts returned by `push` and, at the end, `finish` add up to exactly `Tokenizer.decode` of the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._first = tokenizer, True
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, index: int) -> str:
        """The text completed by this id; often empty within an emoji."""
        content = self._tokenizer.token_bytes(index, self._first)
        self._first = False
        return self._decoder.decode(content)

    def finish(self) -> str:
        """The rest: U+FFFD if the ids ended inside a character, else "". The decoder can then be used again."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._first = True
        return rest


def load_tokenizer(preset: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a preset (see `resolve_preset`), from the first of these files that it has.

    They are Hugging Face's tokenizer.json, vocab.json with merges.txt, or spiece.model; Keras's assets/tokenizer/
    vocabulary.json with merges.txt, or vocabulary.spm. ByT5 needs none: its configuration names its tokeniser's class.

    Raises ValueError naming the file if it is missing, damaged, or neither byte-level BPE nor a unigram SentencePiece model
    nor bytes. Raises ImportError without the `tokenizers` package.
    """
    directory = resolve_preset(preset, "tokenizer")
    if _hf_class(directory) == "ByT5Tokenizer":
        options = _options(directory)
        extra = options.get("extra_ids") or 125  # 0 means that the file lists them among the special tokens
        return Tokenizer(ByteBackend(_count(extra, directory)), "</s>", "bytes")
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(f"{directory}: text needs the tokenizers package: pip install 'pyfused[text]'") from error
    described = directory / "tokenizer.json"
    keras_config: dict[str, Any] | None = None
    if described.is_file():
        raw = read_json(described)
        if "model" in raw:
            return _from_description(tokenizers, described, raw)
        keras_config = _keras_config(raw, described)
    elif (directory / "vocab.json").is_file():
        end, prefix = _hf_options(directory)
        special = [end] if end is not None else []
        return _from_files(tokenizers, directory / "vocab.json", directory / "merges.txt", special, prefix, end)
    elif (directory / "spiece.model").is_file():
        extra = _count(_options(directory).get("extra_ids", 100), directory)
        backend = read_model(tokenizers, directory / "spiece.model", extra, **_rewriting(directory))
        return Tokenizer(backend, end_of(backend), "pieces")
    assets = directory / "assets" / "tokenizer"
    if (assets / "vocabulary.spm").is_file():
        backend = read_model(tokenizers, assets / "vocabulary.spm", 0)
        return Tokenizer(backend, end_of(backend), "pieces")
    if not (assets / "vocabulary.json").is_file():
        raise ValueError(
            f"{directory}: no tokenizer found; looked for tokenizer.json, vocab.json with merges.txt, spiece.model, "
            f"assets/tokenizer/vocabulary.json with merges.txt, and assets/tokenizer/vocabulary.spm"
        )
    config = keras_config or {}
    unsplittable = config.get("unsplittable_tokens")
    return _from_files(
        tokenizers,
        assets / "vocabulary.json",
        assets / "merges.txt",
        [END_OF_TEXT] if unsplittable is None else unsplittable,
        config.get("add_prefix_space", False),
        END_OF_TEXT,
    )


def _from_description(tokenizers: Any, path: Path, raw: dict[str, Any]) -> Tokenizer:
    model = raw["model"]
    kind = model.get("type", "Unigram" if "unk_id" in model else "BPE") if isinstance(model, dict) else None
    decoder = raw.get("decoder")
    parts = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
    steps = [part.get("type") for part in parts if isinstance(part, dict)]
    metaspace = next((part for part in parts if isinstance(part, dict) and part.get("type") == "Metaspace"), {})
    pieces = kind == "Unigram" and steps in (["Metaspace"], ["ByteFallback", "Metaspace"])
    if not pieces and (kind != "BPE" or steps != ["ByteLevel"]):
        raise ValueError(
            f"{path}: neither byte-level BPE nor a unigram model: the model is {kind!r}, the decoder {decoder!r:.100}"
        )
    if pieces:
        always = metaspace.get("prepend_scheme", "always" if metaspace.get("add_prefix_space", True) else "never")
        if metaspace.get("replacement") != SPACE or always == "never":
            raise ValueError(
                f"{path}: the decoder is {metaspace!r}; pyfused reads Metaspace with {SPACE!r} before each text"
            )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: cannot be read as a tokenizer: {error}{looks_like(path)}") from error
    end, _ = _hf_options(path.parent, end_of(backend) if pieces else END_OF_TEXT)
    if end is not None and backend.token_to_id(end) is None:
        raise ValueError(f"{path}: the end token {end!r} of tokenizer_config.json is not in the vocabulary")
    if pieces:
        return Tokenizer(backend, end, "pieces")
    return Tokenizer(backend, end or END_OF_TEXT)


def _from_files(
    tokenizers: Any, vocabulary_file: Path, merges_file: Path, special: Any, prefix: Any, end: str | None
) -> Tokenizer:
    vocabulary = read_json(vocabulary_file)
    for token, index in vocabulary.items():
        if type(index) is not int or not 0 <= index < 2**31:
            raise ValueError(
                f"{vocabulary_file}: token {token!r} has the id {index!r}; it takes an integer of at least 0"
            )
    if len(set(vocabulary.values())) != len(vocabulary):
        raise ValueError(f"{vocabulary_file}: two tokens have the same id")
    if not isinstance(special, list) or not all(isinstance(token, str) for token in special):
        raise ValueError(f"{vocabulary_file}: the unsplittable tokens are {special!r}; they take a list of str")
    for token in special:
        if token not in vocabulary:
            raise ValueError(f"{vocabulary_file}: the special token {token!r} is missing")
    merges = _merges(merges_file, vocabulary)
    if not merges and any(len(token) > 1 and token not in special for token in vocabulary):
        raise ValueError(
            f"{merges_file}: no merges, and {vocabulary_file.name} has tokens of several characters{looks_like(merges_file)}"
        )
    try:
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:
        raise ValueError(f"{vocabulary_file}, {merges_file}: {error}") from error
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(special)
    return Tokenizer(backend, end)


def _merges(path: Path, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}{looks_like(path)}") from error
    merges = []
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or any(token not in vocabulary for token in (*pair, "".join(pair))):
            raise ValueError(
                f"{path}: line {number}, {line!r:.100}, is not a pair of tokens that merge into a third{looks_like(path)}"
            )
        merges.append((pair[0], pair[1]))
    return merges


def _options(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def _hf_class(directory: Path) -> str | None:
    """The tokeniser's class, as named by either of Hugging Face's configurations."""
    path = directory / "config.json"
    name = _options(directory).get("tokenizer_class") or (read_json(path) if path.is_file() else {}).get(
        "tokenizer_class"
    )
    return name.removesuffix("Fast") if isinstance(name, str) else None


def _rewriting(directory: Path) -> dict[str, bool]:
    """How `read_model` changes an encoder's text. Unless a file says otherwise, FNet keeps case and accents, ALBERT neither."""
    options, path = _options(directory), directory / "tokenizer_config.json"
    by_type = of_hf_type(_model_type(directory))
    by_class = [f for f in FAMILIES.values() if _hf_class(directory) == f"{f.keras_name}Tokenizer"]
    keeps = any(family is not None and family.keeps_case for family in (by_type, *by_class))
    lower, keep_accents = options.get("do_lower_case", not keeps), options.get("keep_accents", keeps)
    for name, value in (("do_lower_case", lower), ("keep_accents", keep_accents)):
        if not isinstance(value, bool):
            raise ValueError(f"{path}: {name} is {value!r}; it takes true or false")
    return {"lower": lower, "strip": not keep_accents, "quotes": True, "split_first": True}


def _model_type(directory: Path) -> Any:
    path = directory / "config.json"
    return read_json(path).get("model_type") if path.is_file() else None


def _count(value: Any, directory: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 10_000:
        raise ValueError(f"{directory / 'tokenizer_config.json'}: extra_ids is {value!r}; it takes 0 to 9999")
    return value


def _hf_options(directory: Path, default: str = END_OF_TEXT) -> tuple[str | None, bool]:
    """(end token, whether a space is added before a text) from tokenizer_config.json, or else the model's defaults."""
    path = directory / "tokenizer_config.json"
    raw = _options(directory)
    if default == END_OF_TEXT and (raw.get("add_bos_token") or raw.get("add_eos_token")):
        raise ValueError(
            f"{path}: add_bos_token or add_eos_token is on; pyfused adds no tokens: put them into the text"
        )
    end = raw.get("eos_token", default)
    end = end.get("content") if isinstance(end, dict) else end
    if end is not None and not isinstance(end, str):
        raise ValueError(f"{path}: eos_token is {end!r}; it takes a token or null")
    return end, bool(raw.get("add_prefix_space", False))


def _keras_config(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    name, config = raw.get("class_name"), raw.get("config")
    known = [f"{family.keras_name}Tokenizer" for family in FAMILIES.values()]
    if name not in known or not isinstance(config, dict):
        raise ValueError(
            f"{path}: the class is {name!r}; pyfused reads {', '.join(known)}, or a tokenizer.json of Hugging "
            f"Face{error_answer(raw)}"
        )
    if config.get("add_bos"):
        raise ValueError(f"{path}: add_bos is on; pyfused adds no token before a text")
    if config.get("sequence_length") is not None:
        raise ValueError(
            f"{path}: sequence_length is {config['sequence_length']!r}; pyfused neither pads nor cuts: set it to null"
        )
    return config


def _token_bytes(token: str) -> bytes:
    """The bytes of a byte-level token. An added token with characters outside the alphabet is itself, in UTF-8."""
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:
        return token.encode("utf-8")
