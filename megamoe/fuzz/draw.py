"""Problem ``number`` of a seed: a forward case, by integers alone.

The problem depends on seed and number and on nothing else: not on the backend, the contract, the
machine, the speed or the problems before. ``fuzz`` skips a problem that a backend cannot compute. A
change of a table here or in ``data`` changes the problems of every seed, and ``tests/test_fuzz.py``
holds digests of some.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from megamoe.cases import Case, kind_of
from megamoe.fuzz.data import PROFILES, Params, Profile
from megamoe.fuzz.die import Die

_TOKENS: Final = (
    (1, 0), (16, 1), (12, 2), (10, 3), (8, 4), (5, 5), (4, 7), (5, 8), (3, 9), (3, 15), (3, 16),
    (3, 17), (1, 33), (1, 64), (2, 127), (2, 128), (3, 129),
)  # fmt: skip
_TOP_K: Final = (
    (24, 1), (24, 2), (8, 3), (8, 4), (4, 5), (6, 6), (3, 7), (8, 8), (1, 9), (2, 10), (1, 11),
    (1, 12), (1, 13), (1, 14), (1, 15), (4, 16),
)  # fmt: skip
_MOST_SLOTS: Final = 34
"""Tokens times top-k, but in the problems whose many rows are the point."""
_MANY: Final = 100
"""Tokens from here on all go to the same experts, at most two."""
_BITS: Final = (0x7FC0, 0x7F80, 0xFF80, 0x8000, 0x0000, 0x0001, 0x807F, 0x0080, 0x7F77, 0xFF77,
                0x43E0, 0x43E1, 0x38D1, 0x3F80, 0x4700)  # fmt: skip
"""bfloat16: NaN, the infinities, zeros, subnormals, the least normal, the largest that is staged as
a bfloat16 number, 448 and the next, the staging floor, 1, and 32768."""
_WEIGHTS: Final = (0.0, -0.0, -0.625, 2.0**-130, -(2.0**-149), 2.0**100, 3.0e38)
_NOT_FINITE: Final = (float("inf"), float("-inf"), float("nan"))


@dataclass(frozen=True)
class FuzzCase(Case):
    """A forward case that was drawn."""

    number: int = 0
    profile: str = ""
    """Name of the values in :mod:`megamoe.fuzz.data`, or ``nvfp4``."""
    calibrated: bool = False
    """Its data are of a kind that the statistic was calibrated on."""


def draw(seed: int, number: int) -> FuzzCase:
    """Problem ``number`` (from 0 on) of ``seed``."""
    die = Die(seed, number)
    params = _sizes(die)
    possible = [(p.weight, p) for p in PROFILES if params["tokens"] <= p.most_tokens]
    profile = die.by_weight("profile", possible)
    params["clamp"] = die.by_weight(
        "clamp", [(8, "none"), (8, 10.0), (3, 7.0), (1, 0.0), (1, 2.0**-6), (1, 0.5), (1, 64.0)]
    )
    params["fast_math"] = not die.one_in("precise", 3)
    params |= profile.values(die, params)
    plain = _features(die, params, profile)
    _patch(die, params, profile)
    plain = _routing(die, params, profile) and plain
    plain = plain and "patch" not in params["hidden_recipe"]
    params["family"] = "envelope"
    name = f"forward/fuzz-{seed}-{number}"
    kind_of("forward").complete(name, params)
    data = params.get("weight_format") or profile.name
    return FuzzCase(
        name, "forward", "full", "", die.key("inputs"), params, Path(), number, data,
        profile.calibrated and plain,
    )  # fmt: skip


def _sizes(die: Die) -> Params:
    tokens, top_k = die.by_weight("tokens", _TOKENS), die.by_weight("top_k", _TOP_K)
    if tokens >= _MANY:
        top_k = min(top_k, 2)
    elif tokens * top_k > _MOST_SLOTS:
        if die.one_in("keep top_k", 2):
            tokens = max(1, _MOST_SLOTS // top_k)
        else:
            top_k = max(1, _MOST_SLOTS // tokens)
    sizes = [(12, (128, 128)), (2, (256, 128)), (2, (128, 256)), (1, (384, 256)), (1, (512, 128))]
    hidden, intermediate = die.by_weight("sizes", sizes[:1] if tokens >= _MANY else sizes)
    more = die.of("experts", (0, 0, 1, 3, 30))
    return {
        "hidden": hidden, "intermediate": intermediate, "tokens": tokens, "top_k": top_k,
        "experts": top_k + more,
    }  # fmt: skip


def _features(die: Die, params: Params, profile: Profile) -> bool:
    """Add the options of the call; returns whether it has none."""
    if profile.pure:
        return True
    gated = die.by_weight("activation", [(50, ""), (2, "oai"), (3, "alpha-beta"), (2, "step"),
                                       (3, "situ")])  # fmt: skip
    if gated == "oai":
        params |= {"activation_alpha": 1.702, "activation_beta": 1.0, "clamp": 7.0}
    elif gated == "alpha-beta":
        alpha, beta = die.of("alpha, beta", ((1.702, 0.5), (0.5, 0.0), (1.0, -1.0)))
        params |= {"activation_alpha": alpha, "activation_beta": beta}
    elif gated == "step":
        params |= {"activation": "swiglustep", "clamp": die.of("step", (7.0, 0.5))}
    elif gated == "situ":
        alpha, beta = die.of("alpha, beta", ((1.0, 1.0), (4.0, 2.0)))
        params |= {"activation": "situ", "activation_alpha": alpha, "activation_beta": beta,
                   "clamp": "none"}  # fmt: skip
    if die.one_in("nvfp4", 30) and gated in ("", "oai", "alpha-beta"):
        return _nvfp4(die, params)
    shared = die.one_in("shared expert", 16)
    if shared:
        params["shared_recipe"] = die.of("shared", ({}, {"size": 256}, {"kind": "expert"}))
    if die.one_in("shared output", 20):
        params["shared_output_recipe"] = die.of("output", ({}, {"log2_scale": -8}, {"spread": 9}))
    if die.one_in("combine", 24):
        params["combine_dtype"] = "fp8"
    return not gated and not {"shared_recipe", "shared_output_recipe", "combine_dtype"} & {*params}


def _nvfp4(die: Die, params: Params) -> bool:
    """Weights in NVFP4 in place of the profile's."""
    low = die.of("nvfp4 scales", ([0x48, 32], [0, 16], [0x70, 15], [0, 127]))
    params |= {
        "weight_format": "nvfp4", "hidden": 256, "intermediate": 256,
        "l2_activation_scale": die.of("l2 scale", (2.0**-6, 0.013, 2.0**3)),
        "hidden_recipe": {"log2_scale": die.of("nvfp4 shift", (0, 0, -12))},
        "weights_recipe": {"w13_scale": low, "w2_scale": low},
        "tokens": min(params["tokens"], 4), "top_k": min(params["top_k"], 3),
    }  # fmt: skip
    return False


