"""The chip at hand: its name, and the CUDA functions of ``units.cu`` through nvcc and ctypes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.confirm.document import ConfirmError
from megamoe.confirm.words import COLUMNS, ROWS, U32, Request
from megamoe.spec.formats import F32, bf16_decode

SOURCE: Final = Path(__file__).with_name("units.cu")
FLAGS: Final = ("-O2", "-std=c++17", "--ftz=false", "--prec-div=true", "--fmad=true")
"""``--ftz=false``: with flushing, silu of the smallest gates is another table."""
_NOT_HERE: Final = -1


@dataclass(frozen=True)
class Chip:
    """What ``nvidia-smi`` says of the first GPU."""

    name: str
    capability: str
    driver: str

    @classmethod
    def at_hand(cls) -> Chip:
        """:class:`ConfirmError` where there is none."""
        command = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version",
                 "--format=csv,noheader", "--id=0"]  # fmt: skip
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
            name, capability, driver = (part.strip() for part in result.stdout.strip().split(","))
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise ConfirmError(
                f"no NVIDIA GPU here (nvidia-smi: {type(error).__name__}); run confirm where the "
                "GPU is"
            ) from error
        return cls(name, capability, driver)


class Device:
    """The functions of ``units.cu``, compiled for a chip. Use as a context manager."""

    def __init__(self, chip: Chip) -> None:
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            raise ConfirmError("no nvcc on PATH; put the CUDA toolkit's bin/ there")
        self.toolchain = _last_line([nvcc, "--version"])
        self._folder = tempfile.TemporaryDirectory(prefix="megamoe-confirm-")
        library = Path(self._folder.name) / "units.so"
        command = [nvcc, *FLAGS, f"-arch=sm_{chip.capability.replace('.', '')}a", "-shared",
                   "-Xcompiler", "-fPIC", "-o", str(library), str(SOURCE)]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            lines = result.stderr.strip().splitlines() or ["no message"]
            raise ConfirmError(f"nvcc cannot compile {SOURCE.name}: {lines[0]}")
        self._library = ctypes.CDLL(str(library))

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def silu(self) -> dict[str, F32]:
        """The tables fast, precise and reciprocal, ``(65536,)`` float32 each."""
        gates = bf16_decode(np.arange(1 << 16, dtype=np.uint16))
        out = {n: np.empty(1 << 16, np.float32) for n in ("fast", "precise", "reciprocal")}
        self._call("silu", gates, *out.values())
        return out

    def words(self, request: Request) -> Iterator[U32]:
        """Words ``(n, 64, 8)``, a piece after the other."""
        for a, b, c in request.pieces():
            out = np.empty((len(a), ROWS, COLUMNS), np.float32)
            operands = [np.ascontiguousarray(each) for each in (a, b, c)]
            self._call("wgmma", request.instruction.kind, *operands, out, len(a), a.shape[2])
            yield out.view(np.uint32)

    def _call(self, name: str, *arguments: Any) -> None:
        c_arguments = [
            _pointer(g) if isinstance(g, np.ndarray) else ctypes.c_int(g) for g in arguments
        ]
        code = getattr(self._library, name)(*c_arguments)
        if code == _NOT_HERE:
            raise ConfirmError(f"this chip has no instruction {name}")
        if code:
            raise ConfirmError(f"CUDA function {name} failed with error {code}")


def _pointer(array: npt.NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _last_line(command: list[str]) -> str:
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return output.splitlines()[-1] if output else "unknown"


__all__ = ["Chip", "Device"]
