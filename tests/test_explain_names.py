"""``megamoe explain`` names planted faults: each mutant whose stages show it, and what it cannot name.

The problems are small, and each shows what the others cannot: NaN and infinity, tiny values, a
clamp that is no bfloat16, slots that cancel, a masked slot, many rows of one expert.
"""

from __future__ import annotations

from functools import cache

import pytest

from megamoe.backends.simulate import problem
from megamoe.explain import FromProblem, explain
from megamoe.spec.contract import BASE
from megamoe.suite.at_hand import run
from tests.helpers.local import Local
from tests.helpers.mutants import EPLB, FORWARD, LAYOUT, MUTANTS, STAGING, build

SCALES = {"w13_scale": [120, 2], "w2_scale": [120, 2]}
TINY = 0x2C00
"""The bfloat16 2**-39."""


def _patch(*places):
    """(channel, count, bits) of token 1."""
    patches = [{"token": 1, "channel": c, "count": n, "bits": b} for c, n, b in places]
    return {"patch": patches}


PROBLEMS = {
    "plain": {},
    "clamp 1.3": {"clamp": 1.3},
    "clamp 0": {"clamp": 0.0},
    "tiny": {"weights_recipe": {"w13_scale": [108, 2], "w2_scale": [120, 2]}},
    "masked": {"experts": 3, "routing_recipe": {"mask": [[1, 1]]}},
    # The same expert four times, by weights that nearly cancel: every order of adding shows.
    "cancelled": {
        "top_k": 4, "intermediate": 128, "weights_recipe": {**SCALES, "same": True},
        "routing_recipe": {"weights": [[1.0, 1e-6, -1.0, 3e-7]]},
    },
    "many": {"tokens": 130, "top_k": 1, "routing_recipe": {"kind": "same"}, "intermediate": 128},
    "specials": {
        "intermediate": 128,
        # NaN; infinity; a group below every floor; 448; beyond fp16; small ones beside 448.
        "hidden_recipe": _patch(
            (0, 1, 0x7FC0), (32, 1, 0x7F80), (64, 32, TINY), (96, 1, 0x43E0), (128, 1, 0x4780),
            (160, 1, 0x43E0), (161, 31, 0x3B90),
        ),
    },
    "small codes": {
        "intermediate": 128,
        "hidden_recipe": _patch(*((g, 1, 0x43E0) for g in range(0, 256, 32)),
                                *((g + 1, 31, 0x3C10) for g in range(0, 256, 32))),
    },
}  # fmt: skip

