"""Every dimension of coverage with its goal.

To add one: a row here, and its classes in :mod:`.values`, :mod:`.places` or :mod:`.kinds`, under
the same name. Rows of sizes are in :mod:`.size_dimensions`, those of other kinds in
:mod:`.kind_dimensions`. A goal is everything that a contract allows (bytes, branches), or a list of
classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Final

from megamoe.coverage import gates, groups, kind_dimensions, size_dimensions
from megamoe.coverage.dimension import Dimension, each
from megamoe.coverage.groups import BYTES, CODES
from megamoe.spec.contract import Contract

NIBBLES: Final = [f"{place} 0x{n:x}" for place in ("low", "high") for n in range(16)]
ROUNDED: Final = {
    "exact": "A sum that bfloat16 holds is changed.",
    "down": "Sums are rounded away from zero.",
    "up": "Sums are cut off.",
    "tie down": "Ties are rounded away from zero.",
    "tie up": "Ties are rounded toward zero.",
    "to infinity": "A sum beyond bfloat16 becomes the largest number.",
    "to zero": "A sum below half of the least number does not become zero.",
    "subnormal": "Subnormal results are flushed to zero.",
    "NaN": "A NaN is lost.",
}


@cache
def dimensions(contract: Contract) -> tuple[Dimension, ...]:
    """All of them, in the order of the table."""
    return (
        *_operands(contract),
        *_casts(contract),
        *_between(),
        *size_dimensions.sizes(),
        *size_dimensions.calls(contract),
        *kind_dimensions.staging(contract),
        *kind_dimensions.eplb(contract),
        *kind_dimensions.others(),
    )


def _operands(contract: Contract) -> Iterable[Dimension]:
    acts = [c for c in CODES if c != "0x80"]  # no output shows the sign of a zero code
    yield Dimension(
        "x-codes",
        "E4M3 code, operand of linear 1",
        each(CODES, "Linear 1 decodes E4M3 code {} wrongly."),
    )
    yield Dimension(
        "act-codes",
        "E4M3 code, operand of linear 2",
        each(acts, "Linear 2 decodes E4M3 code {} wrongly."),
    )
    for name, linear in (("w13", 1), ("w2", 2)):
        yield Dimension(
            f"{name}-nibbles",
            f"E2M1 code by its place, operand of linear {linear}",
            each(NIBBLES, f"Linear {linear} decodes the nibble '{{}}' wrongly."),
        )
        yield Dimension(
            f"{name}-bytes",
            f"UE8M0 byte of {name}",
            each(BYTES, f"Linear {linear} applies scale byte {{}} of {name} wrongly."),
        )
    x, act = groups.staging_bytes(contract), groups.requant_bytes(contract)
    yield Dimension(
        "x-bytes",
        "UE8M0 byte of x",
        each(groups.hexes(x), "Linear 1 applies scale byte {} of x wrongly."),
    )
    yield Dimension(
        "act-bytes",
        "UE8M0 byte of the activations",
        each(groups.hexes(act), "Linear 2 applies scale byte {} wrongly."),
    )
    features = contract.features.value
    if "shared-expert" in features:
        for name in ("w13", "w2"):
            finite = [c for c in CODES if c != "0x7f"]
            yield Dimension(
                f"shared-{name}-codes",
                f"E4M3 code of a shared expert's {name}",
                each(finite, f"The shared expert's {name} decodes {{}} wrongly."),
            )
            yield Dimension(
                f"shared-{name}-bytes",
                f"UE8M0 byte of a shared expert's {name}",
                each(BYTES, f"A shared {name} applies scale byte {{}} wrongly."),
            )
    if "nvfp4" in features:
        for name in ("w13", "w2"):
            yield Dimension(
                f"nvfp4-{name}-nibbles",
                f"E2M1 code by its place, NVFP4 {name}",
                each(NIBBLES, f"NVFP4 {name} decodes the nibble '{{}}' wrongly."),
            )
            yield Dimension(
                f"nvfp4-{name}-bytes",
                f"E4M3 scale byte of NVFP4 {name}",
                each(BYTES[:0x7F], f"NVFP4 {name} applies scale {{}} wrongly."),
            )


def _casts(contract: Contract) -> Iterable[Dimension]:
    has_floor = contract.requant_exponent_min.value > 0
    yield Dimension(
        "x-branches", "branch of a staged scale, seen by a forward", groups.branch_goal(True)
    )
    yield Dimension("act-branches", "branch of a requantised scale", groups.branch_goal(has_floor))
    yield Dimension(
        "x-rounding", "rounding of a staged code, seen by a forward", groups.rounding_goal()
    )
    yield Dimension("act-rounding", "rounding of a requantised code", groups.rounding_goal())
    yield Dimension("gate-up-rounding", "rounding of linear 1's sums to bfloat16", ROUNDED)
    yield Dimension("row-rounding", "rounding of linear 2's sums to bfloat16", ROUNDED)


def _between() -> Iterable[Dimension]:
    yield Dimension(
        "silu",
        "region of the clamped gate, fast and precise",
        {
            f"{mode} {name}": fault
            for mode in ("fast", "precise")
            for name, fault in gates.REGIONS.items()
        },
    )
    yield Dimension("clamp", "side of the clamp", gates.CLAMPS)
    yield Dimension(
        "weights",
        "finite routing weight",
        {
            "below 0": "The sign of a routing weight is lost.",
            "above 0": "Routing weights are ignored.",
            "1": "A weight of 1 takes a way of its own.",
            "above 1": "Routing weights are bounded by 1.",
            "below 2^-24": "A tiny routing weight is taken for zero.",
        },
    )
    stages = ("hidden", "gate", "up", "gated", "activation", "slot row", "y", "routing weight")
    never = {"gated -inf"}  # silu of minus infinity is NaN
    yield Dimension(
        "specials",
        "special number by stage",
        {
            **each(
                (f"{s} {n}" for s in stages for n in gates.SPECIALS if f"{s} {n}" not in never),
                "The stage treats '{}' as another number, or flushes it.",
            ),
            **each(
                (f"masked weight {n}" for n in ("+inf", "-inf", "NaN")),
                "A {} that takes no part reaches the output.",
            ),
        },
    )
