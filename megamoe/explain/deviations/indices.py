"""Operands of a linear from a wrong place: groups, rows, channels and experts by a wrong index.

Beside them stand scale bytes and codes at the ends of their range that are read as something else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from megamoe.explain.life import SHARED, Life
from megamoe.explain.ways import Operands, Reader, Scales
from megamoe.spec.formats import E4M3_NAN, GROUP, U8, UE8M0_NAN

I64 = npt.NDArray[np.int64]
_BITS: Final = (5, 6, 7, 8)
"""Bits of an expert index that is too short."""
_ROWS: Final = (128, 256, 512, 1024)
"""Rows of whole tiles, beyond which an index starts again."""
_TILES: Final = (8, 16, 32, 64, 128)
"""Rows by which a tile's scales are read late or early."""


def readers(linear: int) -> dict[str, Reader]:
    """Deviations of linear 1 or 2, by name."""
    return {**_COMMON, **(_OF_W13 if linear == 1 else {})}


def expert_readers(life: Life) -> dict[str, Reader]:
    """Experts by a wrong index, where some slot of the life has another expert by it."""
    experts = [slot.expert for slot in life.slots if slot.expert != SHARED]
    indices: dict[str, Callable[[int], int]] = {"expert 0": lambda e: 0}
    indices |= {f"expert e modulo {1 << n}": lambda e, n=n: e % (1 << n) for n in _BITS}  # type: ignore[misc]
    out: dict[str, Reader] = {}
    for name, index in indices.items():
        if all(index(expert) == expert for expert in experts):
            continue
        out[f"weights are those of {name}"] = _expert(index, True, False)
        out[f"weight scales are those of {name}"] = Scales(_expert(index, False, True))
        out[f"weights and scales are those of {name}"] = _expert(index, True, True)
    return out


def _expert(index: Callable[[int], int], weights: bool, scales: bool) -> Reader:
    def read(o: Operands) -> Operands:
        expert = o.where.slot.expert
        if expert == SHARED or index(expert) == expert:
            return o
        packed, sf = o.where.weights(index(expert))
        return replace(
            o, packed=packed if weights else o.packed, weight_sf=sf if scales else o.weight_sf
        )

    return read


# --- groups, rows, channels ---------------------------------------------------------------------


def _sf(change: Callable[[U8], U8]) -> Reader:
    return Scales(lambda o: replace(o, sf=change(o.sf)))


def _weight_sf(change: Callable[[U8], U8]) -> Reader:
    return Scales(lambda o: replace(o, weight_sf=change(o.weight_sf)))


def _modulo(sf: U8, groups: int) -> U8:
    """The scale byte of group g modulo ``groups``; the last axis is the group."""
    return sf[..., np.arange(sf.shape[-1]) % groups]


def _last_group(sf: U8) -> U8:
    return np.concatenate([sf[:, :-1], sf[:, -2:-1] if sf.shape[1] > 1 else sf[:, -1:]], axis=1)


def _rows(row: Callable[[I64], I64]) -> Reader:
    """``row`` gives the index that is read for each index, modulo the rows."""
    return Scales(lambda o: replace(o, weight_sf=o.where.scales_of(row)))


def _rows_modulo(rows: int) -> Reader:
    return _rows(lambda n: n % rows)


def _tile_away(rows: int) -> dict[str, Reader]:
    """The scales of the tile of ``rows`` rows before or after."""
    name = f"weight scales are read {rows} rows"
    return {
        f"{name} late": _rows(lambda n: n - rows),
        f"{name} late, but for the first {rows}": _rows(lambda n: np.where(n < rows, n, n - rows)),
        f"{name} early": _rows(lambda n: n + rows),
    }


def _last_row(sf: U8) -> U8:
    return np.concatenate([sf[:-1], sf[-2:-1]])


def _third_block(o: Operands) -> Operands:
    if len(o.codes) < 384:
        return o
    return replace(o, codes=np.concatenate([o.codes[:256], o.codes[128:256], o.codes[384:]]))


