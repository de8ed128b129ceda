"""The three number formats of the layer: E4M3, E2M1 and UE8M0.

Each format has a *scalar specification* (``*_value``, ``*_encode``: Python integers and
``fractions.Fraction``, in the order in which the OCP documents define them) and a *vector twin*
(NumPy, table or integer driven). The tests run both over every input that exists.

Sources: OCP 8-bit Floating Point Specification (OFP8) 1.0 for E4M3; OCP Microscaling Formats (MX)
1.0 for E2M1 and UE8M0 (there called E8M0); NVIDIA PTX ISA, ``cvt.rn.satfinite.e4m3x2.f32``, for the
cast outside of the finite range.

Vectors are NumPy so that the oracle does not depend on a torch version; ``torch`` tensors pass
through ``.numpy()`` without a copy.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

GROUP: Final = 32
"""Values that share one scale factor, everywhere in the layer but in NVFP4."""
FP8_COMBINE_GROUP: Final = 128
"""Channels that share one scale factor where slot rows reach the combine as E4M3."""
BLOCK: Final = 128
"""Side of the square of FP8 weights that shares one fp32 scale."""
NVFP4_GROUP: Final = 16
"""Values that share one scale factor where weights and activations are NVFP4."""

E4M3_MAX: Final = 448
E4M3_NAN: Final = 0x7F
UE8M0_NAN: Final = 0xFF
UE8M0_BIAS: Final = 127

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


# --- scalar specification ---------------------------------------------------------------------


@cache
def e4m3_value(code: int) -> Fraction | None:
    """Value of one E4M3 byte; ``None`` for the two NaN codes (0x7F, 0xFF). There is no infinity.

    -0 (0x80) has the value 0; the sign is a matter of bits, not of value.
    """
    _check_code(code, 8)
    sign, exponent, mantissa = code >> 7, (code >> 3) & 0xF, code & 0x7
    if exponent == 15 and mantissa == 7:
        return None
    if exponent == 0:
        magnitude = Fraction(mantissa, 8) * Fraction(1, 2**6)
    else:
        magnitude = (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)
    return -magnitude if sign else magnitude


def e4m3_encode(value: Fraction, *, negative_zero: bool = False) -> int:
    """Nearest E4M3 byte of a finite value, ties to even, saturating at 448.

    ``negative_zero`` gives the sign of a zero *input*; a non-zero value that rounds to zero keeps
    its own sign.
    """
    sign = 0x80 if value < 0 or (value == 0 and negative_zero) else 0
    magnitude = abs(value)
    best = min(
        range(0x7F),
        key=lambda c: (abs(_finite(e4m3_value(c)) - magnitude), c & 1),
    )
    return sign | best


def e2m1_value(nibble: int) -> Fraction:
    """Value of one E2M1 nibble: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives (8 is -0)."""
    _check_code(nibble, 4)
    sign, exponent, mantissa = nibble >> 3, (nibble >> 1) & 0x3, nibble & 1
    if exponent == 0:
        magnitude = Fraction(mantissa, 2)
    else:
        magnitude = (1 + Fraction(mantissa, 2)) * Fraction(2) ** (exponent - 1)
    return -magnitude if sign else magnitude


def ue8m0_value(byte: int) -> Fraction | None:
    """Value of one UE8M0 byte, ``2**(byte - 127)``; ``None`` for 0xFF (NaN). There is no zero."""
    _check_code(byte, 8)
    return None if byte == UE8M0_NAN else Fraction(2) ** (byte - UE8M0_BIAS)


def _check_code(code: int, bits: int) -> None:
    if not 0 <= code < 1 << bits:
        raise ValueError(f"code {code} does not fit in {bits} bits")


def _finite(value: Fraction | None) -> Fraction:
    if value is None:
        raise ValueError("NaN has no value")
    return value


# --- vector twins -----------------------------------------------------------------------------


def _e4m3_table() -> F64:
    values = [e4m3_value(code) for code in range(256)]
    table = np.array([np.nan if v is None else float(v) for v in values])
    table[0x80] = -0.0
    return table


E4M3_TABLE: Final[F64] = _e4m3_table()
E2M1_TABLE: Final[F64] = np.array(
    [-0.0 if n == 8 else float(e2m1_value(n)) for n in range(16)], dtype=np.float64
)
for _table in (E4M3_TABLE, E2M1_TABLE):
    _table.setflags(write=False)


def e4m3_decode(codes: U8) -> F64:
    """``(...)`` uint8 to float64, exact; NaN codes become NaN."""
    return np.take(E4M3_TABLE, codes)


def e4m3_cast(values: F32 | F64, saturates: bool = True) -> U8:
    """``(...)`` float32 or float64 to E4M3 bytes: round to nearest even, saturate at 448.

    Infinities saturate and every NaN becomes 0x7F, as ``cvt.rn.satfinite.e4m3x2.f32`` does. With
    ``saturates`` off, a value that rounds to more than 448 becomes NaN too. The rounding is done
    once, from the given precision: the value is scaled by a power of two so that one E4M3 step
    becomes 1, and ``np.rint`` rounds that to nearest even exactly.
    """
    with np.errstate(invalid="ignore"):  # widening a signalling NaN raises the flag
        wide = np.asarray(values, dtype=np.float64)
    magnitude = np.minimum(np.abs(wide), 1e6)  # keeps frexp's integers small; 1e6 saturates anyway
    nan = np.isnan(wide)
    magnitude = np.where(nan, 0.0, magnitude)
    _, exponent = np.frexp(magnitude)  # magnitude = m * 2**exponent, 0.5 <= m < 1
    step = np.maximum(exponent - 1, -6) - 3
    steps = np.rint(np.ldexp(magnitude, -step)).astype(np.int64)
    # steps counts units of 2**step: 8..16 for normal numbers (16 carries), 0..8 for subnormals.
    code = np.where(steps < 8, steps, ((step + 10) << 3) + steps - 8)
    nan |= (code > 0x7E) & (not saturates)
    code = np.minimum(code, 0x7E) | np.where(np.signbit(wide), 0x80, 0)
    return np.where(nan, E4M3_NAN, code).astype(np.uint8)


def e2m1_unpack(packed: U8) -> U8:
    """``(..., n)`` bytes to ``(..., 2n)`` nibbles; the low nibble is the even index."""
    out = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=np.uint8)
    np.bitwise_and(packed, 0xF, out=out[..., 0::2])
    np.right_shift(packed, 4, out=out[..., 1::2])
    return out


def e2m1_pack(nibbles: U8) -> U8:
    """``(..., 2n)`` nibbles to ``(..., n)`` bytes, the inverse of :func:`e2m1_unpack`."""
    if nibbles.shape[-1] % 2:
        raise ValueError(f"E2M1 packing needs an even last dimension, got {nibbles.shape}")
    if nibbles.size and int(nibbles.max()) > 15:
        raise ValueError("E2M1 codes must be nibbles, 0 to 15")
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).astype(np.uint8)


def e2m1_decode(packed: U8, dtype: type[np.floating] = np.float64) -> npt.NDArray[np.floating]:
    """``(..., n)`` packed bytes to ``(..., 2n)`` values in ``dtype``, exact in any float type."""
    pairs = np.take(_pair_table(np.dtype(dtype)), packed, axis=0)  # far faster than by []
    return pairs.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


_PAIRS: dict[np.dtype, npt.NDArray[np.floating]] = {}


def _pair_table(dtype: np.dtype) -> npt.NDArray[np.floating]:
    """256 x 2 values, one row per byte: a single gather decodes two nibbles."""
    if dtype not in _PAIRS:
        byte = np.arange(256)
        pairs = np.stack([E2M1_TABLE[byte & 0xF], E2M1_TABLE[byte >> 4]], axis=-1)
        _PAIRS[dtype] = pairs.astype(dtype)
    return _PAIRS[dtype]


def ue8m0_decode(codes: U8) -> F64:
    """``(...)`` UE8M0 bytes to float64, exact; 0xFF becomes NaN."""
    value = np.ldexp(1.0, codes.astype(np.int32) - UE8M0_BIAS)
    return np.where(codes == UE8M0_NAN, np.nan, value)


def ue8m0_ceil(scale: F32) -> npt.NDArray[np.int32]:
    """``(...)`` float32 >= 0 to the byte of the next power of two: field plus one unless exact.

    The byte is *not* clamped (staging clamps to 1..254, requantisation does not); infinity and
    NaN give 255 or 256. This is DeepGEMM's ``fast_log2_ceil`` plus 127, read off the fp32 bits.
    """
    bits = np.ascontiguousarray(scale, dtype=np.float32).view(np.uint32)
    field = (bits >> 23).astype(np.int32)
    return field + ((bits & 0x7FFFFF) != 0)


def pack_sf(codes: U8) -> npt.NDArray[np.int32]:
    """``(..., 4n)`` UE8M0 bytes to ``(..., n)`` int32, the first group in the low byte."""
    if codes.shape[-1] % 4:
        raise ValueError(f"scale factors pack four to an int32, got {codes.shape[-1]} a row")
    shape = (*codes.shape[:-1], codes.shape[-1] // 4, 4)
    words = np.ascontiguousarray(codes).reshape(shape).astype(np.uint32)
    packed = words[..., 0] | words[..., 1] << 8 | words[..., 2] << 16 | words[..., 3] << 24
    return packed.astype(np.uint32).view(np.int32)


def unpack_sf(packed: npt.NDArray[np.int32]) -> U8:
    """``(..., n)`` int32 to ``(..., 4n)`` UE8M0 bytes, the inverse of :func:`pack_sf`."""
    words = np.ascontiguousarray(packed).view(np.uint32)[..., None]
    codes = (words >> np.array([0, 8, 16, 24], dtype=np.uint32)) & 0xFF
    return codes.astype(np.uint8).reshape(*packed.shape[:-1], packed.shape[-1] * 4)


# --- bfloat16 ---------------------------------------------------------------------------------

U16 = npt.NDArray[np.uint16]


def bf16_decode(bits: U16) -> F32:
    """``(...)`` bfloat16 bit patterns (uint16) to float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bf16_round(values: F64 | F32) -> U16:
    """``(...)`` float64 or float32 to bfloat16 bits: one rounding, to nearest even.

    Float64 is first rounded *to odd* into float32 (truncate, then set the last bit if anything
    was lost), which makes the second rounding to 8 bits the same as a single one. NaN becomes
    0x7FC0 with the sign dropped; overflow becomes infinity.
    """
    wide = np.asarray(values)
    if wide.dtype == np.float64:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            single = wide.astype(np.float32)
            # Move back toward zero where the cast moved away from it, then mark the loss.
            away = np.abs(single.astype(np.float64)) > np.abs(wide)
            bits = single.view(np.uint32) - away.astype(np.uint32)
            inexact = bits.view(np.float32).astype(np.float64) != wide
        bits = bits | (inexact & ~np.isnan(wide)).astype(np.uint32)
    else:
        bits = np.ascontiguousarray(wide, dtype=np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(wide), np.uint16(0x7FC0), rounded)


def bf16_key(bits: U16) -> npt.NDArray[np.int32]:
    """``(...)`` bfloat16 bits to integers in the order of the values, one apart per ULP.

    -0 and +0 both map to 0, so a distance counts representable *values*; NaN has no place in the
    order and must be handled before.
    """
    magnitude = (bits & 0x7FFF).astype(np.int32)
    return np.where(bits >> 15, -magnitude, magnitude)


def bf16_from_key(key: npt.NDArray[np.int32]) -> U16:
    """The inverse of :func:`bf16_key` (0 becomes +0)."""
    return np.where(key < 0, 0x8000 | -key, key).astype(np.uint16)


def e4m3_key(codes: U8) -> npt.NDArray[np.int16]:
    """``(...)`` E4M3 codes to integers in the order of the values, one apart per code.

    -0 and +0 both map to 0. NaN codes map to +-127, outside the finite range of +-126.
    """
    magnitude = (codes & 0x7F).astype(np.int16)
    return np.where(codes >> 7, -magnitude, magnitude).astype(np.int16)
