"""Deviations whose number is read from the output: a code in place of zero, another slot's weight.

No catalogue can list them, since each code and each slot of a batch would be one. So the output
proposes them, and then they are tried as any other deviation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt

from megamoe.explain.deviations.staging import StagedWay
from megamoe.explain.life import Life, Slot, is_live
from megamoe.explain.predict import Acts, Predictor
from megamoe.explain.ways import Way, right
from megamoe.spec.formats import E4M3_TABLE, F32, F64, GROUP, U8, bf16_decode

Bools = npt.NDArray[np.bool_]
Change = Callable[[F32, U8], U8]
"""Of right codes, from the values and these codes."""

# --- zeros --------------------------------------------------------------------------------------

_SIGN: Final = np.uint8(0x80)


def zeros_of_staging(life: Life, x: U8) -> Iterator[StagedWay]:
    """One code ``x`` ``(H,)`` shows in place of zeros."""
    values = bf16_decode(life.token.hidden)
    for name, change in zeros(values, life.x, x):
        yield StagedWay(name, partial(_row, life, values, change))


def _row(life: Life, values: F32, change: Change) -> tuple[U8, U8]:
    return change(values, life.x), life.x_sf


def zeros_of_codes(life: Life, acts: Acts) -> Iterator[Way]:
    """The same of the codes between the linears."""
    slots = [slot for slot in life.slots if slot.slot in acts]
    if not slots:
        return
    own = right(life)
    values = np.concatenate([slot.value for slot in slots])
    codes = np.concatenate([slot.codes for slot in slots])
    actual = np.concatenate([acts[slot.slot][0] for slot in slots])
    for name, change in zeros(values, codes, actual):
        yield own.variant(
            name, "requantise", codes=lambda v, e, m, f=change: f(v, own.codes(v, e, m))
        )


def zeros(values: F32, codes: U8, actual: U8) -> Iterator[tuple[str, Change]]:
    """By name, the change of right codes into codes with another one in place of zeros.

    ``values`` before the cast, their right ``codes``, and the ``actual`` ones of the output: of one
    shape. None where no code of a zero is wrong.
    """
    zero = values == 0
    rounded = ((codes & 0x7F) == 0) & ~zero
    wrong = codes != actual
    at = (zero if (zero & wrong).any() else rounded) & wrong
    if not at.any():
        return
    size = int(np.bincount(actual[at] & 0x7F).argmax())
    if not size:
        return
    plus = actual[at & ~np.signbit(values) & ((actual & 0x7F) == size)]
    code = size | (0x80 if (plus & _SIGN).mean() > 0x40 else 0) if len(plus) else size
    text = f"become {code:#04x} ({E4M3_TABLE[code]:g})"
    has_minus = bool(np.signbit(values[at]).any())
    for who, many in (("zeros", False), ("values that round to zero, and zeros,", True)):
        if (many and not rounded.any()) or not (many or zero.any()):
            continue
        yield f"{who} {text}", _encoder(code, many=many, signed=False)
        if has_minus or many:
            yield f"{who} {text} with their sign", _encoder(code, many=many, signed=True)


def _encoder(code: int, *, many: bool, signed: bool) -> Change:
    def change(values: F32, codes: U8) -> U8:
        at = (codes & 0x7F) == 0 if many else values == 0
        sign = np.where(np.signbit(values), _SIGN, 0) if signed else np.uint8(0)
        return np.where(at, code ^ sign, codes).astype(np.uint8)

    return change


# --- the routing weight of another slot ---------------------------------------------------------

_TOKENS_AT_MOST: Final = 1024
_NEAREST: Final = 16
"""Routing weights nearest to the one that a slot's codes suggest."""
_NEAR: Final = 0.05
"""The relative distance from it: codes of 4 bits, some of them beside the right one."""
CHANCE: Final = 1 / 16
"""The largest probability of a match by chance."""
_HALVINGS: Final = 14
"""Of 5%: to 3 millionths, a tenth of what 2048 codes tell apart."""
LEAST: Final = 8
"""Wrong values of a slot that its weight must explain, as for a match in some slots."""
OTHER_SLOTS: Final = ("routing weight", "routing weights are those of other slots")


@dataclass(frozen=True)
class OfOthers:
    """Each wrong slot of a token with the routing weight of another slot of the batch."""

    way: Way
    chance: float
    """The probability that the batch has such weights by chance; 1, where several slots have one:
    equal weights are no chance, and they prove nothing."""
    is_unique: bool
    """Whether one slot of the batch alone has the weight, for each of the wrong slots."""

    @property
    def is_certain(self) -> bool:
        """Whether this token alone proves it."""
        return self.is_unique and self.chance <= CHANCE


