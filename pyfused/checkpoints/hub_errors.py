"""What went wrong in a download, in one line, and what can the user do?

Both clients raise many classes, which change between versions. So an error is known by its classes' names, by the HTTP status
of the response that it carries, and by the errors that caused it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
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
    "RemoteProtocolError",
    "ChunkedEncodingError",
    "IncompleteRead",
    "ProtocolError",
    "ReadError",
    "ContentDecodingError",
}
_SILENT = {"ReadTimeout", "ReadTimeoutError"}
_UNREACHABLE = _SILENT | {
    "ConnectError",
    "ConnectionError",
    "Timeout",
    "TimeoutException",
    "NetworkError",
    "ProxyError",
}
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
    return next(advice(found, service) for applies, advice in _ADVICE if applies(found))


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


# (whether it applies, what to say); the first that applies
_ADVICE: tuple[tuple[Callable[[Failure], bool], Callable[[Failure, Service], str]], ...] = (
    (
        lambda f: "GatedRepoError" in f.names,
        lambda f, s: (
            f"its owner asks for an agreement ({f.status}): accept it on the repository's page, then {s.login}"
        ),
    ),
    (
        lambda f: "RevisionNotFoundError" in f.names,
        lambda f, s: f"{s.name} has no such revision (404); it takes a branch, a tag or a commit's 40 digits",
    ),
    (
        lambda f: bool(f.names & _OFFLINE),
        lambda f, s: (
            "it is not, or not wholly, in the cache, and HF_HUB_OFFLINE forbids to download it: unset that, or fill the "
            "cache with `pyfused download` on a machine with a network"
        ),
    ),
    (
        lambda f: f.status in (401, 403),
        lambda f, s: (
            f"{s.name} refused it ({f.status}): it does not exist, or it is private or asks for consent; check the name, "
            f"then {s.login}"
        ),
    ),
    (lambda f: f.status == 404, lambda f, s: f"{s.name} has nothing of this name (404); check the spelling"),
    (
        lambda f: f.status == 429,
        lambda f, s: (
            f"{s.name} answered that there were too many requests (429): {_wait(f)}, or {s.login}, which raises the limit"
        ),
    ),
    (
        lambda f: f.status is not None and f.status >= 500,
        lambda f, s: f"{s.name} failed ({f.status}); try again later",
    ),
    (
        lambda f: "DataCorruptionError" in f.names or "Consistency check failed" in f.text,
        lambda f, s: (
            "a file arrived damaged, and was removed: run it again; if that stays so, something between here and "
            f"{s.place} changes the files"
        ),
    ),
    (
        lambda f: errno.ENOSPC in f.system,
        lambda f, s: f"no space left on the disk of the cache; {s.cache} moves it",
    ),
    (
        lambda f: bool(f.system & {errno.EACCES, errno.EPERM, errno.EROFS}),
        lambda f, s: f"the cache cannot be written ({_first_line(f)}); {s.cache} moves it",
    ),
    (
        lambda f: bool(f.names & _BROKEN),
        lambda f, s: f"the connection to {s.place} broke off in the middle of a file: {_AGAIN}",
    ),
    (
        lambda f: bool(f.names & _SILENT) or "Read timed out" in f.text,
        lambda f, s: f"{s.place} stopped answering: {_AGAIN}",
    ),
    (
        lambda f: bool(f.names & _UNREACHABLE),
        lambda f, s: (
            f"{s.place} cannot be reached, and the cache lacks it: check the network and the proxy settings; {_AGAIN}"
        ),
    ),
    (lambda f: True, lambda f, s: _first_line(f)),
)
