"""From which files is a tokeniser made? From any set that presets of both formats have.

The first of these counts: Hugging Face's tokenizer.json, vocab.json with merges.txt, or spiece.model; Keras's
assets/tokenizer/vocabulary.json with merges.txt, or vocabulary.spm. ByT5 needs none: its configuration names its
tokeniser's class. GPT-2's words are split by OpenAI's own pattern, as in transformers and in KerasHub with TensorFlow.
KerasHub without TensorFlow uses another model's pattern: its ids differ in runs of newlines and long digit strings, and GPT-2
was not trained on them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pyfused.checkpoints.diagnose import error_answer, looks_like
from pyfused.checkpoints.files import LARGEST_VOCABULARY, read_json
from pyfused.checkpoints.sentencepiece import SEPARATOR, START, add_tokens, read_model, surroundings
from pyfused.checkpoints.tokenizer_bytes import SPACE, ByteBackend, Kind
from pyfused.checkpoints.tokenizer_options import NAMES, Added, TokenizerOptions, family_of_class
from pyfused.families import FAMILIES, Family

END_OF_TEXT = "<|endoftext|>"
_DEFAULTS = {
    "byte-level": {"bos": END_OF_TEXT, "eos": END_OF_TEXT, "unk": END_OF_TEXT},
    "encoder": {"bos": START, "eos": SEPARATOR, "unk": "<unk>", "sep": SEPARATOR, "pad": "<pad>", "cls": START,
                "mask": "[MASK]"},
    "pieces": {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"},
    "bytes": {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"},
}  # fmt: skip


class TokenizerFiles(NamedTuple):
    """What a folder's files make: the `tokenizers.Tokenizer`, the kind of its vocabulary, the tokens with a name ({"eos":
    "</s>", ...}), the model's family if it can be told, and the options."""

    backend: Any
    kind: Kind
    names: dict[str, str]
    family: Family | None
    options: TokenizerOptions


def read_tokenizer(directory: Path) -> TokenizerFiles:
    """Raises ValueError naming the file if it is missing, damaged, or neither byte-level BPE nor a unigram SentencePiece model
    nor bytes. Raises ImportError without the `tokenizers` package."""
    options = TokenizerOptions(directory)
    if options.hf_class == "ByT5Tokenizer":
        extra = options.extra_ids(125) or 125  # 0 means that the file lists them among the special tokens
        return _named(ByteBackend(extra), "bytes", options)
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(f"{directory}: text needs the tokenizers package: pip install 'pyfused[text]'") from error
    described, assets = directory / "tokenizer.json", directory / "assets" / "tokenizer"
    config: dict[str, Any] = {}
    if described.is_file():
        raw = read_json(described, LARGEST_VOCABULARY)
        if "model" in raw:
            return _from_description(tokenizers, described, raw, options)
        config = _keras_config(raw, described)
        options.family = options.family or family_of_class(raw["class_name"])
    elif (directory / "vocab.json").is_file():
        return _from_hf_pairs(tokenizers, directory, options)
    elif (directory / "spiece.model").is_file():
        return _from_hf_model(tokenizers, directory / "spiece.model", options)
    if (assets / "vocabulary.spm").is_file():
        return _named(read_model(tokenizers, assets / "vocabulary.spm", 0), "pieces", options)
    if not (assets / "vocabulary.json").is_file():
        raise ValueError(
            f"{directory}: no tokenizer found; looked for tokenizer.json, vocab.json with merges.txt, spiece.model, "
            f"assets/tokenizer/vocabulary.json with merges.txt, and assets/tokenizer/vocabulary.spm"
        )
    unsplittable = config.get("unsplittable_tokens")
    special = [END_OF_TEXT] if unsplittable is None else unsplittable
    prefix_space = config.get("add_prefix_space", False)
    return _named(_byte_level(tokenizers, assets / "vocabulary.json", prefix_space, special), "byte-level", options)


def _named(backend: Any, kind: Kind, options: TokenizerOptions, encoder: bool | None = None) -> TokenizerFiles:
    """Gives tokens their names: what the files say, or else the family's defaults that the vocabulary has."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if encoder is None:
        encoder = kind == "pieces" and START in vocabulary and SEPARATOR in vocabulary
    names = {n: t for n, t in _DEFAULTS["encoder" if encoder else kind].items() if t in vocabulary}
    for name, token in options.named.items():
        names.pop(name, None)
        if token is not None and token.content in vocabulary:
            names[name] = token.content
    family = options.family or (None if encoder else FAMILIES["gpt2" if kind == "byte-level" else "t5"])
    return TokenizerFiles(backend, kind, {name: names[name] for name in NAMES if name in names}, family, options)


def _from_description(tokenizers: Any, path: Path, raw: dict[str, Any], options: TokenizerOptions) -> TokenizerFiles:
    pieces = _kind_of(path, raw) == "pieces"
    if not pieces:
        _check_no_tokens_added(options)
    changed, made = _with_added(raw, options), tokenizers.Tokenizer
    try:
        backend = made.from_str(json.dumps(raw)) if changed else made.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: cannot be read as a tokenizer: {error}{looks_like(path)}") from error
    _check_end(path, backend.get_vocab(with_added_tokens=True), options)
    add_tokens(backend, _added_tokens(tokenizers, options))
    _check_ids(backend, options)
    if pieces:
        t5 = options.is_class("T5Tokenizer", "MT5Tokenizer")
        if t5 and backend.token_to_id("</s>") is not None:  # as transformers does, whatever the file says
            backend.post_processor = surroundings(tokenizers, backend, encoder=False)
        return _named(backend, "pieces", options, encoder=False if t5 else None)
    split = raw.get("pre_tokenizer") or {}
    plain = split.get("type") == "ByteLevel" and options.is_class("GPT2Tokenizer")
    if plain and split.get("add_prefix_space") != options.prefix_space:  # likewise
        use_regex = split.get("use_regex", True)
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(options.prefix_space, use_regex=use_regex)
    return _named(backend, "byte-level", options)


def model_kind(raw: dict[str, Any]) -> str | None:
    """The kind of model in a tokenizer.json, such as "BPE"; None if there is none."""
    model = raw.get("model")
    return model.get("type", "Unigram" if "unk_id" in model else "BPE") if isinstance(model, dict) else None


def _kind_of(path: Path, raw: dict[str, Any]) -> Kind:
    """Raises ValueError for other models than byte-level BPE and SentencePiece's unigrams with a space before each text."""
    kind, decoder = model_kind(raw), raw.get("decoder")
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
    return "pieces" if pieces else "byte-level"