def other_slots(run: Predictor, wrong: Bools, least: int = LEAST) -> OfOthers | None:
    """Each wrong slot with the routing weight of another slot of the batch.

    ``wrong`` ``(S, I/32 + I)``: scale bytes and codes outside, by slot. None unless for each slot
    with a wrong value a weight of the batch gives all its values, and explains ``least`` of them.
    """
    life, source = run.life, run.source
    if life.contract.routing_weight.value != "activation" or source.tokens > _TOKENS_AT_MOST:
        return None
    slots = [s for s, row in zip(run.routed(), wrong, strict=True) if row.any()]
    counts = wrong.sum(axis=1)
    if not slots or (counts[counts > 0] < least).any():
        return None
    tokens = [source.token(at) for at in range(source.tokens)]
    weights = np.stack([np.where(is_live(t), t.weights, np.float32(0)) for t in tokens])
    near = {s.slot: _near(s, *run.acts[s.slot], weights) for s in slots}
    fits: dict[int, list[np.float32]] = {s.slot: [] for s in slots}
    for k in range(max(len(candidates) for candidates in near.values())):
        one = {slot: candidates[k] for slot, candidates in near.items() if k < len(candidates)}
        for slot in _that_fit(run, one):
            fits[slot].append(one[slot])
    if not all(fits.values()):
        return None
    owners = {k: np.argwhere(np.isin(weights, candidates)) for k, candidates in fits.items()}
    choice = {k: candidates[0] for k, candidates in fits.items()}
    is_unique = all(len(owner) == 1 for owner in owners.values())
    moves = ", ".join(
        f"slot {k} of token {life.at} takes that of slot {owner[0][1]} of token {owner[0][0]}"
        for k, owner in owners.items()
    )
    name = f"{OTHER_SLOTS[1]}: {moves}" if is_unique else OTHER_SLOTS[1]
    is_shared = any(len(owners[slot]) > len(candidates) for slot, candidates in fits.items())
    chance = 1.0 if is_shared else _by_chance(run, choice, weights)
    return OfOthers(_weight_way(life, name, choice), chance, is_unique)


def _that_fit(run: Predictor, weights: dict[int, np.float32]) -> list[int]:
    """The slots of which the weights give all codes and scale bytes."""
    beyond = np.any(run.outside_codes(_weight_way(run.life, "", weights)), axis=1)
    routed = [s.slot for s in run.routed()]
    return [slot for slot in weights if not beyond[routed.index(slot)]]


def _by_chance(run: Predictor, choice: dict[int, np.float32], weights: F32) -> float:
    """The probability that weights of the batch give the codes by chance.

    The weights that give the codes of a slot are an interval around the chosen one. Its width times
    the density of the batch's weights there is the number ``n`` that is expected in it; at least
    one is in it with the probability ``1 - exp(-n)``. A batch of many tokens has some weight near
    to any number.
    """
    width = dict.fromkeys(choice, 0.0)
    for end in (-_NEAR, _NEAR):
        inside, beyond = dict.fromkeys(choice, 0.0), dict.fromkeys(choice, end)
        for _ in range(_HALVINGS):
            middle = {slot: (inside[slot] + beyond[slot]) / 2 for slot in choice}
            trial = {s: np.float32(w * (1 + middle[s])) for s, w in choice.items()}
            fits = {*_that_fit(run, trial)}
            for slot, at in middle.items():
                (inside if slot in fits else beyond)[slot] = at
        for slot in choice:
            width[slot] += abs(beyond[slot])
    every = np.unique(weights[weights != 0])
    near = {s: np.sum(np.abs(every / w - 1) < _NEAR) / (2 * _NEAR) for s, w in choice.items()}
    return float(np.prod([-np.expm1(-width[slot] * near[slot]) for slot in choice]))


def _weight_way(life: Life, name: str, weights: dict[int, np.float32]) -> Way:
    return right(life).variant(
        name, OTHER_SLOTS[0], weight=lambda slot: weights.get(slot.slot, slot.weight)
    )


def _near(slot: Slot, codes: U8, sf: U8, weights: F32) -> F32:
    """The routing weights near to the one that the shown codes of a slot suggest."""
    size = codes & 0x7F
    sure = (size >= 8) & (size < 0x7E) & (slot.value != 0) & np.isfinite(slot.value)
    if not sure.any() or not np.isfinite(slot.weight) or not slot.weight:
        return np.empty(0, np.float32)
    exponent = np.repeat(sf.astype(np.int32) - 127, GROUP)[sure]
    ratio: F64 = np.ldexp(E4M3_TABLE[codes[sure]].astype(np.float64), exponent) / slot.value[sure]
    middle = np.median(ratio)
    close = ratio[np.abs(ratio - middle) <= abs(middle) / 8]
    guess = (close.mean() if len(close) else middle) * slot.weight
    if not guess:  # as many codes with the sign of their value as with the other: no weight
        return np.empty(0, np.float32)
    every = np.unique(weights[(weights != 0) & (weights != slot.weight) & np.isfinite(weights)])
    distance = np.abs(every / guess - 1)
    order = np.argsort(distance, kind="stable")[:_NEAREST]
    return np.asarray(every[order][distance[order] < _NEAR], np.float32)


__all__ = [
    "CHANCE", "LEAST", "OTHER_SLOTS", "OfOthers", "other_slots", "zeros", "zeros_of_codes",
    "zeros_of_staging",
]  # fmt: skip
