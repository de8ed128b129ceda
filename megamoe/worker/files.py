"""Files of tensors between a judge and a worker: writing them, reading them, comparing them.

A file is the worker's copy. Whatever lies at its path afterwards, reading it neither waits nor
follows a link.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megamoe.printable import quantity
from megamoe.worker.outcomes import BackendFailure, NoRoom
from megamoe.worker.tensors import ALIGN

Array = npt.NDArray[Any]
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class TensorFile:
    """A file of tensors that a worker was given, and the judge's own copy."""

    path: Path
    places: Mapping[str, tuple[str, list[int], int]]
    own: Tensors
    subsets: Mapping[str, list[int]]
    """For a tensor with only some rows in the file: these rows. All others are zeros."""

    def changes(self) -> list[str]:
        """Names of tensors whose bytes in the file are no longer the judge's."""
        with open_file(self.path) as file:
            return [name for name in self.own if not self._same(file, name)]

    def tensor(self, name: str) -> torch.Tensor:
        """A copy of the present content of one tensor in the file."""
        kind, shape, offset = self.places[name]
        own = self.own[name]
        with open_file(self.path) as file:
            data = read(file, offset, own.nbytes)
        return tensor_of(data, kind, shape)

    def first_change(self, name: str) -> str:
        """``2 elements, the first at [3, 5], from 0.5 to 9``.

        Empty where rows that the judge did not send were written, or the file is cut short.
        """
        try:
            own, now = self.own[name], self.tensor(name)
        except BackendFailure:
            return ""
        if name in self.subsets:
            rows = torch.tensor(self.subsets[name])
            own, now = own[rows], now[rows]
        size = own.element_size()
        parts = (t.contiguous().view(-1).view(torch.uint8).view(-1, size) for t in (own, now))
        other = torch.ne(*parts).any(1).nonzero().flatten()
        if not len(other):
            return ""
        at = [int(i) for i in np.unravel_index(int(other[0]), own.shape)]
        was, is_now = (t[tuple(at)].item() for t in (own, now))
        if name in self.subsets:
            at[0] = self.subsets[name][at[0]]
        return (
            f"{quantity(len(other), 'element')}, the first at {at}, from {was:.6g} to {is_now:.6g}"
        )

    def _same(self, file: int, name: str) -> bool:
        own, offset = bytes_of(self.own[name]), self.places[name][2]
        rows = self.subsets.get(name)
        if rows is None:
            return _equal(file, offset, own)
        count = self.places[name][1][0]
        size = own.size // count
        if not all(_equal(file, offset + r * size, own[r * size : (r + 1) * size]) for r in rows):
            return False
        # Nobody ever wrote the other rows, so read only the extents that the file system holds.
        at, end, present = offset, offset + own.size, set(rows)
        while at < end:
            try:
                first = max(at, os.lseek(file, at, os.SEEK_DATA))
            except OSError:  # no data from here on
                return True
            hole = min(os.lseek(file, first, os.SEEK_HOLE), end)
            for row in range((first - offset) // size, -(-(hole - offset) // size)):
                if row in present or row >= count:
                    continue
                start = max(first, offset + row * size)
                stop = min(hole, offset + (row + 1) * size)
                if read(file, start, stop - start).any():
                    return False
            at = hole
        return True


def write(folder: Path, tensors: Tensors, subsets: Mapping[str, list[int]]) -> TensorFile:
    """A new file of host tensors. Raises :class:`NoRoom` where they do not fit."""
    path, places, at = new_path(folder), {}, ALIGN
    own = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    for name, tensor in own.items():
        at += -at % ALIGN
        places[name] = (kind_of(tensor), list(tensor.shape), at)
        at += tensor.nbytes
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.truncate(handle, at)
            for name, tensor in own.items():
                data, offset = bytes_of(tensor), places[name][2]
                size = data.size // max(1, tensor.shape[0] if tensor.ndim else 1)
                rows = subsets.get(name)
                parts = [(0, data)] if rows is None else [
                    (r * size, data[r * size : (r + 1) * size]) for r in rows]  # fmt: skip
                for start, part in parts:
                    _write(handle, part, offset + start)
        finally:
            os.close(handle)
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoRoom(f"no room in {folder} for {at >> 20} MiB of inputs; make room, or name "
                         "another directory in TMPDIR") from error  # fmt: skip
        raise
    return TensorFile(path, places, own, subsets)


def bytes_of(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The memory of a contiguous host tensor."""
    if not tensor.numel():
        return np.zeros(0, np.uint8)
    flat: npt.NDArray[np.uint8] = tensor.reshape(-1).view(torch.uint8).numpy()
    return flat


def new_path(folder: Path) -> Path:
    """A name that no backend can take before."""
    return folder / secrets.token_hex(8)


def kind_of(tensor: torch.Tensor) -> str:
    """torch's name of a dtype, as requests and answers have it."""
    return str(tensor.dtype).removeprefix("torch.")


def _write(handle: int, data: Array, at: int) -> None:
    view = data.data
    while view:
        count = os.pwrite(handle, view[: 1 << 30], at)
        view, at = view[count:], at + count


@contextmanager
def open_file(path: Path) -> Iterator[int]:
    """A file that the worker had, for reading; whatever else lies there now, nothing waits."""
    removal = BackendFailure("the backend removed a file of its inputs or outputs")
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise removal from error
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise removal
        yield handle
    finally:
        os.close(handle)


def read(handle: int, at: int, size: int) -> npt.NDArray[np.uint8]:
    """``size`` bytes of a file of the worker. :class:`BackendFailure` where it is shorter now."""
    if at < 0 or at + size > os.fstat(handle).st_size:
        raise BackendFailure("the backend cut off a file of its inputs or outputs")
    data = np.zeros(size, np.uint8)
    view, offset = data.data, 0
    while offset < size:
        count = os.preadv(handle, [view[offset : offset + (1 << 30)]], at + offset)
        if not count:
            raise BackendFailure("the backend cut off a file of its inputs or outputs")
        offset += count
    return data


def _equal(handle: int, at: int, own: Array, step: int = 1 << 22) -> bool:
    return all(
        np.array_equal(read(handle, at + start, len(part)), part)
        for start in range(0, own.size, step)
        for part in (own[start : start + step],)
    )


def tensor_of(data: npt.NDArray[np.uint8], kind: str, shape: Sequence[int]) -> torch.Tensor:
    """A tensor of a file's bytes."""
    dtype = getattr(torch, kind)
    if not data.size:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(data).view(dtype).view(*shape)
