"""The judge's reading of bits: which are NaN, the order of values, and their notation.

A *form* is the meaning of an unsigned or signed integer array. The order of values gives a distance
in units in the last place, the only size of an error that needs no tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from megamoe.spec.formats import E4M3_TABLE, bf16_decode

Bits = npt.NDArray[Any]
Keys = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Form:
    """One number format, as the judge needs it."""

    name: str
    width: int
    """Bits of one element; hexadecimal output has this many / 4 digits."""
    is_nan: Callable[[Bits], npt.NDArray[np.bool_]]
    decode: Callable[[Bits], npt.NDArray[Any]]
    """Values for people; never used to decide."""
    signed_zero: bool
    """The top bit is a sign, so that there are two zeros."""
    nan: int | None = None
    """The NaN that stands for all of them in a digest; None: the format has none."""
    is_power: bool = False
    """A value is the exponent of a power of two, and is written as that power."""

    def key(self, bits: Bits) -> Keys:
        """Integers in the order of the values, one apart per unit; both zeros are 0."""
        wide = bits.astype(np.int64)
        if not self.signed_zero:
            return wide
        sign = 1 << (self.width - 1)
        wide &= (1 << self.width) - 1
        magnitude = wide & (sign - 1)
        return np.where(wide & sign, -magnitude, magnitude)

    def one_nan(self, bits: Bits) -> Bits:
        """The bits with one payload for every NaN; unchanged if their width is another."""
        if self.nan is None or bits.dtype.itemsize * 8 != self.width:
            return bits
        return np.where(self.is_nan(bits), np.asarray(self.nan, bits.dtype), bits)

    def hex(self, bits: Any) -> str:
        """``0x3f80``: the bits of one element."""
        return f"0x{int(bits) & ((1 << self.width) - 1):0{self.width // 4}x}"

    def text(self, bits: Any) -> str:
        """The value of one element; of a scale byte as ``2^-7``."""
        value = self.decode(np.asarray([bits]))[0]
        if self.is_power:
            return "NaN" if int(bits) & 0xFF == 0xFF else f"2^{int(value)}"
        return str(int(value)) if isinstance(value, np.integer) else f"{float(value):.6g}"


def _never(bits: Bits) -> npt.NDArray[np.bool_]:
    return np.zeros(bits.shape, dtype=np.bool_)


def _f32(bits: Bits) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(bits).view(np.float32)


def _plain(bits: Bits) -> Bits:
    return bits


BF16: Final = Form("bfloat16", 16, lambda b: (b & 0x7FFF) > 0x7F80, bf16_decode, True, 0x7FC0)
E4M3: Final = Form("e4m3", 8, lambda b: (b & 0x7F) == 0x7F, lambda b: E4M3_TABLE[b], True, 0x7F)
F32: Final = Form("float32", 32, lambda b: (b & 0x7FFFFFFF) > 0x7F800000, _f32, True, 0x7FC00000)
# By the format, UE8M0 0xFF is a NaN; for code that stores it, it is a byte like any other.
UE8M0: Final = Form(
    "ue8m0 exponent", 8, _never, lambda b: b.astype(np.int64) - 127, False, is_power=True
)
BYTE: Final = Form("byte", 8, _never, _plain, False)
INT32: Final = Form("int32", 32, _never, _plain, False)
INT64: Final = Form("int64", 64, _never, _plain, False)


def bits(tensor: torch.Tensor) -> Bits:
    """The tensor's bits on the host: floats as unsigned integers, integers as they are."""
    plain = tensor.detach().contiguous().cpu()
    if plain.dtype == torch.bfloat16:
        return plain.view(torch.int16).numpy().view(np.uint16)
    if plain.dtype == torch.float32:
        return plain.view(torch.int32).numpy().view(np.uint32)
    if plain.dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu):
        return plain.view(torch.uint8).numpy()
    return plain.numpy()
