"""How does a directory get a new checkpoint all at once, so that a reader finds all of the old one or all of the new one?

The new files are written into a folder beside the directory and flushed to the disk. Hard links bring along what else lies in
the directory. Then Linux exchanges the two folders in one step (renameat2 with RENAME_EXCHANGE), and the old one is deleted.

Where that cannot be done (the directory is a mount point, its parent is read-only, there are no hard links, another system),
the new files are written into a folder inside the directory. Renaming it to ``.pyfused-commit`` makes them count. Then old
files go and the new ones move to their places, one by one. If the process dies in between, pyfused's next reader or writer
does the rest (`finish`). Other libraries may find a mixture until then.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from pyfused.checkpoints.part_names import is_part, stale

_COMMIT, _MOVING = ".pyfused-commit", ".pyfused-commit-moving"  # while old files go, and while new files move
_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux
_STALE_SECONDS = 60  # a folder this old that nobody has locked was left by a killed process


@contextlib.contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """Yields an empty folder. At the end of the block its files take the place of the directory's checkpoint.

    Files that are no part of a checkpoint stay, and so does the old tokeniser if there is no new one. The directory and its
    parents are made if needed. If the block or the exchange fails, the directory is as before and the folder is gone.
    Raises OSError naming the directory if something cannot be written.
    """
    target = _resolved(directory)
    folder: Path | None = None
    lock = -1
    try:
        finish(target)
        folder = _make_folder(target)
        lock = _lock(folder)
        yield folder
        _flush(folder)
        _put(folder, target)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        message = f"{directory}: the checkpoint cannot be saved: {why}; what was there is unchanged"
        raise OSError(error.errno or errno.EIO, message) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)  # what is unfinished, or the old checkpoint
        if lock >= 0:
            os.close(lock)


def _resolved(directory: Path) -> Path:
    try:
        return directory.resolve()
    except ValueError as error:  # a null byte
        raise ValueError(f"directory is {str(directory)!r}: {error}") from error
    except RuntimeError as error:  # links in a circle, before Python 3.13
        why = os.strerror(errno.ELOOP)
        raise OSError(errno.ELOOP, f"{directory}: the checkpoint cannot be saved: {why}") from error


def finish(directory: Path) -> None:
    """Completes an exchange that a killed process left half done inside ``directory``. Does nothing if there is none.

    Raises ValueError if it cannot be completed.
    """
    commit, moving = directory / _COMMIT, directory / _MOVING
    if not (commit.is_dir() or moving.is_dir()):
        return
    try:
        if commit.is_dir():
            for name in stale(_files(directory), _files(commit)):
                (directory / name).unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another process does the same
                commit.rename(moving)
        for name in _files(moving):
            _move(moving, directory, name)
        shutil.rmtree(moving, ignore_errors=True)
    except OSError as error:
        raise ValueError(
            f"{directory}: a save was interrupted here, and its last step cannot be done: {error.strerror or error}"
        ) from error


def _move(source: Path, directory: Path, name: str) -> None:
    # A directory from elsewhere may hold such a folder too, made to write outside
    place = directory / name
    if (
        not is_part(name)
        or (source / name).is_symlink()
        or place.parent.resolve() != directory.resolve() / Path(name).parent
    ):
        raise OSError(errno.EPERM, f"{name} is no part of a checkpoint, or lies behind a link")
    place.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):  # another process has moved it
        os.replace(source / name, place)


def _make_folder(target: Path) -> Path:
    """A new folder beside the directory, or inside it if the two could not change places."""
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.saving-"
    for place in (target.parent, target):
        _sweep(place, prefix)
    name = prefix + secrets.token_hex(4)
    try:
        folder = target.parent / name
        folder.mkdir()
    except OSError:
        if not target.is_dir():
            raise
    else:
        if not target.is_dir() or _is_exchangeable(target, folder):
            return folder
        folder.rmdir()
    folder = target / name
    folder.mkdir()
    return folder


def _is_exchangeable(target: Path, folder: Path) -> bool:
    """Whether the directory may become another one: not a mount point, and not where this process stands."""
    here = Path.cwd()
    same_device = folder.stat().st_dev == target.stat().st_dev
    return same_device and not os.path.ismount(target) and target != here and target not in here.parents


def _lock(folder: Path) -> int:
    """A descriptor that holds a lock on the folder, or -1. The system releases it when the process dies."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return -1
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return -1
    return handle


def _sweep(place: Path, prefix: str) -> None:
    """Deletes the folders that killed processes left."""
    for path in place.glob(f"{glob.escape(prefix)}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS and (lock := _lock(path)) >= 0:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _flush(folder: Path) -> None:
    """Waits until the files are on the disk. A rename may otherwise get there before them."""
    for path in (*folder.rglob("*"), folder):
        if os.name == "posix" or path.is_file():
            _flush_one(path)


def _flush_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put(folder: Path, target: Path) -> None:
    if not target.exists():
        folder.rename(target)
    elif folder.parent != target.parent or not _change_places(folder, target):
        folder.rename(target / _COMMIT)
        finish(target)
    if os.name == "posix":
        with contextlib.suppress(OSError):  # the new checkpoint is there already
            _flush_one(target)
            _flush_one(target.parent)


def _change_places(folder: Path, target: Path) -> bool:
    """Exchanges the two, and brings along the files that stay. False if this file system or this machine cannot."""
    new = set(_files(folder))
    gone = new | stale(_files(target), new)
    try:
        _bring_along(target, folder, "", gone)
        shutil.copymode(target, folder)
        done = _exchange(folder, target)
    except OSError:  # the file system has no hard links, or part of the directory is another file system
        done = False
    if done:
        for name in set(_files(folder)) - gone:  # a file that came in the meantime
            if not os.path.lexists(target / name):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(folder / name, target / name)
    else:
        for name in set(_files(folder)) - new:
            (folder / name).unlink()
    return done


def _bring_along(source: Path, folder: Path, prefix: str, without: set[str]) -> None:
    for entry in os.scandir(source / prefix):
        name = prefix + entry.name
        if entry.is_dir(follow_symlinks=False):
            (folder / name).mkdir(exist_ok=True)
            _bring_along(source, folder, f"{name}/", without)
            shutil.copystat(source / name, folder / name)
        elif name not in without:
            os.link(entry.path, folder / name, follow_symlinks=False)


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges two directories in one step. False if the system has no such call."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, TypeError, AttributeError):  # not Linux, or an old C library
        return False
    return bool(call(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0)


def _files(folder: Path) -> list[str]:
    """The paths of all files in a folder relative to it, with "/"."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()
    )
