"""Which tensor of a Hugging Face file is which of the backbone's, and what are the others?

A file may be of a model with a head, of one that was wrapped (DataParallel, torch.compile, FSDP), or of one inside another:
its names then begin with a prefix. What lies outside the backbone is named in a warning and left; what lies inside it and
has no place there is refused, as is a prefix that nobody here knows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pyfused.checkpoints.files import note
from pyfused.checkpoints.plan import Plan
from pyfused.checkpoints.storage import Entry, same_values

# Wrappers put their name in front of whatever they wrap, which may be a part in the middle
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PREFIXES = {
    "transformer", "model", "encoder", "gpt2", "albert", "t5", "fnet", "base_model", "backbone", "pretrained_model",
    "auto_model",
}  # fmt: skip
_ENDINGS = {"gamma": "weight", "beta": "bias"}  # of norms, in files converted from TensorFlow

_SHOWN = 20  # names in a warning; a head has ten at most

_QUANTISED = re.compile(
    r"(.*\.)?(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*|SCB|qweight|qzeros|g_idx|weight_packed|"
    r"scale_weight|weight_scale|weight_scale_inv|input_scale|scaled_fp8)"
)
_ADAPTER = re.compile(r".*\.(lora_\w+|base_layer|modules_to_save)\..*")


@dataclass(frozen=True)
class Found:
    """What a file holds: the tensors of the backbone by their names there, the prefixes, unknown here, of more such tensors,
    and the names of all others."""

    entries: dict[str, Entry]
    unknown: Counter[str]
    others: list[str]


def find(entries: dict[str, Entry], plan: Plan, maps: ModuleType) -> Found:
    """Finds the backbone that ``plan`` describes, with every tensor that it may have, in a file's tensors.

    Raises ValueError for quantised weights, adapters, and one tensor under two names.
    """
    wanted = {piece.name for target in plan.values() for piece in target.pieces}
    roots = {name.split(".")[0] for name in wanted}
    known = wanted | set(maps.HF_COPIES)
    buffers = [re.compile(pattern) for pattern in maps.HF_BUFFERS]
    found: dict[str, Entry] = {}
    unknown: list[tuple[str, str]] = []
    others = []
    for stored, entry in entries.items():
        _check_kind(stored, entry)
        for prefix, name in _cuts(stored):
            bare = maps.HF_BARE + name
            short = name if name in known else bare if maps.HF_BARE and bare in known else None
            if short is not None and set(prefix) <= _PREFIXES:
                if short in found:
                    raise ValueError(f"{entry} and tensor {found[short].name!r} are the same weight under two names")
                found[short] = entry
                break
            if any(pattern.fullmatch(name) for pattern in buffers):
                break
            if short is not None:
                unknown.append((".".join(prefix) + ".", short))
        else:
            inside = _inside(stored, roots)
            if inside is None:
                others.append(stored)
            else:
                found.setdefault(inside, entry)
    found = _without_copies(found, maps)
    return Found(found, Counter(prefix for prefix, short in unknown if short not in found), others)


def check_prefix(found: Found, missing: list[str], files: list[Path]) -> None:
    """Raises ValueError where tensors are missing and there are such ones under a prefix that is unknown here."""
    if missing and found.unknown:
        prefix, count = found.unknown.most_common(1)[0]
        raise ValueError(
            f"{', '.join(map(str, files))}: {count} tensors of the model begin with {prefix!r}; pyfused takes the prefixes "
            f"{', '.join(sorted(_PREFIXES | _WRAPPERS))}: take {prefix!r} off the names"
        )


def note_others(found: Found, directory: Path) -> None:
    """Names in one warning the tensors that are left unread."""
    if found.others:
        more = f" and {len(found.others) - _SHOWN} more" if len(found.others) > _SHOWN else ""
        names = ", ".join(found.others[:_SHOWN])
        note(f"{directory}: tensors that are no part of the backbone, such as a head's, are left unread: {names}{more}")


def _cuts(stored: str) -> Iterator[tuple[list[str], str]]:
    """Every division of a name into a prefix and a name, the shortest prefix first."""
    parts = [part for part in stored.split(".") if part not in _WRAPPERS]
    parts[-1:] = [_ENDINGS.get(part, part) for part in parts[-1:]]
    for i in range(len(parts)):
        yield parts[:i], ".".join(parts[i:])


def _inside(stored: str, roots: set[str]) -> str | None:
    """The name within the backbone of a tensor that has no place there; None for one outside."""
    for prefix, name in _cuts(stored):
        if not set(prefix) <= _PREFIXES:
            return None
        if name.split(".")[0] in roots:
            return name
    return None


def _check_kind(stored: str, entry: Entry) -> None:
    if _QUANTISED.fullmatch(stored):
        raise ValueError(
            f"{entry} belongs to quantised weights, and pyfused reads floating-point weights: load the checkpoint that they "
            f"were quantised from"
        )
    if _ADAPTER.fullmatch(stored):
        raise ValueError(
            f"{entry} belongs to an adapter: merge it into the model with peft's merge_and_unload, then save_pretrained"
        )


def _without_copies(found: dict[str, Entry], maps: ModuleType) -> dict[str, Entry]:
    """Drops the tied copies of the embedding; one stands for it in a file that was saved without duplicates."""
    copies = {name: found[name] for name in maps.HF_COPIES if name in found}
    found = {name: entry for name, entry in found.items() if name not in copies}
    if maps.HF_EMBEDDING not in found and copies:
        first, *rest = copies.values()
        for other in rest:
            if not same_values(first, other):
                raise ValueError(f"{first} and {other.name!r} differ, and there is no {maps.HF_EMBEDDING!r}")
        found[maps.HF_EMBEDDING] = first
    return found


def settle_head(
    config: dict[str, Any], entries: dict[str, Entry], head_name: str, embedding_name: str
) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Decides from the files whether the output matrix is the token embedding, and drops a redundant head.

    Files of a model without a head have none whatever the configuration says. Where the configuration ties, a head alone
    is the embedding too. Where it ties but the file holds two different matrices, the file is right, as it is for
    transformers; that is worth a warning, unless the configuration says (T5's does) that the logits are not scaled, which
    only models with a head of their own want.
    """
    head, embedding = entries.get(head_name), entries.get(embedding_name)
    untied = head is not None and not config["tie_embedding_weights"]
    if head is not None and embedding is None and not untied:
        entries = entries | {embedding_name: head}
    if head is not None and embedding is not None and not untied:
        untied = not same_values(head, embedding)
        if untied and config.get("scale_logits", True):
            note(f"{head} differs from {embedding.name!r} although the configuration ties them; it is used")
    if not untied:
        entries = {name: entry for name, entry in entries.items() if name != head_name}
    return config | {"tie_embedding_weights": not untied}, entries
