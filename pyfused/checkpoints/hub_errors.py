"""What went wrong in a download, in one line, and what can the user do?

Both clients raise many classes, which change between versions. So an error is known by its classes' names, by the HTTP status
of the response that it carries, and by the errors that caused it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import NamedTuple


class Service(NamedTuple):
    """One hub, as its users know it.

    name: what it is called.
    place: the address that its client asks.
    login: how one logs in, as the end of a sentence.
    cache: the environment variable that moves its client's cache.
    """

    name: str
    place: str
    login: str
    cache: str


class Failure(NamedTuple):
    """An error with everything that it was raised from."""

    error: BaseException
    names: frozenset[str]  # of all classes, bases included
    status: int | None
    text: str
    system: frozenset[int]  # errno


_OFFLINE = {"OfflineModeIsEnabled"}
_BROKEN = {
    "RemoteProtocolError", "ChunkedEncodingError", "IncompleteRead", "ProtocolError", "ReadError", "ContentDecodingError",
}  # fmt: skip
_SILENT = {"ReadTimeout", "ReadTimeoutError"}
_UNREACHABLE = _SILENT | {
    "ConnectError", "ConnectionError", "Timeout", "TimeoutException", "NetworkError", "ProxyError",
}  # fmt: skip
_AGAIN = "run it again; the files that are complete are kept"


def failure(error: BaseException) -> Failure:
    """The error, read together with its causes."""
    chain = list(_chain(error))
    statuses = (getattr(getattr(each, "response", None), "status_code", None) for each in chain)
    return Failure(
        error,
        frozenset(kind.__name__ for each in chain for kind in type(each).__mro__),
        next((status for status in statuses if isinstance(status, int)), None),
        "\n".join(map(str, chain)),
        frozenset(each.errno for each in chain if isinstance(each, OSError) and each.errno is not None),
    )


def describe(found: Failure, service: Service) -> str:
    """What happened, and what to do about it."""
    return next(_advice(found, service))


def _advice(f: Failure, s: Service) -> Iterator[str]:
    """Everything that applies, the most precise first."""
    login, status, place = s.login, f.status, s.place
    if "GatedRepoError" in f.names:
        yield f"its owner asks for an agreement ({status}): accept it on the repository's page, then {login}"
    if "RevisionNotFoundError" in f.names:
        yield f"{s.name} has no such revision (404); it takes a branch, a tag or a commit's 40 digits"
    if f.names & _OFFLINE:
        yield (
            "it is not, or not wholly, in the cache, and HF_HUB_OFFLINE forbids to download it: unset that, or fill the cache "
            "with `pyfused download` on a machine with a network"
        )
    if status in (401, 403):
        why = "it does not exist, or it is private or asks for consent"
        yield f"{s.name} refused it ({status}): {why}; check the name, then {login}"
    if status == 404:
        yield f"{s.name} has nothing of this name (404); check the spelling"
    if status == 429:
        yield f"{s.name} answered that there were too many requests (429): {_wait(f)}, or {login}, which raises the limit"
    if status is not None and status >= 500:
        yield f"{s.name} failed ({status}); try again later"
    if "DataCorruptionError" in f.names or "Consistency check failed" in f.text:
        changes = f"if that stays so, something between here and {place} changes the files"
        yield f"a file arrived damaged, and was removed: run it again; {changes}"
    if errno.ENOSPC in f.system:
        yield f"no space left on the disk of the cache; {s.cache} moves it"
    if f.system & {errno.EACCES, errno.EPERM, errno.EROFS}:
        yield f"the cache cannot be written ({_first_line(f)}); {s.cache} moves it"
    if f.names & _BROKEN:
        yield f"the connection to {place} broke off in the middle of a file: {_AGAIN}"
    if f.names & _SILENT or "Read timed out" in f.text:
        yield f"{place} stopped answering: {_AGAIN}"
    if f.names & _UNREACHABLE:
        yield f"{place} cannot be reached, and the cache lacks it: check the network and the proxy settings; {_AGAIN}"
    yield _first_line(f)


def unreachable(found: Failure) -> bool:
    """Whether there was no answer at all."""
    return found.status is None and bool(found.names & (_UNREACHABLE | _OFFLINE))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _first_line(found: Failure) -> str:
    lines = (line.strip() for line in str(found.error).splitlines())
    return f"{type(found.error).__name__}: {next(filter(None, lines), ''):.200}"


def _wait(found: Failure) -> str:
    for each in _chain(found.error):
        headers = getattr(getattr(each, "response", None), "headers", None) or {}
        if str(headers.get("Retry-After", "")).isdigit():
            return f"wait {headers['Retry-After']} s"
    return "wait some minutes"
