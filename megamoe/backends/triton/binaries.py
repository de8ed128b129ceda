"""Launching a kernel and remembering what was compiled for it: half of the fingerprint."""

from __future__ import annotations

import fcntl
import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

_CODE = (".text.", ".nv.constant", ".nv.info.")
_BINARIES: dict[tuple[str, str], Any] = {}

Kind = torch.dtype | Callable[[torch.Tensor], Any] | None
"""What a kernel is told of a tensor: another dtype, or what describes it to TMA; None: itself."""


class Launch:
    """A kernel on a grid, with its numbers and options; only its tensors come with each call.

    At every launch Triton looks at each argument and option to find what it has compiled, which
    takes the host longer than the launch itself. Of a tensor it looks at the dtype, here always
    the same, and at whether the address is a multiple of 16. So what it found once serves every
    later call on this device in which all addresses are.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], kinds: tuple[Kind, ...], *numbers: Any,
        **options: Any,
    ) -> None:  # fmt: skip
        self._kernel, self._grid, self._kinds = kernel, grid, kinds
        self._numbers, self._options = numbers, options
        self.is_compiled = False
        """Triton has been asked for the code, so it is compiled."""
        self._binary: Any = None
        self._rest: tuple[Any, ...] = ()
        self._boxes: tuple[tuple[int, Any], ...] = ()

    def __call__(self, tensors: Sequence[torch.Tensor], stream: int | None = None) -> None:
        """Launch on ``stream``, by default the current one, of the current device."""
        addresses = 0
        for tensor in tensors:
            addresses |= tensor.data_ptr()
        if self._binary is None or addresses % 16:
            self._ask(tensors, keep=addresses % 16 == 0)
            return
        if self._boxes:
            arguments: list[Any] = list(tensors)
            for place, box in self._boxes:
                arguments[place] = _box_of(box, arguments[place])
            tensors = arguments
        self._binary(*tensors, *self._rest, stream=stream)

    def compile(self, tensors: Sequence[torch.Tensor], wait: bool) -> bool:
        """Have the kernel compiled, and not launched, by one process at a time.

        False where another process is at it and ``wait`` is off. What one has compiled the others
        find in Triton's cache on the disk.
        """
        if self.is_compiled or not hasattr(self._kernel, "warmup"):
            return True
        with _turn(self._turn_name(), wait) as mine:
            if mine:
                arguments = [_view_as(*pair) for pair in zip(self._kinds, tensors, strict=True)]
                self._kernel.warmup(*arguments, *self._numbers, grid=self._grid, **self._options)
                self.is_compiled = True
            return mine

    def _turn_name(self) -> str:
        """What decides the code, as far as it is known before; of numbers Triton sees 1 and 16."""
        numbers = [n if not isinstance(n, int) or n == 1 else n % 16 == 0 for n in self._numbers]
        key = repr((self._kernel.fn.__name__, numbers, sorted(self._options.items(), key=str)))
        return hashlib.sha256(key.encode()).hexdigest()

    def _ask(self, tensors: Sequence[torch.Tensor], keep: bool) -> None:
        """Launch as Triton does, which compiles what it has not; its interpreter never does."""
        arguments = [_view_as(*pair) for pair in zip(self._kinds, tensors, strict=True)]
        binary = self._kernel[self._grid](*arguments, *self._numbers, **self._options)
        self.is_compiled = True
        if binary is None:
            return
        _BINARIES[self._kernel.fn.__name__, binary.hash] = binary
        if keep:
            defaults = {n: p.default for n, p in self._kernel.signature.parameters.items()}
            by_name = {**defaults, **self._options}
            rest = self._kernel.arg_names[len(arguments) + len(self._numbers) :]
            self._rest = (*self._numbers, *(by_name[name] for name in rest))
            self._boxes = tuple(
                (place, _box_of(arguments[place], None))  # memory is not a launch's to hold
                for place, kind in enumerate(self._kinds)
                if callable(kind)
            )
            self._binary = binary[(*self._grid, 1, 1)[:3]]


@contextmanager
def _turn(name: str, wait: bool) -> Iterator[bool]:
    """Hold ``name`` among the processes that share Triton's cache; False where one has it."""
    from triton import knobs

    folder = Path(knobs.cache.dir) / "megamoe-turns"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True  # closing the file ends it


def compile_all(waiting: Sequence[Callable[[bool], bool]]) -> None:
    """Call each with False until it gives True: what another process compiles comes last.

    So several workers that need the same kernels at first compile different ones.
    """
    while waiting:
        rest = [attempt for attempt in waiting if not attempt(False)]
        if len(rest) == len(waiting):
            rest.pop(0)(True)
        waiting = rest


def _view_as(kind: Kind, tensor: torch.Tensor) -> Any:
    if kind is None:
        return tensor
    return kind(tensor) if callable(kind) else tensor.view(kind)


def _box_of(box: Any, base: torch.Tensor | None) -> Any:
    """``box``, which was checked when it was made, of another tensor."""
    copy = object.__new__(type(box))
    copy.__dict__.update(box.__dict__, base=base)
    return copy


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """``kernel[grid](*arguments, **options)`` on the device of its tensors, which come first.

    Triton launches on the current one.
    """
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    device, dtypes = tensors[0].device, tuple(t.dtype for t in tensors)
    numbers = arguments[len(tensors) :]
    with on(device):
        _launch(kernel, grid, device, dtypes, tuple(options.items()), *numbers)(tensors)


@lru_cache(maxsize=1024, typed=True)  # 1 and 1.0 are compiled apart
def _launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, dtypes: tuple[torch.dtype, ...],
    options: tuple[tuple[str, Any], ...], *numbers: Any,
) -> Launch:  # fmt: skip
    return Launch(kernel, grid, (None,) * len(dtypes), *numbers, **dict(options))


def on(device: torch.device) -> AbstractContextManager[Any]:
    """With ``device`` as the current one, which takes its time, so only where it is not."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def digests() -> dict[str, str]:
    """Kernel and specialisation to the digest of its code, for all that this process ran."""
    binaries = sorted(_BINARIES.items(), key=lambda item: item[0])
    return {f"{name} {key}": code_digest(binary.asm["cubin"]) for (name, key), binary in binaries}


@lru_cache(maxsize=1024)  # asked for after every call, of all that ran so far
def code_digest(cubin: bytes) -> str:
    """sha256 of what runs: instructions, constants, and what the driver is told of them.

    The rest of the file says where the sources lie on the machine that compiled them. A cubin is
    an ELF file of 64 bits, little-endian: the header holds at 40 the place of the section headers,
    at 58 their size, number and that of the names; a section header its name at 0 and its place
    and size at 24.
    """
    start = struct.unpack_from("<Q", cubin, 40)[0]
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [start + size * i for i in range(count)]

    def content(header: int) -> bytes:
        place, length = struct.unpack_from("<QQ", cubin, header + 24)
        return cubin[place : place + length]

    table = content(headers[names])
    sections = {}
    for header in headers:
        at = struct.unpack_from("<I", cubin, header)[0]
        sections[table[at : table.index(b"\0", at)].decode()] = header
    digest = hashlib.sha256()
    for name in sorted(n for n in sections if n.startswith(_CODE)):
        digest.update(name.encode() + b"\0" + content(sections[name]))
    return digest.hexdigest()


__all__ = ["Kind", "Launch", "code_digest", "compile_all", "digests", "launch", "on"]