def _with_added(raw: dict[str, Any], options: TokenizerOptions) -> bool:
    """Writes the tokens of added_tokens_decoder over those of tokenizer.json. Returns whether anything changed."""
    listed = raw.get("added_tokens")
    if "added_tokens_decoder" not in options.raw or not isinstance(listed, list):
        return False
    changed = False
    for entry in listed:
        token = options.added.get(entry.get("id", -1)) if isinstance(entry, dict) else None
        if token is not None and entry != (new := {"id": entry["id"], **vars(token)}):
            entry.clear()
            entry.update(new)
            changed = True
    return changed


def _from_hf_pairs(tokenizers: Any, directory: Path, options: TokenizerOptions) -> TokenizerFiles:
    _check_no_tokens_added(options)
    end, added = options.named.get("eos", Added(END_OF_TEXT)), [token.content for token in options.added.values()]
    special = [] if end is None or end.content in added else [end.content]
    tokens = _added_tokens(tokenizers, options)
    backend = _byte_level(tokenizers, directory / "vocab.json", options.prefix_space, special, tokens)
    _check_ids(backend, options)
    return _named(backend, "byte-level", options)


def _from_hf_model(tokenizers: Any, path: Path, options: TokenizerOptions) -> TokenizerFiles:
    """Unless a file says otherwise, FNet's tokeniser keeps case and accents, ALBERT's neither."""
    by_class = [f for f in FAMILIES.values() if options.hf_class == f"{f.keras_name}Tokenizer"]
    keeps = any(family is not None and family.keeps_case for family in (options.family, *by_class))
    lower, keep_accents = options.flag("do_lower_case", not keeps), options.flag("keep_accents", keeps)
    encoder = False if options.hf_class in ("T5Tokenizer", "MT5Tokenizer") else None
    backend = read_model(
        tokenizers, path, options.extra_ids(100), added=_added_tokens(tokenizers, options), encoder=encoder, lower=lower,
        strip=not keep_accents, quotes=True, split_first=True,
    )  # fmt: skip
    _check_end(path, backend.get_vocab(with_added_tokens=False), options)
    _check_ids(backend, options)
    return _named(backend, "pieces", options, encoder)


def _added_tokens(tokenizers: Any, options: TokenizerOptions) -> list[Any]:
    """The tokens of the files beside the vocabulary, in transformers' order: by id, then the named, then the others."""
    by_id = [token for _, token in sorted(options.added.items())]
    named = [token for token in options.named.values() if token is not None]
    found = []
    for token in (*by_id, *named, *options.extra):
        flags = {name: value for name, value in vars(token).items() if name != "content"}
        found.append(tokenizers.AddedToken(token.content, **flags))
    return found


def _check_ids(backend: Any, options: TokenizerOptions) -> None:
    """An added token that the vocabulary lacks gets the next free id, whatever a file says."""
    for index, token in options.added.items():
        if (got := backend.token_to_id(token.content)) != index:
            raise ValueError(
                f"{options.path.parent}: the added token {token.content!r} has the id {index}; the vocabulary gives it {got}"
            )


def _check_end(path: Path, vocabulary: dict[str, int], options: TokenizerOptions) -> None:
    """Generation would never stop at an end token that the model has not learnt."""
    end, added = options.named.get("eos"), [token.content for token in options.added.values()]
    if end is not None and end.content not in vocabulary and end.content not in added:
        raise ValueError(f"{path}: the end token {end.content!r} of {options.path.name} is not in the vocabulary")


def _check_no_tokens_added(options: TokenizerOptions) -> None:
    if name := options.adds_tokens:
        raise ValueError(
            f"{options.path}: {name} is on; pyfused adds no tokens to GPT-2's texts: put them into the text"
        )


def _byte_level(
    tokenizers: Any, vocabulary_file: Path, prefix_space: Any, special: Any, added: Sequence[Any] = ()
) -> Any:
    """GPT-2's tokeniser, made from the vocabulary and the merges beside it. special: tokens that it must have."""
    vocabulary, merges_file = read_json(vocabulary_file, LARGEST_VOCABULARY), vocabulary_file.parent / "merges.txt"
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
    merges, whole = _merges(merges_file, vocabulary), {*special, *(token.content for token in added)}
    if not merges and any(len(token) > 1 and token not in whole for token in vocabulary):
        raise ValueError(
            f"{merges_file}: no merges, and {vocabulary_file.name} has tokens of several characters{looks_like(merges_file)}"
        )
    try:
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:
        raise ValueError(f"{vocabulary_file}, {merges_file}: {error}") from error
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix_space))
    backend.decoder = tokenizers.decoders.ByteLevel()
    add_tokens(backend, added)
    backend.add_special_tokens(special)
    return backend


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
