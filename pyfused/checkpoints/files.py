"""How are the small files of an untrusted checkpoint read?

JSON has a size limit and no duplicate keys, every option's type is checked, and shard names cannot leave the directory.
Every error is a ValueError that starts with the file's path. Unknown options cause a warning.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pyfused.checkpoints.diagnose import looks_like

LARGEST_VOCABULARY = 32 << 20  # bytes; mT5's tokenizer.json has 16 MB
_LARGEST_JSON = 4 << 20  # the index of the largest sharded models is about 1 MB
_ABSENT = object()


def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """``object_pairs_hook`` for json. Refuses a repeated key: two readers could take different values."""
    result = dict(pairs)
    if len(result) != len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {name!r:.200} occurs twice")
    return result


def read_json(path: Path, largest: int = _LARGEST_JSON) -> dict[str, Any]:
    """The JSON object in ``path``. Raises ValueError naming the file if there is none, or more than ``largest`` bytes."""
    try:
        size = path.stat().st_size
        if size > largest:
            raise ValueError(f"{size} bytes; at most {largest} are read as JSON")
        content = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=reject_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}{looks_like(path)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a JSON {type(content).__name__}, not an object")
    return content


def json_bytes(content: Mapping[str, Any], sort_keys: bool = False) -> bytes:
    """The content of a JSON file that pyfused writes."""
    return (json.dumps(content, indent=2, sort_keys=sort_keys, ensure_ascii=False) + "\n").encode("utf-8")


def shard_path(index: Path, name: object, suffix: str) -> Path:
    """The path of the shard ``name``. It must be the plain name of a file beside the index, not a path."""
    if isinstance(name, str) and any(character in name for character in "/\\:\0"):
        raise ValueError(f"{index}: names the shard {name!r}, which is a path; shards lie beside their index")
    if not isinstance(name, str) or not name.endswith(suffix) or name.startswith("."):
        raise ValueError(f"{index}: names the shard {name!r}; a shard is the plain name of a {suffix} file")
    path = index.parent / name
    if not path.is_file():
        raise ValueError(f"{path}: missing, although {index.name} lists it; download it")
    return path


class Options:
    """Takes options out of a configuration one by one. `finish` warns about the unknown ones that are left."""

    def __init__(self, raw: dict[str, Any], file: Path) -> None:
        self._left = dict(raw)
        self.file = file

    def _fail(self, name: str, value: object, takes: str) -> ValueError:
        return ValueError(f"{self.file}: {name} is {value!r:.200}; it takes {takes}")

    def raw(self, name: str, default: Any = _ABSENT, aliases: Iterable[str] = ()) -> Any:
        """The value under ``name`` or one of its aliases. Raises ValueError if two of them disagree."""
        found = {key: self._left.pop(key) for key in (name, *aliases) if key in self._left}
        if not found:
            if default is _ABSENT:
                raise ValueError(f"{self.file}: {name} is missing")
            return default
        key, value = next(iter(found.items()))
        for other, also in found.items():
            if also != value:
                raise ValueError(f"{self.file}: {key} is {value!r} but {other}, another name for it, is {also!r}")
        return value

    def integer(self, name: str, default: Any = _ABSENT, aliases: Iterable[str] = ()) -> int:
        value = self.raw(name, default, aliases)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            raise self._fail(name, value, "an integer from 1 to 2**31 - 1")
        return value

    def number(self, name: str, default: Any = _ABSENT, high: float = math.inf) -> float:
        value = self.raw(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._fail(name, value, "a number")
        if not math.isfinite(value) or not 0 <= value <= high:
            raise self._fail(
                name, value, "a finite number of at least 0" + (f" and at most {high}" if high < math.inf else "")
            )
        return float(value)

    def boolean(self, name: str, default: Any = _ABSENT) -> bool:
        value = self.raw(name, default)
        if not isinstance(value, bool):
            raise self._fail(name, value, "true or false")
        return value

    def refuse(self, table: Mapping[str, Refused]) -> None:
        """Raises ValueError for an option in the table that is on: it changes the outputs."""
        for name, refused in table.items():
            value = self._left.pop(name, None)
            if value and value != refused.off:
                raise ValueError(f"{self.file}: {name} is {value!r:.200}; {refused.why}")

    def finish(self, silent: Iterable[str] = (), prefixes: tuple[str, ...] = ()) -> None:
        """Warns once about the options left over. ``silent`` and ``prefixes`` have no effect on the outputs."""
        known = set(silent)
        unknown = sorted(name for name in self._left if name not in known and not name.startswith(prefixes or ("\0",)))
        if unknown:
            values = ", ".join(f"{name}={self._left[name]!r:.60}" for name in unknown)
            note(f"{self.file}: pyfused does not know these options and leaves them unread: {values}")


class Refused(NamedTuple):
    """Why an option is refused, and which value turns it off (beside null, false, 0 and anything empty)."""

    why: str
    off: Any = None


def note(message: str) -> None:
    """Warns about a checkpoint. The warning shows the line that called pyfused."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("pyfused."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
