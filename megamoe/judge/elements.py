"""The comparer: tensors against goldens, bit by bit or against an interval.

It knows arrays, forms and axes; no kernel, no case. Rules:

- *Bitwise* means the same bits, except that every NaN equals every NaN: which payload a NaN
  carries is not part of the contract. -0 and +0 differ.
- An *interval* is inclusive, in the order of values. NaN is expected exactly where both ends are
  NaN. Where the interval is the one value zero, the sign must be that of an end: both zeros are
  allowed only if the ends are -0 and +0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.judge.verdict import Finding, Worst
from megamoe.spec.forms import Bits, Form
from megamoe.spec.tensors import TENSORS

TILE: Final = 128
"""Channels of one tile of the error map."""
GRID_LIMIT: Final = 4096
TALLY_LIMIT: Final = 256
_FAR: Final = np.int64(1) << 62
"""Distance of a NaN from any number: more than of any two numbers."""

Ids = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Place:
    """The meaning of a tensor's axes, from which an element gets its name.

    ``axes`` are of "token", "slot", "expert", "row", "channel". One step along the channel axis
    is ``per_channel`` channels. ``tokens`` are the case's rows behind axis 0 (None: 0, 1, ...),
    ``ids`` their (rows, K) expert ids, with which slots are resolved to experts and rows tallied.
    """

    axes: tuple[str, ...]
    per_channel: int = 1
    tokens: Sequence[int] | None = None
    ids: Ids | None = None

    def token(self, position: int) -> int:
        return position if self.tokens is None else self.tokens[position]


def place_of(name: str, tokens: Sequence[int] | None = None, ids: Ids | None = None) -> Place:
    """The place of a tensor of :data:`megamoe.spec.tensors.TENSORS`."""
    return Place(TENSORS[name].places, TENSORS[name].channels, tokens, ids)


def bitwise(
    stage: str, form: Form, actual: Bits, expected: Bits, place: Place, live: Any = None
) -> Finding:
    """Equal bits, with any NaN equal to any NaN. ``live`` (broadcastable bool): the elements to
    compare."""
    same = (actual == expected) | (form.is_nan(actual) & form.is_nan(expected))
    return _finding(stage, form, actual, expected, expected, ~same, place, live)


def interval(
    stage: str, form: Form, actual: Bits, low: Bits, high: Bits, place: Place, live: Any = None
) -> Finding:
    """Every element within ``low..high``, both of ``actual``'s shape and form: :func:`beyond`.

    Raises ``ValueError`` for an invalid golden: NaN at one end, or the ends swapped.
    """
    nan_low, nan_high = form.is_nan(low), form.is_nan(high)
    disorder = (nan_low != nan_high) | (~nan_low & (form.key(low) > form.key(high)))
    if disorder.any():
        at = [int(i) for i in np.argwhere(disorder)[0]]
        raise ValueError(f"{stage} at {at}: the golden's interval has no order; record it again")
    outside = beyond(form, actual, low, high)
    return _finding(stage, form, actual, low, high, outside, place, live)


def beyond(form: Form, actual: Bits, low: Bits, high: Bits) -> npt.NDArray[np.bool_]:
    """The elements of ``actual`` outside of ``low..high``.

    NaN is expected where both ends are NaN, and allowed where the ends are the two infinities: an
    order that overflows both ways ends in ``inf - inf`` (``docs/numerics.md``, 3.5).
    """
    nan = form.is_nan(actual)
    key_low, key_high, key = form.key(low), form.key(high), form.key(actual)
    inside = (key >= key_low) & (key <= key_high)
    only_zero = (key_low == 0) & (key_high == 0)
    inside &= ~only_zero | (actual == low) | (actual == high)
    if nan.any():
        inside = np.where(
            nan, np.isneginf(form.decode(low)) & np.isposinf(form.decode(high)), inside
        )
    out: npt.NDArray[np.bool_] = ~np.where(form.is_nan(low), nan, inside)
    return out


def key_interval(
    stage: str, form: Form, actual: Bits, low: Any, high: Any, place: Place, live: Any = None
) -> Finding:
    """:func:`interval` with ends as keys in the order of the form's values.

    A key says nothing about the sign of a zero, so both zeros are key 0. NaN codes have one key,
    whatever their sign, beyond the largest finite one.
    """
    key = form.key(form.one_nan(actual))
    outside = (key < low) | (key > high)
    return _finding(stage, form, actual, from_key(form, low), from_key(form, high), outside,
                    place, live)  # fmt: skip


def from_key(form: Form, key: Any) -> Bits:
    """The bits of a key in the order of the form's values; +0 for key 0."""
    return np.where(key < 0, (1 << (form.width - 1)) | -key, key).astype(np.uint32)


def worst_of(
    stage: str, form: Form, actual: Bits, low: Bits, high: Bits, outside: Any, place: Place
) -> Worst:
    """The element that lies farthest outside, among those where ``outside`` is true: at least
    one. ``actual`` is compared with ``low..high``; all four have one shape."""
    worst = _finding(stage, form, actual, low, high, outside, place, None).worst
    assert worst is not None, "nothing is outside"
    return worst


