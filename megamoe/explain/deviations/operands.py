"""Deviations of the operands of a linear: codes, scale bytes, nibbles, rows, experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from megamoe.explain.deviations import indices
from megamoe.explain.life import SHARED
from megamoe.explain.ways import Operands, Reader, Scales
from megamoe.oracle.linear import is_e4m3
from megamoe.spec.formats import GROUP, U8, UE8M0_NAN

Change = Callable[[U8, U8], tuple[U8, U8]]
I64 = npt.NDArray[np.int64]


# --- the order of scale bytes -------------------------------------------------------------------


def _linear(row: I64, group: I64, groups: int) -> I64:
    return row * groups + group


def _tiled_8(row: I64, group: I64, groups: int) -> I64:
    """Tiles of 8 rows by 4 groups."""
    tile = row // 8 * (groups // 4) + group // 4
    return tile * 32 + row % 8 * 4 + group % 4


def _tiled_128(row: I64, group: I64, groups: int) -> I64:
    """Tiles of 128 rows by 4 groups; in a tile, rows 32 apart lie side by side."""
    tile = row // 128 * (groups // 4) + group // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4


LAYOUTS: Final[Mapping[str, Callable[[I64, I64, int], I64]]] = {
    "linear": _linear, "8x4": _tiled_8, "128x4": _tiled_128,
}  # fmt: skip
"""The place, in bytes, of the scale byte of a row and a group."""


def mistaken(sf: U8, source: str, target: str) -> U8:
    """``(N, G)`` scale bytes that were written in one layout and are read in another."""
    groups = sf.shape[1]
    at = np.indices(sf.shape).astype(np.int64)
    memory = np.empty(sf.size, np.uint8)
    memory[LAYOUTS[source](at[0], at[1], groups)] = sf
    return memory[LAYOUTS[target](at[0], at[1], groups)]


def _rows_in_tiles(sf: U8, back: bool) -> U8:
    """Rows in the order 4 x 32 of tcgen05 within each 128."""
    shape = (-1, 32, 4, sf.shape[1]) if back else (-1, 4, 32, sf.shape[1])
    return sf.reshape(shape).swapaxes(1, 2).reshape(sf.shape)


def _interleaved(rows: U8, run: int, back: bool = False) -> U8:
    """Gate and up rows ``run`` by ``run`` in turn, or back."""
    half = len(rows) // 2
    order = np.arange(len(rows)).reshape(2, half // run, run).swapaxes(0, 1).ravel()
    return rows[np.argsort(order) if back else order]


def _sf(change: Callable[[U8], U8]) -> Reader:
    return Scales(lambda o: replace(o, weight_sf=change(o.weight_sf)))


def _layouts() -> dict[str, Reader]:
    out: dict[str, Reader] = {}
    for source in LAYOUTS:
        for target in LAYOUTS:
            if source != target:
                name = f"weight scales are written {source} and read {target}"
                out[name] = _sf(lambda sf, w=source, r=target: mistaken(sf, w, r))  # type: ignore[misc]
    out["weight scales are left in the 4 x 32 order of rows"] = _sf(
        lambda sf: _rows_in_tiles(sf, False)
    )
    out["the 4 x 32 order of rows is undone in weight scales that have it not"] = _sf(
        lambda sf: _rows_in_tiles(sf, True)
    )
    out["the four bytes of a weight scale word are in reverse order"] = _sf(
        lambda sf: sf.reshape(len(sf), -1, 4)[:, :, ::-1].reshape(sf.shape)
    )
    return out


def _of_w13() -> dict[str, Reader]:
    """For linear 1 alone: scales of gate and up rows in another order than the weights."""
    out: dict[str, Reader] = {}
    for run in (1, 8, 16):
        for back, name in ((False, "are"), (True, "are taken to be")):
            out[f"scales of gate and up rows {name} in turn by {run}, their weights not"] = _sf(
                lambda sf, r=run, b=back: _interleaved(sf, r, b)  # type: ignore[misc]
            )
    out["scales of gate and of up are swapped"] = _sf(
        lambda sf: np.concatenate([*np.split(sf, 2)][::-1])
    )
    for half, name in enumerate(("up rows have the scales of gate rows",
                                 "gate rows have the scales of up rows")):  # fmt: skip
        out[name] = _sf(lambda sf, h=half: np.concatenate([np.split(sf, 2)[h]] * 2))  # type: ignore[misc]
    return out


# --- values -------------------------------------------------------------------------------------


def _late(change: Change) -> Reader:
    """A change for E2M1 weights only, after the choice of the rows."""

    def read(o: Operands) -> Operands:
        return o if is_e4m3(o.packed, o.weight_sf) else replace(o, late=(*o.late, change))

    return read


def _nibbles(table: list[int]) -> Reader:
    one = np.array(table, np.uint8)
    both = np.arange(256)
    pairs = one[both & 15] | (one[both >> 4] << 4)
    return _late(lambda packed, sf: (pairs[packed], sf))


def _codes(change: Callable[[U8], U8]) -> Reader:
    return lambda o: replace(o, codes=change(o.codes))


def _x_sf(change: Callable[[U8], U8]) -> Reader:
    return Scales(lambda o: replace(o, sf=change(o.sf)))


def shifted(sf: U8, by: int) -> U8:
    """Scale bytes ``by`` octaves larger; NaN stays NaN."""
    larger = np.clip(sf.astype(np.int32) + by, 0, UE8M0_NAN - 1)
    return np.where(sf == UE8M0_NAN, UE8M0_NAN, larger).astype(np.uint8)


def _negated(packed: U8, sf: U8) -> tuple[U8, U8]:
    """A byte that is shifted as a signed one into a float sets its sign bit."""
    return packed ^ np.where(np.repeat(sf >= 128, GROUP // 2, axis=1), 0x88, 0).astype(np.uint8), sf


def _vanishing(packed: U8, sf: U8) -> tuple[U8, U8]:
    """2**(signed byte - 127) is below every fp32."""
    return np.where(np.repeat(sf >= 128, GROUP // 2, axis=1), 0, packed).astype(np.uint8), sf


def _signed_codes(o: Operands, zero: bool) -> Operands:
    large = np.repeat(o.sf >= 128, GROUP)
    return replace(
        o, codes=np.where(large, 0 if zero else o.codes ^ 0x80, o.codes).astype(np.uint8)
    )


def _without(part: Callable[[int], slice]) -> Reader:
    """Some of K is not there; ``part`` takes the length of K."""

    def read(o: Operands) -> Operands:
        codes = o.codes.copy()
        codes[part(len(codes))] = 0
        return replace(o, codes=codes)

    return read


def _neighbour(by: int, weights: bool, scales: bool) -> Reader:
    """Weights of the expert before or after; the last one stands before the first."""

    def read(o: Operands) -> Operands:
        slot, experts = o.where.slot, o.where.life.token.experts
        if slot.expert == SHARED:
            return o
        packed, sf = o.where.weights((slot.expert + by) % experts)
        return replace(
            o, packed=packed if weights else o.packed, weight_sf=sf if scales else o.weight_sf
        )

    return read


_EXACT_NIBBLES: Final = list(range(16))
_COMMON: Final[dict[str, Reader]] = {
    "weight scales are read one group late": _sf(lambda sf: np.roll(sf, 1, 1)),
    "weight scales are read one group early": _sf(lambda sf: np.roll(sf, -1, 1)),
    "weight scales are read one row late": Scales(
        lambda o: replace(o, weight_sf=o.where.scales_of(lambda n: n - 1))
    ),
    "all weight scales of a row are the first group's": _sf(
        lambda sf: np.repeat(sf[:, :1], sf.shape[1], axis=1)
    ),
    "weight scales are ignored": _sf(lambda sf: np.full_like(sf, 127)),
    "weight scales are an octave too small": _sf(lambda sf: shifted(sf, -1)),
    "weight scales are an octave too large": _sf(lambda sf: shifted(sf, 1)),
    "weight scale bytes are signed: from 128 on the scale is negative": _late(_negated),
    "weight scale bytes are signed: from 128 on the scale vanishes": _late(_vanishing),
    "nibbles are swapped in each byte": _late(
        lambda packed, sf: ((packed << 4 | packed >> 4).astype(np.uint8), sf)
    ),
    "E2M1 subnormals are flushed: 0.5 is 0": _nibbles(
        [0 if n & 7 == 1 else n for n in _EXACT_NIBBLES]
    ),
    "the sign of weights is lost": _nibbles([n & 7 for n in _EXACT_NIBBLES]),
    "activation scales are read one group late": _x_sf(lambda sf: np.roll(sf, 1)),
    "activation scales are read one group early": _x_sf(lambda sf: np.roll(sf, -1)),
    "activation scales are ignored": _x_sf(lambda sf: np.full_like(sf, 127)),
    "activation scales are an octave too small, or codes are read as E4M3 FNUZ": _x_sf(
        lambda sf: shifted(sf, -1)
    ),
    "activation scales are an octave too large": _x_sf(lambda sf: shifted(sf, 1)),
    "all scales, of activations and of weights, are an octave too small": Scales(
        lambda o: replace(o, sf=shifted(o.sf, -1), weight_sf=shifted(o.weight_sf, -1))
    ),
    "all scales, of activations and of weights, are an octave too large": Scales(
        lambda o: replace(o, sf=shifted(o.sf, 1), weight_sf=shifted(o.weight_sf, 1))
    ),
    "activation scale bytes are signed: from 128 on the scale is negative": lambda o: _signed_codes(
        o, False
    ),
    "activation scale bytes are signed: from 128 on the scale vanishes": lambda o: _signed_codes(
        o, True
    ),
    "the four bytes of an activation scale word are in reverse order": _x_sf(
        lambda sf: sf.reshape(-1, 4)[:, ::-1].ravel()
    ),
    "E4M3 subnormals are read as zero": _codes(
        lambda codes: np.where(codes & 0x78, codes, codes & 0x80).astype(np.uint8)
    ),
    "the last block of K is lost": _without(lambda k: slice(-GROUP, None)),
    "the first block of K is lost": _without(lambda k: slice(None, GROUP)),
    "the last 128 of K are lost": _without(lambda k: slice(-128, None)),
    "the second half of K is lost": _without(lambda k: slice(k // 2, None)),
    "only the first block of K is there": _without(lambda k: slice(GROUP, None)),
    "only the first 128 of K are there": _without(lambda k: slice(128, None)),
    "weights are those of the expert before": _neighbour(-1, True, False),
    "weights are those of the expert after": _neighbour(1, True, False),
    "weight scales are those of the expert before": _neighbour(-1, False, True),
    "weight scales are those of the expert after": _neighbour(1, False, True),
    "weights and scales are those of the expert before": _neighbour(-1, True, True),
    "weights and scales are those of the expert after": _neighbour(1, True, True),
    **_layouts(),
}


def readers(linear: int) -> dict[str, Reader]:
    """The deviations of linear 1 or 2, by name."""
    return {**_COMMON, **(_of_w13() if linear == 1 else {}), **indices.readers(linear)}
