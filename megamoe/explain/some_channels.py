"""A deviation that holds in some channels only, of one step of one token.

It must give all that is wrong, and must change right values elsewhere. Channels are the last
freedom: they are tried where no deviation of all of them is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.explain.extent import Extent, part_of_tiles
from megamoe.explain.match import MARGIN, Fit, in_slots
from megamoe.explain.predict import Predictor
from megamoe.explain.ways import Way
from megamoe.spec.formats import GROUP

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]
_OF_GROUPS: Final = frozenset({"amax", "exponent"})
"""Steps that a group has as a whole."""


def of_codes(
    run: Predictor, fits: Sequence[Fit], ways: Mapping[tuple[str, str], Way],
    masks: Mapping[tuple[str, str], Bools], contract: Bools, is_other: bool,
) -> list[Fit]:  # fmt: skip
    """``fits`` with the channels of each. ``masks``, by stage and name, and ``contract``
    ``(S, I/32 + I)``: scale bytes, then codes, that deviation and contract do not give.
    ``is_other``: the deviations were chosen on another token."""
    slots = [slot.slot for slot in run.routed()]
    by_group = _by_group(contract)
    every = _of_all(fits, by_group, GROUP)
    if any(one.is_exact for one in fits) and not is_other:
        return every
    out = [
        _better(one, _fit(one, by_group, _by_group(masks[one.stage, one.name]), slots, GROUP),
                is_other)
        for one in every
    ]  # fmt: skip
    at = _part_of_groups(by_group)
    if at is None or any(one.is_exact for one in out if not is_other):
        return out
    return [
        _better(one, _in_part(run, one, ways[one.stage, one.name], at, contract, slots), is_other)
        for one in out
    ]


def of_y(
    fits: Sequence[Fit], masks: Sequence[Bools], contract: Bools, is_other: bool
) -> list[Fit]:  # fmt: skip
    """The same of ``y``: ``masks`` and ``contract`` ``(n,)`` each."""
    every = _of_all(fits, contract[None, :, None], 1)
    if any(one.is_exact for one in fits) and not is_other:
        return every
    return [
        _better(one, _fit(one, contract[None, :, None], mask[None, :, None], [0], 1), is_other)
        for one, mask in zip(every, masks, strict=True)
    ]


def _better(one: Fit, other: Fit | None, is_other: bool) -> Fit:
    """``other`` where ``one`` is not exact, and the channels of ``other`` are known; on another
    token they need not be: its channels join those of the first."""
    if not one.misses or other is None or other.extent is None:
        return one
    return other if is_other or (other.extent.text and other.explains >= MARGIN) else one


def _of_all(fits: Sequence[Fit], contract: Bools, width: int) -> list[Fit]:
    """``fits``; those that give all have the channels of the wrong values, and lack none."""
    wrong = np.repeat(np.any(contract, axis=(0, 2)), width)
    extent = Extent(wrong, np.zeros_like(wrong), np.ones_like(wrong))
    return [one if one.misses else replace(one, extent=extent) for one in fits]


def _fit(one: Fit, contract: Bools, way: Bools, slots: Sequence[int], width: int) -> Fit | None:
    """A deviation in some channels; None where it does not give all that is wrong. ``contract`` and
    ``way`` ``(S, n, m)``: the values that contract and deviation do not give, by slot and by
    ``width`` channels."""
    rows: Bools = np.any(contract, axis=(1, 2))
    before, after = contract.sum(axis=2), way.sum(axis=2)
    has = np.any((after < before)[rows], axis=0)
    lacks = np.any((after > before)[rows], axis=0)
    if (has & lacks).any() or np.where(has, after, before)[rows].any():
        return None
    others = [slots[k] for k in np.flatnonzero(~rows).tolist() if after[k, has].any()]
    where = in_slots([slots[k] for k in np.flatnonzero(rows).tolist()]) if others else ""
    masks = (np.repeat(mask, width) for mask in (has, lacks, np.ones_like(has)))
    return _exact(one, where, Extent(*masks))


def _exact(one: Fit, where: str, extent: Extent) -> Fit:
    return replace(one, where=where, explains=one.differing, contradicts=0, extent=extent)


def _by_group(values: Bools) -> Bools:
    """``(S, G + 32 G)`` scale bytes, then codes, to ``(S, G, 33)``."""
    groups = values.shape[1] // (GROUP + 1)
    sf, codes = values[:, :groups, None], values[:, groups:].reshape(len(values), groups, GROUP)
    return np.concatenate([sf, codes], axis=2)


def _part_of_groups(by_group: Bools) -> Bools | None:
    """``(I,)``: the channels of the same part of each group, where only these are wrong beside
    right scale bytes; None where the groups show no such part. ``by_group``: of the contract."""
    codes = by_group[..., 1:][~by_group[..., 0]]
    if codes.sum() < MARGIN:
        return None
    wrong: Bools = np.any(codes, axis=0)
    part = part_of_tiles(wrong, ~wrong, 1)
    if part is None:
        return None
    period, first, last = part
    place = np.arange(by_group.shape[1] * GROUP) % period
    return np.asarray((place >= first) & (place <= last))


def _in_part(
    run: Predictor, one: Fit, way: Way, at: Bools, contract: Bools, slots: Sequence[int]
) -> Fit | None:
    """A deviation in the channels ``at`` ``(I,)``, which are a part of each group."""
    if not one.misses or way.steps & _OF_GROUPS:
        return None
    rows: Bools = np.any(contract, axis=1)
    wrong: Bools = np.any(run.outside_mix(way, at), axis=1)
    if wrong[rows].any():
        return None
    where = in_slots([slots[k] for k in np.flatnonzero(rows).tolist()]) if wrong.any() else ""
    return _exact(one, where, Extent(at, ~at, np.ones_like(at)))


__all__ = ["of_codes", "of_y"]
