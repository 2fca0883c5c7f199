"""Which tensors of a Hugging Face file belong to the backbone, and what are the others?

Names begin with a prefix if the model had a head, was wrapped (DataParallel, torch.compile, FSDP) or was part of another
model. Tensors outside the backbone are left unread, with one warning. A tensor inside the backbone that the model does not
have is an error, and so is an unknown prefix.
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

# A wrapper's name stands before that of the wrapped module, which may be in the middle of a tensor's name
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
    """A file's tensors, sorted.

    entries: the backbone's, by their names without prefix.
    unknown: how many more tensors of the backbone stand under each unknown prefix.
    others: the names of all other tensors.
    """

    entries: dict[str, Entry]
    unknown: Counter[str]
    others: list[str]


def find(entries: dict[str, Entry], plan: Plan, maps: ModuleType) -> Found:
    """Finds the backbone's tensors among a file's. ``plan`` holds every tensor that the backbone may have.

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
        for prefix, name in _splits(stored):
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
            inside = _name_inside(stored, roots)
            if inside is None:
                others.append(stored)
            else:
                found.setdefault(inside, entry)
    found = _without_copies(found, maps)
    return Found(found, Counter(prefix for prefix, short in unknown if short not in found), others)


def check_prefix(found: Found, missing: list[str], files: list[Path]) -> None:
    """Raises ValueError if tensors are missing and the file has tensors of those names under an unknown prefix."""
    if missing and found.unknown:
        prefix, count = found.unknown.most_common(1)[0]
        raise ValueError(
            f"{', '.join(map(str, files))}: {count} tensors of the model begin with {prefix!r}; pyfused knows the prefixes "
            f"{', '.join(sorted(_PREFIXES | _WRAPPERS))}: remove {prefix!r} from the names"
        )


def note_others(found: Found, directory: Path) -> None:
    """Warns once about the tensors that are left unread."""
    if found.others:
        more = f" and {len(found.others) - _SHOWN} more" if len(found.others) > _SHOWN else ""
        names = ", ".join(found.others[:_SHOWN])
        note(f"{directory}: tensors outside the backbone, such as a head's, are left unread: {names}{more}")


def _splits(stored: str) -> Iterator[tuple[list[str], str]]:
    """Every split of a stored name into (prefix, name), the shortest prefix first."""
    parts = [part for part in stored.split(".") if part not in _WRAPPERS]
    parts[-1:] = [_ENDINGS.get(part, part) for part in parts[-1:]]
    for i in range(len(parts)):
        yield parts[:i], ".".join(parts[i:])


def _name_inside(stored: str, roots: set[str]) -> str | None:
    """The name without prefix if the tensor is inside the backbone, known or not; None if it is outside."""
    for prefix, name in _splits(stored):
        if not set(prefix) <= _PREFIXES:
            return None
        if name.split(".")[0] in roots:
            return name
    return None


def _check_kind(stored: str, entry: Entry) -> None:
    if _QUANTISED.fullmatch(stored):
        raise ValueError(
            f"{entry} belongs to quantised weights, but pyfused reads floating-point weights: load the checkpoint that they "
            f"were quantised from"
        )
    if _ADAPTER.fullmatch(stored):
        raise ValueError(
            f"{entry} belongs to an adapter: merge it into the model with peft's merge_and_unload, then save_pretrained"
        )


def _without_copies(found: dict[str, Entry], maps: ModuleType) -> dict[str, Entry]:
    """Drops tied copies of the token embedding. If the file holds only copies, the first becomes the embedding."""
    copies = {name: found[name] for name in maps.HF_COPIES if name in found}
    found = {name: entry for name, entry in found.items() if name not in copies}
    if maps.HF_EMBEDDING not in found and copies:
        first, *rest = copies.values()
        for other in rest:
            if not same_values(first, other):
                raise ValueError(f"{first} and {other.name!r} differ, and there is no {maps.HF_EMBEDDING!r}")
        found[maps.HF_EMBEDDING] = first
    return found


def settle_pooler(config: dict[str, Any], entries: dict[str, Entry]) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Sets ``pooler`` from the weight files; the configuration does not say. Masked language models are saved without one."""
    return config | {"pooler": any(name.startswith("pooler.") for name in entries)}, entries


def settle_head(
    config: dict[str, Any], entries: dict[str, Entry], head_name: str, embedding_name: str
) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Decides from the files whether the output matrix is the token embedding, and drops a redundant head.

    A file without a head means tied, whatever the configuration says. If the configuration says tied:
    - a head without an embedding is both;
    - if the two matrices differ, both are used, as in transformers. This causes a warning, unless the configuration says that
      logits are not scaled, as T5's may: only models with a head of their own want that.
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