def _last_channel(o: Operands) -> Operands:
    return replace(o, codes=np.append(o.codes[:-1], np.uint8(0)))


# --- ends of the range --------------------------------------------------------------------------


def _zero_byte(o: Operands) -> Operands:
    """2**-127 is subnormal: where it is flushed, its whole group is zero."""
    codes = np.where(np.repeat(o.sf == 0, GROUP), 0, o.codes).astype(np.uint8)
    return replace(o, codes=codes, late=(*o.late, _zeroed))


def _zeroed(packed: U8, sf: U8) -> tuple[U8, U8]:
    each = packed.shape[1] // sf.shape[1]
    return np.where(np.repeat(sf == 0, each, axis=1), 0, packed).astype(np.uint8), sf


def _vanishing(o: Operands) -> Operands:
    """Both scales are 2**(byte - 127) of a signed byte: below every fp32 from 128 on."""
    codes = np.where(np.repeat(o.sf >= 128, GROUP), 0, o.codes).astype(np.uint8)

    def flush(packed: U8, sf: U8) -> tuple[U8, U8]:
        each = packed.shape[1] // sf.shape[1]
        return np.where(np.repeat(sf >= 128, each, axis=1), 0, packed).astype(np.uint8), sf

    return replace(o, codes=codes, late=(*o.late, flush))


def _underflow(o: Operands) -> Operands:
    """The product of two scales, in fp32, is zero below 2**-149."""
    own = o.sf.astype(np.int32)

    def flush(packed: U8, sf: U8) -> tuple[U8, U8]:
        each = packed.shape[1] // sf.shape[1]
        is_zero = sf.astype(np.int32) + own - 254 < -149
        return np.where(np.repeat(is_zero, each, axis=1), 0, packed).astype(np.uint8), sf

    return replace(o, late=(*o.late, flush))


def _as_nan(sf: U8) -> U8:
    return np.where(sf == UE8M0_NAN - 1, UE8M0_NAN, sf).astype(np.uint8)


def _nan_as_480(o: Operands) -> Operands:
    """480 is twice the code 240: its group's codes are halved, and its scale is doubled."""
    nan = (o.codes & 0x7F) == E4M3_NAN
    groups = nan.reshape(-1, GROUP).any(axis=1) & (o.sf < UE8M0_NAN - 1)
    halves = np.where((o.codes & 0x78) > 8, o.codes - 8, o.codes & 0x80 | (o.codes & 0x7F) >> 1)
    each = np.repeat(groups, GROUP)
    return replace(
        o,
        codes=np.where(each, halves, o.codes).astype(np.uint8),
        sf=(o.sf + groups).astype(np.uint8),
    )


_COMMON: Final[dict[str, Reader]] = {
    "activation scales are those of group g modulo 4": _sf(lambda sf: _modulo(sf, 4)),
    "weight scales are those of group g modulo 16": _weight_sf(lambda sf: _modulo(sf, 16)),
    **{f"weight scales are those of row n modulo {rows}": _rows_modulo(rows) for rows in _ROWS},
    **{name: reader for rows in _TILES for name, reader in _tile_away(rows).items()},
    "the four activation scales of a word are its first": _sf(
        lambda sf: np.repeat(sf[::4], 4)[: len(sf)]
    ),
    "the last weight scale of each row is the one before": _weight_sf(_last_group),
    "codes of the third 128 of K are those of the second": _third_block,
    "the last channel of K is lost": _last_channel,
    "a scale byte of 0 is read as zero": _zero_byte,
    "a scale byte of 254 is read as NaN": Scales(
        lambda o: replace(o, sf=_as_nan(o.sf), weight_sf=_as_nan(o.weight_sf))
    ),
    "all scale bytes are signed: from 128 on the scale vanishes": _vanishing,
    "a product of two scales below 2^-149 is zero": _underflow,
    "the NaN code is read as 480": _nan_as_480,
}
_OF_W13: Final[dict[str, Reader]] = {
    "the last row of weights takes the scales of the row before": _weight_sf(_last_row),
}
