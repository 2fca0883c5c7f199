"""How do files come from Hugging Face? Through huggingface_hub, which no other file imports.

The client keeps what it gets in a cache of its own, under the name of its hash, and moves a file there when it has the right
size. It does not compare the hash; that is done here.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from pyfused.checkpoints import progress
from pyfused.checkpoints.hub_errors import Service, describe, failure

PREFIX = "hf://"
_HANDLE = re.compile(r"([\w.-]+/[\w.-]+)(?:@(\S+))?")
_alone = threading.Lock()  # the client logs less during a download, which two threads could not undo in turn
_RESTARTS = 5  # of one file from its first byte, by a server that breaks off and cannot resume


def parse(handle: str) -> tuple[str, str | None]:
    """The repository and the revision of ``hf://owner/repo[@revision]``. Raises ValueError for anything else."""
    found = _HANDLE.fullmatch(handle.removeprefix(PREFIX))
    if not found or ".." in (found[2] or "").split("/"):
        raise ValueError(
            f"preset is {handle!r}; a Hugging Face repository is written hf://owner/repo or hf://owner/repo@revision, where "
            f"the revision is a branch, a tag or a commit"
        )
    return found[1], found[2]


def download(handle: str, patterns: Iterable[str]) -> Path:
    """The directory with those files of a repository that match a pattern. They are downloaded if the cache lacks them.

    Raises ValueError for whatever goes wrong, ImportError without the client.
    """
    repo, revision = parse(handle)
    hub = _client(handle)
    known = _blobs(repo)
    progress.say(f"fetching {handle}")
    bars: Any = _part("utils").tqdm

    class Bar(bars):
        """The client's bar. It ends a download that begins again and again, which the client goes on with for ever."""

        restarts = 0

        def update(self, n: float | None = 1) -> Any:
            if n is not None and n < 0:
                self.restarts += 1
                if self.restarts > _RESTARTS:
                    raise ConnectionError(f"the server broke off {_RESTARTS} times and does not resume")
            return super().update(n)

    try:
        with _alone, _calm():
            path = hub.snapshot_download(repo_id=repo, revision=revision, allow_patterns=list(patterns), tqdm_class=Bar)
    except Exception as error:
        raise ValueError(f"{handle}: cannot be downloaded: {describe(failure(error), _service())}") from error
    _check_hashes(handle, Path(path), known)
    return Path(path)


def cached(handle: str, patterns: Iterable[str]) -> Path | None:
    """The directory of what an earlier download left in the cache; None if that is not all of it, or without the client."""
    repo, revision = parse(handle)
    try:
        hub = _client(handle)
        path = hub.snapshot_download(
            repo_id=repo, revision=revision, allow_patterns=list(patterns), local_files_only=True
        )
    except Exception:
        return None
    return Path(path)


def files_of(handle: str) -> list[str]:
    """The names of all files in the repository; [] if they cannot be asked for."""
    repo, revision = parse(handle)
    try:
        return sorted(_client(handle).HfApi().list_repo_files(repo, revision=revision))
    except Exception:
        return []


def _client(handle: str) -> Any:
    try:
        return import_module("huggingface_hub")
    except ImportError as error:
        raise ImportError(
            f"{handle} needs the Hugging Face hub's client, huggingface_hub: pip install 'pyfused[hub]'"
        ) from error


def _part(name: str) -> Any:
    return import_module(f"huggingface_hub.{name}")


def _service() -> Service:
    place = str(_part("constants").ENDPOINT)
    return Service("Hugging Face", place, "log in with `hf auth login` or set HF_TOKEN", "HF_HOME")


@contextmanager
def _calm() -> Iterator[None]:
    """Inside the block the client draws bars only if progress is shown, and logs no line for each of its attempts."""
    log, bars = logging.getLogger("huggingface_hub"), _part("utils")
    level, hide = log.level, not (progress.shown() or bars.are_progress_bars_disabled())
    log.setLevel(logging.ERROR)
    if hide:
        bars.disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        if hide:
            bars.enable_progress_bars()


def _blobs(repo: str) -> set[str]:
    """The hashes of the files that the cache has of a repository."""
    folder = Path(_part("constants").HF_HUB_CACHE) / _part("file_download").repo_folder_name(
        repo_id=repo, repo_type="model"
    )
    return {path.name for path in (folder / "blobs").glob("*")}


def _check_hashes(handle: str, directory: Path, known: set[str]) -> None:
    """Compares new files with the hashes that they are stored under. Removes those that differ, and raises ValueError.

    Without links in the cache (HF_HUB_DISABLE_SYMLINKS) the hashes are not known, and nothing is compared.
    """
    for path in sorted(directory.rglob("*")):
        if not path.is_symlink():
            continue
        blob = path.parent / os.readlink(path)
        if blob.name in known or (actual := _hash_like(blob)) in (None, blob.name):
            continue
        blob.unlink()
        path.unlink()
        raise ValueError(
            f"{handle}: {path.relative_to(directory)} arrived damaged: its hash is {actual}, but {blob.name} was announced. "
            f"It was removed; run it again"
        )


def _hash_like(blob: Path) -> str | None:
    """The hash of a file, of the kind that its name is: SHA-256 of a large file, else git's SHA-1. None if it is neither."""
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        digest = hashlib.sha256()
    elif re.fullmatch(r"[0-9a-f]{40}", blob.name):
        digest = hashlib.sha1(f"blob {blob.stat().st_size}\0".encode(), usedforsecurity=False)
    else:
        return None
    with open(blob, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
