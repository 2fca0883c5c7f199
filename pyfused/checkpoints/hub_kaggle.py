"""How do files come from Kaggle? Through kagglehub, which no other file imports.

The client keeps what it gets in a cache of its own, compares MD5 sums, and marks a version as complete when it has all of it.
A version that is marked is used without the client, so without a network.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from pyfused.checkpoints import progress
from pyfused.checkpoints.files import note
from pyfused.checkpoints.hub_errors import Failure, Service, describe, failure, unreachable

PREFIX = "kaggle://"
_alone = threading.Lock()  # the client is changed during a download, which two threads could not undo in turn
_SERVICE = Service(
    "Kaggle",
    "kaggle.com",
    "log in with kagglehub.login(), or set KAGGLE_API_TOKEN, or KAGGLE_USERNAME and KAGGLE_KEY",
    "KAGGLEHUB_CACHE",
)


def parse(handle: str) -> tuple[str, int | None]:
    """``owner/model/framework/variation`` and the version, or None. Raises ValueError for anything else."""
    found = re.fullmatch(r"([\w.-]+(?:/[\w.-]+){3})(?:/([1-9]\d{0,8}))?", handle.removeprefix(PREFIX))
    if not found or ".." in found[1].split("/"):
        raise ValueError(
            f"preset is {handle!r}; a Kaggle model is written kaggle://owner/model/framework/variation[/version], where the "
            f"version is a number"
        )
    return found[1], int(found[2]) if found[2] else None


def download(handle: str, names: Iterable[str] | None) -> Path:
    """The directory of a model's files, downloaded if the cache lacks them.

    names: which files; the first must be there, others may be missing. None is all that the model has.
    Raises ValueError for whatever goes wrong, ImportError without the client.
    """
    if (found := cached(handle)) is not None:
        return found
    name, version = parse(handle)
    try:
        hub: Any = import_module("kagglehub")
    except ImportError as error:
        raise ImportError(f"{handle} needs Kaggle's client, kagglehub: pip install 'pyfused[hub]'") from error
    full = f"{name}/{version}" if version else name
    try:
        with _alone, _calm(), _bounded():
            return _get(hub, full, None) if names is None else _some(hub, full, names)
    except _Failed as failed:
        what = failed.what
        if version is None and unreachable(what) and (newest := _newest(name)) is not None:
            note(f"{handle}: {describe(what, _SERVICE)}. The newest version in the cache is used, {newest.name}")
            return newest
        file = f"{failed.file} " if failed.file else ""
        raise ValueError(f"{handle}: {file}cannot be downloaded: {describe(what, _SERVICE)}") from what.error


def cached(handle: str) -> Path | None:
    """The directory of a version that the cache has all of; None if it has not. A handle without a version has none."""
    name, version = parse(handle)
    directory = _root(name) / str(version)
    return directory if directory.is_dir() and (_root(name) / f"{version}.complete").is_file() else None


def _root(name: str) -> Path:
    cache = os.environ.get("KAGGLEHUB_CACHE")
    return (Path(cache) if cache is not None else Path.home() / ".cache" / "kagglehub") / "models" / name


def _newest(name: str) -> Path | None:
    versions = [int(mark.stem) for mark in _root(name).glob("*.complete") if mark.stem.isdigit()]
    return cached(f"{PREFIX}{name}/{max(versions)}") if versions else None


class _Failed(Exception):
    def __init__(self, what: Failure, file: str | None) -> None:
        super().__init__(what.text)
        self.what, self.file = what, file


def _get(hub: Any, full: str, file: str | None) -> Path:
    try:
        return Path(hub.model_download(full, path=file) if file else hub.model_download(full))
    except Exception as error:
        raise _Failed(failure(error), file) from error


def _some(hub: Any, full: str, names: Iterable[str]) -> Path:
    """Downloads these files one by one, and returns their directory."""
    directory: Path | None = None
    for file in names:
        try:
            path = _get(hub, full, file)
        except _Failed as failed:
            # Kaggle may answer "forbidden" for a file that is not there; the first file has shown that the model may be read
            if directory is None or failed.what.status not in (403, 404):
                raise
        else:
            directory = directory or path.parents[file.count("/")]
    assert directory is not None
    return directory


@contextmanager
def _calm() -> Iterator[None]:
    """Inside the block the client writes nothing to stdout, and draws bars only if progress is shown."""
    with ExitStack() as undo:
        log = logging.getLogger("kagglehub")
        undo.callback(log.setLevel, log.level)
        log.setLevel(logging.WARNING)
        for handler in log.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
                undo.callback(handler.setStream, handler.setStream(sys.stderr))
        if not progress.shown():
            # tqdm's own switches act when it is imported, or on every bar of the process
            for module, bar in (("kagglehub.clients", "tqdm"), ("kagglehub.http_resolver", "thread_map")):
                _replace(undo, sys.modules.get(module), bar, lambda made: partial(made, disable=True))
        yield


@contextmanager
def _bounded() -> Iterator[None]:
    """Inside the block the client waits for an answer as long as in resumed downloads, not for ever, and resumes only what it
    verifies in the end."""
    http, clients = sys.modules.get("kagglesdk.kaggle_http_client"), sys.modules.get("kagglehub.clients")
    seconds = tuple(getattr(clients, f"DEFAULT_{which}_TIMEOUT", 15) for which in ("CONNECT", "READ"))

    def begins(begin: Any) -> Any:
        def begun(client: Any) -> Any:
            fresh = client._session is None
            result = begin(client)
            if fresh and client._session is not None:
                client._session.send = partial(_send, client._session.send, seconds)
            return result

        return begun

    with ExitStack() as undo:
        _replace(undo, getattr(http, "KaggleHttpClient", None), "_init_session", begins)
        yield


def _send(send: Any, seconds: tuple[float, ...], request: Any, **options: Any) -> Any:
    response = send(request, **{**options, "timeout": options.get("timeout") or seconds})
    left = _left_of(request)
    if left is not None and (left >= int(response.headers.get("Content-Length", 0)) or not _has_sum(response)):
        response.headers.pop("Accept-Ranges", None)  # so the client begins with the first byte
    return response


def _has_sum(response: Any) -> bool:
    return "md5=" in response.headers.get("x-goog-hash", "")


def _left_of(request: Any) -> int | None:
    """How many bytes an earlier download left of what is asked for; None if nothing is left, or this asks for no file."""
    try:
        asked = json.loads(request.body or "{}")
        owner, model, variation = (asked[f"{part}Slug"] for part in ("owner", "model", "instance"))
    except (ValueError, KeyError, TypeError):
        return None
    version, file = asked.get("versionNumber"), asked.get("path")
    inside = f"{variation}/{version}/{file}" if file else f"{variation}/{version}.archive"
    found = (framework / inside for framework in _root(f"{owner}/{model}").glob("*"))
    return next((path.stat().st_size for path in found if path.is_file()), None)


def _replace(undo: ExitStack, owner: Any, name: str, change: Any) -> None:
    """Changes an attribute until `undo` closes. Nothing happens if this version of the client lacks it."""
    if (before := getattr(owner, name, None)) is not None:
        setattr(owner, name, change(before))
        undo.callback(setattr, owner, name, before)
