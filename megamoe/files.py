"""Files that others wrote or that others read: bounded reading, complete writing, one lock.

Whoever names a file may name a fifo, a device or ten gigabytes. So everything is read through
:func:`read_bounded`, which says in one line what it does not take, and never waits for a writer.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

MIB: Final = 2**20
MANIFEST_LIMIT: Final = 64 * MIB
"""Of manifest.json; 532 cases take 1.5 MiB."""
TENSORS_LIMIT: Final = 64 * MIB
"""Of one golden's tensors; the largest has 0.4 MiB, and all of golden/ may have 40."""
RECORDED_LIMIT: Final = 64 * MIB
"""Of one file of recorded bits; 319 cases take 0.4 MiB."""
DURATIONS_LIMIT: Final = 4 * MIB
CANDIDATE_LIMIT: Final = 4 * MIB
"""Of one candidate's entry, which is one of the manifest and its generator."""
REPORT_LIMIT: Final = 256 * MIB
"""Of one report: 520 red cases with all their details take some 20 MiB."""
PROVENANCE_LIMIT: Final = 4 * MIB
STORED_LIMIT: Final = 32 * 2**30
"""Of a stored problem: all 384 experts of the largest model take 13 GiB."""

LOCK_SECONDS: Final = 120.0
"""How long one act waits for another that holds golden/; each holds it for seconds."""

_TEMPORARY: Final = re.compile(r"\.megamoe-(\d+)-[a-z0-9_]+\.tmp")
_KINDS: Final = (
    (stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a fifo"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"), (stat.S_ISLNK, "a symbolic link"),
)  # fmt: skip


class FileError(ValueError):
    """A file is not one that can be read, or is in use; one line that names it."""


# --- reading ----------------------------------------------------------------------------------


@contextmanager
def open_bounded(path: Path, limit: int, *, follow: bool = True) -> Iterator[BinaryIO]:
    """A regular file of at most ``limit`` bytes, open for reading.

    :class:`FileError` for whatever else has this name; ``OSError`` where nothing has it, or it
    cannot be opened. Without ``follow`` a symbolic link is refused too.
    """
    # Asked first by name, for opening a device may do something, and a socket cannot be opened.
    _check(path, path.stat() if follow else path.lstat(), limit)
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    handle = os.open(path, flags | (0 if follow else os.O_NOFOLLOW))
    try:
        # Asked again by handle: the name may mean another file by now.
        _check(path, os.fstat(handle), limit)
    except BaseException:
        os.close(handle)
        raise
    with os.fdopen(handle, "rb") as file:
        yield file


def _check(path: Path, status: os.stat_result, limit: int) -> None:
    for is_kind, name in _KINDS:
        if is_kind(status.st_mode):
            raise FileError(f"{path} is {name}, no regular file; name a file")
    if not stat.S_ISREG(status.st_mode):
        raise FileError(f"{path} is no regular file; name a file")
    if status.st_size > limit:
        raise FileError(_too_large(path, limit))


def _too_large(path: Path, limit: int) -> str:
    size = f"{limit // MIB} MiB" if limit >= MIB else f"{limit} bytes"
    return f"{path} has more than {size}, the most that is read of such a file"


def read_bounded(path: Path, limit: int, *, follow: bool = True) -> bytes:
    """The bytes of ``path``; errors as of :func:`open_bounded`."""
    blocks, size = [], 0
    with open_bounded(path, limit, follow=follow) as file:
        while block := file.read(MIB):
            blocks.append(block)
            size += len(block)
            if size > limit:  # it has grown since it was asked
                raise FileError(_too_large(path, limit))
    return b"".join(blocks)


def digest_bounded(path: Path, limit: int) -> str:
    """sha256 of ``path``, block by block; errors as of :func:`open_bounded`."""
    digest = hashlib.sha256()
    with open_bounded(path, limit) as file:
        for block in iter(lambda: file.read(MIB), b""):
            digest.update(block)
    return digest.hexdigest()


def parse_json(content: bytes) -> Any:
    """``content`` as JSON. Every way in which it is none is a ``ValueError`` of one line."""
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path, limit: int, *, follow: bool = True) -> Any:
    """``path`` as JSON; ``ValueError`` where it is none, else as of :func:`open_bounded`."""
    return parse_json(read_bounded(path, limit, follow=follow))


# --- writing ----------------------------------------------------------------------------------


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside ``path``, flush to the disk, then rename: complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process stands in the name, so that what it leaves when it is killed can be told apart.
    handle, name = tempfile.mkstemp(
        dir=path.parent, prefix=f".megamoe-{os.getpid()}-", suffix=".tmp"
    )
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def clear_leftovers(folder: Path, *, deep: bool = True) -> list[Path]:
    """Delete what killed processes left of :func:`write_atomically`; returns the paths.

    Looks in ``folder`` and, if ``deep``, below it, and follows no symbolic link. Files of a live
    process stay, but for those of this one: call it where this process is not writing there.
    """
    paths = []
    for at, _, names in os.walk(folder):
        for name in names:
            match = _TEMPORARY.fullmatch(name)
            if match and not _lives(int(match[1])):
                path = Path(at) / name
                path.unlink(missing_ok=True)
                paths.append(path)
        if not deep:
            break
    return paths


def _lives(process: int) -> bool:
    if process == os.getpid():
        return False  # of an an earlier process of this number, as in containers
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is somebody else's; a number that is no process's
        return True
    return True


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold ``folder`` (made if it is missing) against every other process that asks so.

    The lock is on the folder itself: no file is left, and whoever is killed lets go.
    :class:`FileError` where another holds it for longer than :data:`LOCK_SECONDS`.
    """
    handle = _lock(folder, time.monotonic() + LOCK_SECONDS)
    try:
        yield
    finally:
        os.close(handle)


def _lock(folder: Path, until: float) -> int:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # whoever emptied it removed it meanwhile
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same(handle, folder):
                return handle
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EINTR):
                # A file system without locks, as some networks have: the acts still remove only
                # what they have read.
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        if time.monotonic() > until:
            raise FileError(
                f"{folder} is held by another golden record, bless or import; wait for it to end"
            )
        time.sleep(0.02)


def _same(handle: int, folder: Path) -> bool:
    """Whether ``folder`` is still the one that was opened, and not a new one of its name."""
    try:
        return os.path.samestat(os.fstat(handle), folder.stat())
    except FileNotFoundError:
        return False