NAMED = {
    "gate-up-not-rounded-to-bf16": ("plain", "gate and up are not rounded to bfloat16"),
    "gate-up-truncated-to-bf16": ("plain", "gate and up are truncated to bfloat16"),
    "gate-up-swapped": ("plain", "gate and up are swapped"),
    "gate-up-read-interleaved": ("plain", "gate and up are read interleaved"),
    "gate-not-clamped": ("plain", "the gate is not clamped"),
    "gate-clamped-below-too": ("plain", "the gate is clamped from below too"),
    "up-not-clamped-below": ("plain", "up is not clamped from below"),
    "up-not-clamped-above": ("plain", "up is not clamped from above"),
    "clamp-bound-not-bf16": ("clamp 1.3", "the clamp's bound is not rounded to bfloat16"),
    "clamp-zero-taken-for-none": ("clamp 0", "the clamp is missing"),
    "clamp-lets-nan-through": ("specials", "NaN passes the clamp of the gate"),
    "silu-is-relu": ("plain", "relu stands for silu"),
    "silu-of-1-7-times-gate": ("plain", "silu has the factor 1.702 of the fast gelu"),
    "silu-in-bf16": ("plain", "silu is rounded to bfloat16"),
    "routing-weight-dropped": ("plain", "the routing weight is dropped"),
    "routing-weight-of-slot-0": ("plain", "the routing weight is that of slot 0"),
    "routing-weight-after-requantise": (
        "plain", "slot rows are multiplied by the routing weight, after requantisation",
    ),
    "routing-weight-in-bf16": ("plain", "the routing weight is rounded to bfloat16"),
    "requant-floor-1e-4": ("tiny", "amax has a floor of 0.0001"),
    "requant-exponent-floor-105": ("tiny", "the exponent has a floor of 105"),
    "requant-exponent-one-up": ("plain", "the exponent is one too large"),
    "requant-exponent-rounded-down": ("plain", "the exponent is rounded down"),
    "requant-stored-scale-is-not-the-used-one": (
        "plain", "the scale is amax / 448 itself, not a power of two",
    ),
    "requant-after-bf16": ("plain", "activations are rounded to bfloat16 before requantisation"),
    "requant-amax-without-abs": ("plain", "amax is taken without magnitudes"),
    "requant-amax-over-64": ("plain", "amax is that of 64 values"),
    "requant-toward-zero": ("plain", "values are shrunk by 2^-5 before the cast"),
    "combine-reversed": ("cancelled", "slots are added in descending order"),
    "combine-in-bf16": ("plain", "slots are added in bfloat16"),
    "combine-in-float64": ("cancelled", "slots are added in float64"),
    "combine-in-pairs": ("cancelled", "slots are added in pairs"),
    "combine-loses-last-slot": ("plain", "slot 2 (expert 2) is lost"),
    "slot-rows-not-rounded-to-bf16": ("plain", "slot rows are not rounded to bfloat16"),
    "expert-0-lost": ("cancelled", "a slot is left out: codes and scale bytes are zero"),
    "last-expert-lost": ("plain", "a slot is left out: codes and scale bytes are zero"),
    "masked-slot-goes-to-expert-0": ("masked", "slots without an expert go to expert 0"),
    "w2-of-the-neighbour": ("plain", "weights are those of the expert before"),
    "w2-scale-of-the-neighbour": ("plain", "weight scales are those of the expert before"),
    "weight-scales-one-group-late": ("plain", "weight scales are read one group late"),
    "weight-scales-one-row-late": ("plain", "weight scales are read one row late"),
    "ue8m0-bias-128": (
        "plain", "all scales, of activations and of weights, are an octave too small",
    ),
    "nibbles-swapped": ("plain", "nibbles are swapped in each byte"),
    "e2m1-half-read-as-zero": ("plain", "E2M1 subnormals are flushed: 0.5 is 0"),
    "e4m3-subnormals-flushed": ("small codes", "E4M3 subnormals are read as zero"),
    "last-block-of-k-lost": ("plain", "only the first block of K is there"),
    "accumulator-in-bf16": ("plain", "sums are kept in bfloat16"),
    "accumulator-keeps-13-bits": ("plain", "sums keep 13 bits"),
    "one-row-of-a-tile-lost": ("many", "slot 0 (expert 0) is lost"),
    "rows-beyond-128-read-row-0": ("many", "a slot reads codes of the row of token 0, its own scales"),
    "staging-floor-1e-10": ("specials", "amax has a floor of 1e-10"),
    "staging-exponent-rounded-down": ("plain", "the exponent is rounded down"),
    "staging-exponent-always-up": ("specials", "an exact power of two is rounded up too"),
    "staging-exponent-not-clamped": ("specials", "the exponent is not clamped"),
    "staging-scale-by-240": ("plain", "the scale is amax / 240"),
    "staging-amax-without-abs": ("plain", "amax is taken without magnitudes"),
    "staging-nan-counts-in-amax": ("specials", "NaN counts in amax"),
    "staging-scales-big-endian": (
        "plain", "the four bytes of a scale word are in reverse order",
    ),
    "staging-cast-does-not-saturate": ("specials", "infinity becomes NaN, not 448"),
    "staging-cast-toward-zero": ("plain", "codes are rounded toward zero"),
    "staging-through-half": ("specials", "hidden states go through fp16"),
}  # fmt: skip
"""The problem that shows a mutant, and the name that ``explain`` must give."""

UNNAMED = {
    "one-weight-group-off-by-a-ue8m0-step": "one scale byte of one row: no rule chose it",
    "one-percent-in-64-channels-of-one-row": "a factor on some channels: no rule chose them",
    "combine-adds-masked-slots": "what it adds is in no stage",
    "staging-weights-in-bf16": "what is staged of the weights is no stage of a forward",
    "staging-ids-masked": "what is staged of the ids is no stage of a forward",
    "staging-writes-padding-rows": "padding rows are no stage of a forward",
    "staging-last-token-lost": "what stands in memory that nobody wrote",
    **{m.name: "the remap is no stage of a forward" for m in EPLB},
    **{m.name: "the layout of weights is no stage of a forward" for m in LAYOUT},
}
"""Mutants without a name, and why."""
AT = {"one-row-of-a-tile-lost": 8, "rows-beyond-128-read-row-0": 129}
"""The token that shows it, where that is not token 1."""


@cache
def made(name):
    base = {
        "tokens": 2, "top_k": 3, "intermediate": 256, "clamp": 2.0, "weights_recipe": SCALES,
    }  # fmt: skip
    return problem(3, **{**base, **PROBLEMS[name]})


def explained(name, got, token=1, accumulator="fp32-ordered"):
    actual = {k: v[token] for k, v in got.items()}
    return explain(FromProblem(made(name)), token, 0, accumulator, actual, contract=BASE)["actual"]


def names(said, kind="exact"):
    return [way["what"] for step in said["explanations"] for way in step[kind]]


def test_every_mutant_has_a_name_or_a_reason():
    assert set(NAMED) | set(UNNAMED) == {m.name for m in MUTANTS}
    assert not set(NAMED) & set(UNNAMED)


@pytest.mark.parametrize("name", NAMED)
def test_a_mutant_is_named_and_nothing_is_left(name, tmp_path):
    mutant = next(m for m in (*FORWARD, *STAGING) if m.name == name)
    shown, wanted = NAMED[name]
    said = explained(shown, run(made(shown), Local(build(mutant, tmp_path))), AT.get(name, 1))
    assert wanted in names(said)
    assert not names(said, "partial")
