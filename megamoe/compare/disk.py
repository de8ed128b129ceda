"""The disk: when it is full, where things are cached, and a lock that an orphan keeps."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

LEAST: Final = 32 << 20
"""Bytes that must be free before a step: with less, a failure may come from the disk."""

_LOCKS: list[int] = []


class DiskFull(OSError):
    """The disk is full: nobody's fault but the machine's, so no step may be blamed."""


def cache_root() -> Path:
    """$MEGAMOE_CACHE, or megamoe/ under the user's cache directory."""
    folder = os.environ.get("MEGAMOE_CACHE")
    if folder:
        return Path(folder).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").absolute() / "megamoe"


def require_room(folder: Path, more: int = 0) -> None:
    """Raises :class:`DiskFull` where less than :data:`LEAST` and ``more`` bytes are free."""
    free = shutil.disk_usage(folder).free
    if free < LEAST + more:
        raise full(f"{folder}: {free >> 20} MiB free")


def full(what: str) -> DiskFull:
    """The error, with the remedy."""
    return DiskFull(
        errno.ENOSPC,
        f"the disk is full ({what}); nothing is lost: make room and give the same command again",
    )


def blame(text: str, log: Path | None = None) -> None:
    """Raises :class:`DiskFull` where a failing program says that this is why."""
    output = text + (log.read_text(errors="replace")[-4000:] if log else "")
    if "No space left on device" in output or "Disk quota exceeded" in output:
        raise full("No space left on device")


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold ``folder`` alone. Builds inherit the lock, so one that outlives a kill still has it."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder} is in use by another bisect, or by a build that a killed one left "
                "running; wait for it, end it, or name another --state"
            ) from None
        _LOCKS.append(handle)
        try:
            yield
        finally:
            _LOCKS.remove(handle)
    finally:
        os.close(handle)


def open_locks() -> tuple[int, ...]:
    """Open locks, for programs that must keep them while they run."""
    return tuple(_LOCKS)


def cause_of(error: OSError) -> Any:
    """``error`` itself, or :class:`DiskFull` if that is its cause."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT) and not isinstance(error, DiskFull):
        return full(str(error.filename or error.strerror))
    return error