def _finding(
    stage: str, form: Form, actual: Bits, low: Bits, high: Bits, outside: Any, place: Place,
    live: Any,
) -> Finding:  # fmt: skip
    """Counts, tallies and the worst element of those ``outside``."""
    total = actual.size
    if live is not None:
        mask = np.broadcast_to(live, actual.shape)
        outside, total = outside & mask, int(mask.sum())
    count = int(outside.sum())
    if not count:
        return Finding(stage, total)
    at = np.nonzero(outside)
    ulps = _ulps(form, actual[at], low[at], high[at])
    worst_at = int(np.argmax(ulps))
    first = tuple(int(axis[worst_at]) for axis in at)
    rows, tiles, shape = _coordinates(at, place, actual.shape)
    case_rows = _case_rows(place, rows)
    lines, tokens = _by_token(place, rows, case_rows)
    cells, cell_counts = np.unique(np.stack([lines, tiles]), axis=1, return_counts=True)
    order = np.argsort(-cell_counts, kind="stable")[:GRID_LIMIT]
    grid = tuple((int(cells[0, i]), int(cells[1, i]), int(cell_counts[i])) for i in sorted(order))
    return Finding(
        stage,
        total,
        count,
        _worst(stage, form, first, actual, low, high, int(ulps[worst_at]), place),
        _tally(case_rows),
        _experts(at, place),
        _tally(tiles),
        grid,
        shape,
        tokens,
    )


def near(keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Keys whose differences fit in an int64 and lie below :data:`_FAR`: an id may be any int64."""
    return np.clip(keys, -_FAR // 2 + 1, _FAR // 2 - 1)


def _ulps(form: Form, actual: Bits, low: Bits, high: Bits) -> npt.NDArray[np.int64]:
    nan = form.is_nan(actual) | form.is_nan(low)
    least, key, most = (near(form.key(bits)) for bits in (low, actual, high))
    far = np.maximum(least - key, key - most)
    return np.where(nan, _FAR, np.maximum(far, 0))


def _worst(
    stage: str, form: Form, index: tuple[int, ...], actual: Bits, low: Bits, high: Bits,
    ulps: int, place: Place,
) -> Worst:  # fmt: skip
    by_axis = dict(zip(place.axes, index, strict=True))
    row = by_axis.get("token")
    slot = by_axis.get("slot")
    expert = by_axis.get("expert")
    if expert is None and place.ids is not None and row is not None and slot is not None:
        expert = int(place.ids[row, slot])
    token = None if row is None else place.token(row)
    channel = by_axis.get("channel")
    lo, hi, bits = low[index], high[index], actual[index]
    same = form.hex(lo) == form.hex(hi)
    return Worst(
        stage,
        index if row is None or place.axes[0] != "token" else (place.token(row), *index[1:]),
        token,
        slot,
        expert,
        None if channel is None else channel * place.per_channel,
        form.text(lo) if same else f"{form.text(lo)} to {form.text(hi)}",
        (form.hex(lo), form.hex(hi)),
        form.text(bits),
        form.hex(bits),
        None if ulps == _FAR else ulps,
    )


def _coordinates(
    at: tuple[Any, ...], place: Place, shape: tuple[int, ...]
) -> tuple[Any, Any, tuple[int, int]]:
    """Row and 128-channel tile of every element outside, and the size of the whole map.

    The row is the first axis (token or expert); a tensor without channels has one tile.
    """
    zeros = np.zeros_like(at[0]) if at else np.zeros(1, np.int64)
    rows = at[0] if at else zeros
    size = (shape[0] if shape else 1, 1)
    if "channel" not in place.axes:
        return rows, zeros, size
    axis = place.axes.index("channel")
    tiles = at[axis] * place.per_channel // TILE
    return rows, tiles, (size[0], -(-shape[axis] * place.per_channel // TILE))


def _case_rows(place: Place, rows: Ids) -> Ids:
    """The case's row behind each position of axis 0."""
    if "token" not in place.axes or place.tokens is None:
        return rows
    return np.asarray(place.tokens, np.int64)[rows]


def _by_token(place: Place, rows: Ids, case_rows: Ids) -> tuple[Ids, tuple[int, ...]]:
    """The map's line of each of the ``rows``, and the token of each line as in
    :class:`Finding`: the lines of tokens stand in the order of tokens."""
    if "token" not in place.axes or place.tokens is None:
        return rows, ()
    tokens = np.unique(np.asarray(place.tokens, np.int64))
    if len(tokens) < len(place.tokens):  # a token twice: its rows are two lines
        return rows, tuple(place.tokens)
    usual = np.array_equal(tokens, np.arange(len(tokens)))
    return np.searchsorted(tokens, case_rows), () if usual else tuple(tokens.tolist())


def _tally(values: Ids) -> dict[int, int]:
    """Value -> how often, the most frequent first."""
    distinct, counts = np.unique(values, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:TALLY_LIMIT]
    return {int(distinct[i]): int(counts[i]) for i in order}


def _experts(at: tuple[Any, ...], place: Place) -> dict[int, int]:
    """Expert -> elements outside; an element of y counts for every expert of its token."""
    if "expert" in place.axes:
        return _tally(at[place.axes.index("expert")])
    if place.ids is None or "token" not in place.axes:
        return {}
    row = at[place.axes.index("token")]
    if "slot" in place.axes:
        return _tally(place.ids[row, at[place.axes.index("slot")]])
    rows, counts = np.unique(row, return_counts=True)
    tally: dict[int, int] = {}
    for position, count in zip(rows, counts, strict=True):
        for expert in np.unique(place.ids[position]):
            if expert >= 0:
                tally[int(expert)] = tally.get(int(expert), 0) + int(count)
    ranking = sorted(tally.items(), key=lambda item: (-item[1], item[0]))
    return dict(ranking[:TALLY_LIMIT])
