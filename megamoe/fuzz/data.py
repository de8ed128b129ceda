"""The values of a drawn problem: hidden states and weights, which belong together.

An extreme scale factor alone gives zeros or infinities, which show little. So a profile that moves
one tensor to an end of its range moves another the other way, and results stay numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from megamoe.fuzz.die import Die
from megamoe.spec.formats import GROUP

Params = dict[str, Any]
W13: Final = 118
"""Lowest scale byte of w13 in ordinary weights: gates of about 1 from hidden states of about 1."""
W2: Final = 119


@dataclass(frozen=True)
class Profile:
    """Values of one kind."""

    name: str
    weight: int
    """Its weight in the draw, relative to the sum of all weights."""
    values: Callable[[Die, Params], Params]
    """``values(die, params)``: parameters of a forward case, given those that are drawn already."""
    most_tokens: int = 1 << 30
    calibrated: bool = False
    """The statistic of the judge was calibrated on such data (``tools/calibrate.py``)."""
    pure: bool = False
    """The values are chosen one by one: nothing is laid over them."""


def _plain(hidden: Params | None = None, weights: Params | None = None, **more: Any) -> Any:
    return lambda die, params: {
        "hidden_recipe": dict(hidden or {}), "weights_recipe": dict(weights or {}), **more,
    }  # fmt: skip


def _points(die: Die, params: Params) -> Params:
    """The zero-freedom lattice."""
    weights: Params = {"kind": "carrier"}
    if die.one_in("closed", 3):
        weights["closed_every"] = die.of("closed every", (1, 2, 64))
    if die.one_in("probe", 3):
        weights["w2"] = "probe"
    return {"hidden_recipe": {"kind": "grid"}, "weights_recipe": weights}


def _levels(die: Die, params: Params) -> Params:
    levels = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -1.0, -2.0, -6.0)
    start, count = die.below("levels", len(levels)), die.within("number of levels", 1, 4)
    gate_levels = [levels[(start + 5 * i) % len(levels)] for i in range(count)]
    weights = {
        "kind": "carrier", "gate_levels": gate_levels, "up_levels": gate_levels[::-1],
        "lower": die.of("lower", (0, 0, 1, 4, 12)),
    }  # fmt: skip
    return {"hidden_recipe": {"kind": "grid"}, "weights_recipe": weights}


_TIES: Final = (17 / 16, 19 / 16, 25 / 16, 27 / 16)
"""Midpoints of two E4M3 values of a power of two; of the first and third the lower one is even."""


def _ties(die: Die, params: Params) -> Params:
    """Activations on midpoints between two codes, the amax of each group being 448 of its scale.

    The silu of 32 is 32 in the precise forms, so ``32 * up * weight`` is exact. A fast reciprocal
    may err, so the fast form leaves a tie open: it is one problem in four.
    """
    acts, sums = [], []
    least = die.by_weight("least", [(3, 0), (1, -6), (1, -10)])
    for token in range(params["tokens"]):
        for group in range(params["intermediate"] // GROUP):
            first = group * GROUP
            acts.append([token, first, 1, 32.0, 1.75])
            for channel in range(1, 6):
                word = f"tie {token} {group} {channel}"
                power = die.within(f"power of {word}", least, 7)
                value = 2.0**-10 * die.of(word, (1, 3)) if power < -9 else (
                    die.of(word, _TIES) * 2.0 ** max(power, -6)
                )  # fmt: skip
                sign = -1 if die.one_in(f"sign of {word}", 2) else 1
                acts.append([token, first + channel, 1, 32.0, sign * value * 2.0**-8])
    for channel in range(params["intermediate"]):
        if channel % GROUP in range(1, 6):
            sums.append({"w": [[channel, 1, 1.0]]})
    patch = [
        {"token": t, "channel": GROUP * t + i, "bits": (0x3F80, 0x3E00)[i]}
        for t in range(params["tokens"]) for i in (0, 1)
    ]  # fmt: skip
    return {
        "hidden_recipe": {"kind": "constant", "bits": 0, "patch": patch},
        "weights_recipe": {"kind": "directed", "acts": acts, "sums": sums}, "clamp": "none",
        "fast_math": die.one_in("fast ties", 4),
    }  # fmt: skip


def _small(die: Die, params: Params) -> Params:
    """Gates and ups so small that their product is near the least scale factor, 2**-22."""
    low = die.within("w13", 96, 112)
    return _weights(low, min(253, W2 + 2 * (W13 - low)), die)


def _subnormal(die: Die, params: Params) -> Params:
    """Products of silu and up below 2**-126; w2 brings y back, as far as it goes."""
    return _weights(die.within("w13", 44, 60), die.within("w2", 225, 252), die)


def _shift(die: Die, params: Params) -> Params:
    """Hidden states of another magnitude, and w13 the other way."""
    shift = die.of("shift", (-110, -60, -24, -20, -15, -13, -12, -11, 24, 60, 90, 110))
    recipe = _weights(min(252, max(0, W13 - max(shift, -22))), W2, die)
    return {**recipe, "hidden_recipe": {"log2_scale": shift, "spread": die.of("spread", (0, 2, 8))}}


def _least_w13(die: Die, params: Params) -> Params:
    """Scale bytes 0 and 1 of w13 under the largest hidden states."""
    recipe = _weights(die.within("w13", 0, 2), die.within("w2", W2, W2 + 8), die)
    return {**recipe, "hidden_recipe": {"log2_scale": die.within("shift", 108, 118)}}


def _most_w13(die: Die, params: Params) -> Params:
    """Scale bytes up to 254 of w13 over staged values near the least."""
    low = die.of("w13", (251, 252, 253))
    recipe = _weights(low, die.of("w2", (4, 60, W2)), die)
    return {**recipe, "hidden_recipe": {"log2_scale": die.within("shift", -32, -26), "spread": 0}}


def _ends_w2(die: Die, params: Params) -> Params:
    return _weights(W13, die.of("w2", (0, 0, 1, 2, 8, 240, 250, 252, 253)), die)


def _weights(low13: int, low2: int, die: Die) -> Params:
    recipe = {"w13_scale": [low13, die.within("octaves of w13", 1, 2)],
              "w2_scale": [low2, die.within("octaves of w2", 1, 2)]}  # fmt: skip
    return {"hidden_recipe": {}, "weights_recipe": recipe}


def _wide(die: Die, params: Params) -> Params:
    """Scales so far apart that no float64 holds a sum: the oracle turns to rationals."""
    low, octaves = die.of("range", ((96, 30), (60, 100), (0, 255), (0, 127)))
    return {
        "hidden_recipe": {"spread": die.of("spread", (2, 12))},
        "weights_recipe": {"w13": "uniform", "w2": "uniform", "w13_scale": [low, octaves],
                           "w2_scale": [low, octaves]},
    }  # fmt: skip


def _nan_scale(die: Die, params: Params) -> Params:
    both = {"w13_scale": [W13, 2], "w2_scale": [W2, 2]}
    both[die.of("which", ("w13_scale", "w2_scale"))] = [254, 2]
    return {"hidden_recipe": {"log2_scale": -26}, "weights_recipe": both}


def _constant(die: Die, params: Params) -> Params:
    bits = (0x0000, 0x8000, 0x3F80, 0xBF80, 0x0001, 0x007F, 0x0080, 0x38D1, 0x38D2, 0x43E0, 0x43E1)
    return {"hidden_recipe": {"kind": "constant", "bits": die.of("bits", bits)},
            "weights_recipe": {}}  # fmt: skip


def _few(die: Die, params: Params) -> Params:
    """Weights that are mostly zeros, or all zeros in one linear."""
    w13, w2 = die.of("tables", (("sparse", "sparse"), ("zero", "bell"), ("bell", "zero"),
                                ("grid", "probe"), ("bell", "probe")))  # fmt: skip
    return {"hidden_recipe": {}, "weights_recipe": {"w13": w13, "w2": w2}}


PROFILES: Final = (
    Profile("two octaves", 16, _plain(), calibrated=True),
    Profile("eight octaves", 5, _plain(
        {"spread": 8}, {"w13_scale": [110, 8], "w2_scale": [118, 8]}), calibrated=True),
    Profile("outliers", 5, _plain(
        {"spread": 4, "outlier_every": 64}, {"w13_scale": [112, 4], "w2_scale": [118, 4]}),
        calibrated=True),
    Profile("precise, uniform", 5, _plain(
        {"spread": 12}, {"w13": "uniform", "w2": "uniform", "w13_scale": [106, 12]},
        fast_math=False, clamp="none"), calibrated=True),
    Profile("points", 14, _points),
    Profile("levels", 5, _levels),
    Profile("ties", 8, _ties, most_tokens=4, pure=True),
    Profile("small activations", 6, _small),
    Profile("subnormal activations", 5, _subnormal),
    Profile("shifted", 6, _shift),
    Profile("least scales of w13", 4, _least_w13),
    Profile("greatest scales of w13", 4, _most_w13),
    Profile("ends of w2", 6, _ends_w2),
    Profile("wide scales", 1, _wide, most_tokens=1),
    Profile("NaN scales", 1, _nan_scale),
    Profile("constant", 4, _constant),
    Profile("few weights", 5, _few),
)  # fmt: skip