def _patch(die: Die, params: Params, profile: Profile) -> None:
    """Lay one to three values over the hidden states of some problems."""
    if profile.pure or not params["tokens"] or not die.one_in("patch", 6):
        return
    params["hidden_recipe"] = {
        **params["hidden_recipe"],
        "patch": [
            {
                "token": die.below(f"token {i}", params["tokens"]),
                "channel": die.below(f"channel {i}", params["hidden"]),
                "count": die.of(f"count {i}", (1, 1, 2, 32)), "bits": die.of(f"bits {i}", _BITS),
            }
            for i in range(die.within("patches", 1, 3))
        ],
    }  # fmt: skip


def _routing(die: Die, params: Params, profile: Profile) -> bool:
    """Put in the routing; whether its weights are ordinary."""
    tokens, top_k = params["tokens"], params["top_k"]
    kind = "same" if tokens >= _MANY else die.by_weight(
        "routing", [(8, "random"), (3, "same"), (2, "duplicate"), (2, "rotate"), (2, "skewed")]
    )  # fmt: skip
    recipe: dict[str, Any] = {"kind": kind}
    if kind == "skewed":
        recipe["first"] = die.below("first", params["experts"])
    if die.one_in("mask", 4):
        recipe["mask_every"] = die.of("mask_every", (2, 2, 4, 4, 8, 1))
    params["routing_recipe"] = recipe
    if profile.pure:  # powers of two keep exact values exact
        recipe["weights"] = [[2.0 ** die.within(f"weight {i}", -3, 3) for i in range(top_k)]]
        return True
    special = die.by_weight("weights", [(14, ""), (2, "octaves"), (2, "scaling"), (3, "masked"),
                                      (3, "live")])  # fmt: skip
    if special == "octaves":
        recipe["octaves"] = die.of("octaves", (4, 20, 120))
    elif special == "scaling":
        recipe["scaling"] = die.of("scaling", (2.5, 2.0**-20, 2.0**40))
    elif special:
        slot = die.below("slot", top_k)
        rows = [
            [die.within(f"weight {r} {k}", 1, 255) / 256 for k in range(top_k)]
            for r in range(min(3, max(1, tokens)))
        ]
        row = die.below("row", len(rows))
        values = _NOT_FINITE if special == "masked" else (*_WEIGHTS, *_NOT_FINITE)
        rows[row][slot] = die.of("value", values)
        recipe["weights"] = rows
        if special == "masked":
            recipe["mask"] = [[t, slot] for t in range(row, tokens, len(rows))]
    return not special
