"""``megamoe explain`` names the small planted faults, each on the one case that shows it.

``helpers/named.py`` plants them and asks. Some data show several deviations alike; then the right
name must be among those that are offered. A few faults meet the whole catalogue here. The others
meet the deviation of their name alone, which is cheap; ``python -m tests.helpers.named`` lets all
of them meet all of it, and docs/explain.md has the result.
"""

from __future__ import annotations

import numpy as np
import pytest

from megamoe.explain import deviations, match
from tests.helpers.mutants_places import EPLB, LAYOUT, REFUSALS, SIZES
from tests.helpers.named import SMALL, cases, explanation_of

_UP_NAN = "NaN of up becomes "
_TIES = "ties of codes are rounded "
_SUBNORMAL_TIES = "ties of subnormal codes are rounded "
_AWAY, _TOWARD = "ties are rounded away from zero", "ties are rounded toward zero"
_TF32, _FLUSHED = "values go through TF32 before bfloat16", "subnormal values are flushed to zero"
_PRODUCT = "the product of "
_BY_EXPERT = "routing weights are read at the slot's place in the order by expert"
_ZERO_SLOT = "a slot is left out: codes and scale bytes are zero"
_TO_EXPERT_0 = "slots without an expert go to expert 0"

CAUSES = {
    "slots-of-weight-0-left-out": _ZERO_SLOT,
    "staged-tie-away-from-zero": _TIES + "away from zero",
    "staged-tie-toward-zero": _TIES + "toward zero",
    "staged-tie-up": _TIES + "up",
    "staged-tie-down": _TIES + "down",
    "staged-tie-to-odd": _TIES + "to odd",
    "staged-tie-away-in-subnormal-codes": _SUBNORMAL_TIES + "away from zero",
    "staged-tie-away-in-forward": _TIES + "away from zero",
    "requantised-tie-away-from-zero": _TIES + "away from zero",
    "requantised-tie-toward-zero": _TIES + "toward zero",
    "requantised-tie-up": _TIES + "up",
    "requantised-tie-down": _TIES + "down",
    "requantised-tie-to-odd": _TIES + "to odd",
    "requantised-tie-away-in-subnormal-codes": _SUBNORMAL_TIES + "away from zero",
    "requantised-tie-toward-zero-in-subnormal-codes": _SUBNORMAL_TIES + "toward zero",
    "requantised-tie-away-in-negative-codes": ("ties of negative codes are rounded away from zero"),
    "gate-up-tie-away-from-zero": f"gate and up: {_AWAY}",
    "gate-up-tie-toward-zero": f"gate and up: {_TOWARD}",
    "slot-row-tie-away-from-zero": f"slot rows: {_AWAY}",
    "slot-row-tie-toward-zero": f"slot rows: {_TOWARD}",
    "y-tie-away-from-zero": f"y: {_AWAY}",
    "y-tie-toward-zero": f"y: {_TOWARD}",
    "requantised-through-tf32": "scaled values go through TF32 before the cast",
    "requant-amax-of-bf16": "amax is rounded to bfloat16",
    "requantised-through-half": "scaled values go through fp16 before the cast",
    "gate-up-through-tf32": f"gate and up: {_TF32}",
    "slot-row-through-tf32": f"slot rows: {_TF32}",
    "y-through-tf32": f"y: {_TF32}",
    "product-and-weight-rounded-once": "the products with up and with the weight are rounded once",
    "up-times-weight-first": "up is multiplied by the weight first",
    "gate-rounded-and-up-not": "up is not rounded to bfloat16",
    "up-rounded-and-gate-not": "the gate is not rounded to bfloat16",
    "slot-row-truncated-to-bf16": "slot rows are truncated to bfloat16",
    "y-truncated-to-bf16": "y is truncated to bfloat16",
    "requantised-code-truncated": "values lose 3 of 23 bits toward zero before the cast",
    "staged-code-truncated-in-forward": "codes are rounded toward zero",
    "routing-weight-truncated-to-bf16": "routing weights are truncated to bfloat16",
    "routing-weight-through-half": "the routing weight is rounded to fp16",
    "staged-subnormal-codes-flushed": "E4M3 subnormals are flushed to a zero with their sign",
    "staged-subnormal-codes-flushed-in-forward": (
        "E4M3 subnormals are flushed to a zero with their sign"
    ),
    "requantised-subnormal-codes-flushed": "E4M3 subnormals are flushed to zero",
    "block-sum-flushed": "subnormal sums of 32 are flushed to zero",
    "up-flushed": "subnormal up is flushed to zero",
    "product-flushed": "the subnormal product of silu and up is flushed to zero",
    "routing-weight-flushed": "subnormal routing weights are flushed to zero",
    "activation-flushed": "subnormal activations are flushed to zero",
    "scale-of-requantisation-flushed": "a subnormal scale is flushed before its exponent is taken",
    "slot-row-flushed": f"slot rows: {_FLUSHED}",
    "y-flushed": f"y: {_FLUSHED}",
    "scale-2e-127-read-as-zero": "a scale byte of 0 is read as zero",
    "nan-counts-in-requant-amax": "NaN counts in amax",
    "nan-makes-the-requant-group-zero": "NaN makes its group zero",
    "nan-requantised-as-448": "NaN becomes 448",
    "nan-requantised-as-zero": "NaN becomes zero",
    "nan-code-read-as-480": "the NaN code is read as 480",
    "infinity-in-requantisation-is-nan": "infinity becomes NaN, not 448",
    "infinity-left-out-of-requant-amax": "infinity is left out of amax",
    "nan-up-becomes-the-upper-bound": _UP_NAN + "the upper bound",
    "nan-up-becomes-zero": _UP_NAN + "zero",
    "nan-gate-becomes-minus-the-bound": "NaN of the gate becomes minus the bound",
    "nan-up-passes-the-clamp": "NaN passes the clamp of up",
    "nan-weight-read-as-zero": "NaN among routing weights is read as zero",
    "infinite-weight-held-to-the-largest": (
        "infinite routing weights are held to the largest number"
    ),
    "nan-row-left-out-of-combine": "NaN of a slot row is left out",
    "infinite-row-held-to-the-largest": "infinity is held to the largest bfloat16 in slot rows",
    "y-held-to-the-largest": "infinity is held to the largest bfloat16 in y",
    "scale-254-read-as-nan": "a scale byte of 254 is read as NaN",
    "sum-starts-from-minus-zero": "y of a token without a slot is -0",
    "masked-weight-times-row": "a slot without an expert adds its routing weight times 0",
    "negative-zero-staged-as-zero": "-0 becomes +0",
    "small-negative-staged-as-plus-zero": "a negative value that rounds to zero loses its sign",
    "signed-scale-bytes": "all scale bytes are signed: from 128 on the scale vanishes",
    "scale-of-hidden-applied-after-the-sum-of-a-word": (
        "the four activation scales of a word are its first"
    ),
    "requant-exponent-to-nearest": "the exponent is rounded up from a mantissa of 1.5 on",
    "requant-byte-capped-at-254": "the exponent is at most 254",
    "requant-byte-at-least-one": "the exponent has a floor of 1",
    "requant-byte-0-kept-at-september": "the exponent has no floor",
    "requant-floor-104-at-september": "the exponent's floor is one too small",
    "requant-floor-106-at-september": "the exponent's floor is one too large",
    "requant-bits-without-the-carry": "the exponent is that of amax / 256, rounded down",
    "requant-bits-carry-one-too-much": "an exact power of two is rounded up too",
    "requant-bits-carry-one-too-little": "one unit above a power of two is rounded down",
    "requant-infinity-255-at-september": "an infinite amax gives the exponent 255",
    "staging-amax-in-fp16": "amax is rounded to fp16",
    "staging-exponent-to-nearest": "the exponent is rounded up from a mantissa of 1.5 on",
    "staging-exponent-at-most-253": "the exponent's upper bound is one too small",
    "staging-exponent-255-for-infinity": "the exponent is not clamped",
    "staging-floor-taken-for-a-floor-of-the-scale": (
        "the scale has the floor that amax should have"
    ),
    "staging-floor-missing-in-forward": "amax has a floor of 1e-30",
    "exp-of-the-gate-in-fp32": (
        "exp takes the gate before it is rounded to bfloat16, the numerator after it"
    ),
    "log2e-in-bf16": "log2(e) is rounded to bfloat16 in exp",
    "log2e-in-fp16": "log2(e) is rounded to fp16 in exp",
    "exp-in-fp16": "exp takes and gives fp16",
    "sum-of-128-in-bf16": "the sum of each 128 of K is rounded to bfloat16",
    "sum-of-32-in-fp16": "the sum of each 32 of K is rounded to fp16",
    "sum-kept-in-bf16-after-128": "sums are kept in bfloat16 after each 128 of K",
    "fast-silu-always": "the precise silu is g*(1/d), not g/d",
    "precise-silu-by-a-reciprocal": "the precise silu is g*(1/d), not g/d",
    "precise-silu-by-a-quotient-in-sgl": "the precise silu is g/d, not g*(1/d)",
    "product-clamped-alone": _PRODUCT + "silu and up is clamped, not gate and up",
    "product-clamped-too": _PRODUCT + "silu and up is clamped, and gate and up too",
    "weighted-product-clamped-alone": (
        _PRODUCT + "silu, up and routing weight is clamped, not gate and up"
    ),
    "weighted-product-clamped-above-alone": (
        _PRODUCT + "silu, up and routing weight is clamped from above only, not gate and up"
    ),
    "sgl-floor-1e-4": "amax has a floor of 0.0001",
    "sgl-nan-not-clipped": "NaN is not clipped to 448",
    "sgl-infinity-254": "the exponent's upper bound is one too small",
    "sgl-factor-of-infinity-is-plus-infinity": (
        "codes beside the scale byte 255 have the other sign"
    ),
    "combine-in-groups-of-four": "slots are added in groups of 4",
    "combine-in-groups-of-eight": "slots are added in groups of 8",
    "combine-as-a-tree-of-sixteen": "slots are added as a tree",
    "combine-reversed-beyond-eight-slots": "slots from the ninth on are added in descending order",
    "combine-takes-every-eighth-slot": "every eighth slot is added first",
    "combine-starts-with-the-last-slot": "the last slot is added first",
    "combine-compensates-its-rounding": "the rounding of each addition is compensated",
    "combine-keeps-eleven-bits": "the sum of slots keeps 11 bits",
    "combine-forgets-slots-beyond-a-multiple-of-four": "slots beyond a multiple of 4 are lost",
    "combine-forgets-slots-beyond-a-multiple-of-eight": "slots beyond a multiple of 8 are lost",
    "combine-takes-one-slot-twice-where-top-k-is-odd": "slot 6 (expert 1) is added twice",
    "combine-counts-slots-and-not-places": "only the first slots are added, as many as are live",
    "mask-of-the-neighbour-slot": "slot 2 (expert 1) is lost",
    "mask-of-the-neighbour-token": "slot 0 (expert 1) is lost",
    "last-row-of-an-odd-expert-lost": _ZERO_SLOT,
    "row-15-of-an-expert-reads-row-14": (
        "a slot reads codes of the row of the token before, its own scales"
    ),
    "row-16-of-an-expert-reads-row-0": ("a slot reads codes of the row of token 0, its own scales"),
    "row-127-of-an-expert-lost": "slot 0 (expert 1) is lost",
    "row-128-of-an-expert-lost": "slot 0 (expert 1) is lost",
    "scales-of-the-row-before-from-row-64-on": (
        "a slot reads scales of the row of the token before, its own codes"
    ),
    "token-index-of-7-bits": (
        "a slot reads codes of the row of the same place in the first 128 tokens, its own scales"
    ),
    "token-index-of-8-bits-for-scales": (
        "a slot reads scales of the row of the same place in the first 256 tokens, its own codes"
    ),
    "slot-index-of-3-bits-for-weights": "the routing weight is that of slot 0 (in slot 8 only)",
    "weight-of-the-next-token-at-slot-0": (
        "the routing weight is that of the token after (in slot 0 only)"
    ),
    "weights-read-with-stride-of-8": "routing weights are read with a stride of 8",
    "weights-read-transposed": "routing weights are transposed",
    "weight-at-the-place-after-the-sort": _BY_EXPERT,
    "weight-at-the-place-in-tiles-of-64": (
        _BY_EXPERT + ", where each expert begins at a multiple of 64 or 128; "
        "past the last slot they are that of the last"
    ),
    "weight-in-order-by-expert-read-by-slot": (
        "routing weights are in the order by expert and are read by slot"
    ),
    "expert-index-of-5-bits": "weights are those of expert e modulo 32",
    "expert-index-of-6-bits-for-w2": "weights are those of expert e modulo 64",
    "expert-index-of-8-bits-for-scales": "weight scales are those of expert e modulo 256",
    "expert-index-modulo-experts-less-one": "weights are those of expert 0",
    "expert-of-the-neighbour-from-33-on": "weights are those of the expert before",
    "group-index-of-2-bits-for-hidden-scales": "activation scales are those of group g modulo 4",
    "group-index-of-4-bits-for-weight-scales": "weight scales are those of group g modulo 16",
    "last-group-takes-the-scale-before": "the last weight scale of each row is the one before",
    "last-row-of-weights-takes-the-scale-before": (
        "the last row of weights takes the scales of the row before"
    ),
    "scales-of-up-of-stage-0-are-two-blocks-old": (
        "scales of up of block j of 128 of K are those of block j - 2, where j modulo 2 is 0"
    ),
    "hidden-scales-of-the-block-before": (
        "activation scales of block j of 128 of K are those of block j - 1"
    ),
    "last-row-of-16-takes-the-scales-of-the-row-before": (
        "slot 0 (expert 2) reads scales of the row before within its expert, its own codes"
    ),
    "scales-of-w2-start-again-at-row-256": "weight scales are those of row n modulo 256",
    "gate-and-up-scales-swapped": "scales of gate and of up are swapped",
    "scales-of-up-read-from-the-gate": "up rows have the scales of gate rows",
    "requant-byte-by-a-logarithm": "the exponent is the logarithm in fp32, rounded up",
    "requant-byte-of-zeros-127": "a group of zeros has the scale byte 127",
    "third-block-of-128-read-twice": "codes of the third 128 of K are those of the second",
    "last-channel-of-k-lost": "the last channel of K is lost",
    "amax-over-the-token": "one scale holds for the whole row",
    "amax-with-stride-of-groups": "a group's amax is that of values a number of groups apart",
    "amax-misses-the-last-member": "amax misses the last of a group",
    "amax-misses-the-first-member": "amax misses the first of a group",
    "amax-over-16": "amax is that of the first 16 of a group",
    "staging-amax-misses-the-last-member": "amax misses the last of a group",
    "staging-amax-over-16": "amax is that of the last 16 of a group",
    "staging-amax-over-64": "amax is that of 64 values",
    "staging-amax-over-128": "amax is that of 128 values",
    "staging-amax-over-tokens": "a group's amax is that of all tokens",
    "staging-amax-with-stride-of-groups": (
        "a group's amax is that of values a number of groups apart"
    ),
    "staging-halves-of-a-word-swapped": "the two halves of a scale word are swapped",
    "staging-words-of-the-row-before": (
        "scale bytes are those of the token before; the first stands after the last"
    ),
    "masked-slot-computed-with-weight-0": _TO_EXPERT_0,
    "masked-slot-computed-and-multiplied-by-0": _TO_EXPERT_0,
    "token-with-a-masked-slot-is-zero": "y is zero",
    "first-slot-masked-loses-the-token": "y is zero",
    "last-slot-masked-loses-the-token": "y is zero",
    "masked-slots-shift-the-weights": "routing weights skip slots without an expert",
    "alpha-dropped": "alpha is left out",
    "alpha-on-the-gate-too": "the gate is multiplied by alpha too",
    "alpha-rounded-to-bf16": "alpha is rounded to bfloat16",
    "alpha-times-gate-rounded-to-bf16": "alpha times the gate is rounded to bfloat16",
    "alpha-of-gpt-oss-always": "alpha is 1.702",
    "alpha-divides": "the gate is divided by alpha in silu",
    "alpha-and-beta-swapped": "beta stands for alpha",
    "alpha-of-negative-gates-alone": "alpha holds for negative gates only",
    "beta-dropped": "beta is left out",
    "beta-of-gpt-oss-always": "beta is 1",
    "beta-subtracted": "beta is subtracted",
    "beta-before-the-clamp": "beta is added before the clamp and after it",
    "beta-on-the-gate": "beta is added to silu, not to up",
    "up-with-beta-rounded-to-bf16": "up with beta is rounded to bfloat16",
    "step-up-not-clamped": "up is not clamped",
    "step-gate-clamped-too": "the gate is clamped before silu too",
    "step-not-clamped-after-silu": "silu is not clamped",
    "step-bound-rounded-to-bf16": "the clamp's bound after silu is rounded to bfloat16",
    "step-up-bound-in-fp32": "the clamp's bound is not rounded to bfloat16",
    "step-nan-passes": "NaN passes the clamp after silu",
    "step-product-clamped": "the product of silu and up is clamped, not silu",
    "step-up-bounded-above-alone": "up is not clamped from below",
    "situ-scales-swapped": "alpha and beta are swapped",
    "situ-alpha-not-multiplied-back": "the tanh of the gate is not multiplied by alpha",
    "situ-beta-not-multiplied-back": "the tanh of up is not multiplied by beta",
    "situ-sigmoid-of-the-scaled-gate": "the sigmoid is that of the gate by alpha",
    "situ-sigmoid-lost": "the sigmoid is left out",
    "situ-up-without-tanh": "up goes without tanh",
    "situ-tanh-of-half": "the tanh is that of half its argument",
    "situ-up-read-as-gate": "up is the gate",
    "situ-in-place-of-silu-of-4-and-25": "alpha is 4 and beta is 25",
    "situ-quotient-of-t-not-doubled": "the quotient has t for 2t",
    "situ-quotient-above-not-squared": "the quotient has 1 + t, not its square",
    "situ-quotient-below-minus": "the quotient has 1 - t*t below",
    "situ-quotient-for-other-scales-too": "alpha is 4",
    "situ-quotient-up-not-scaled": "the argument of up's tanh is not divided by beta",
    "situ-tanhf-alpha-not-multiplied-back": "the tanh of the gate is not multiplied by alpha",
    "shared-row-twice": "slot 2 (the shared expert) is added twice",
    "shared-row-lost-where-all-is-masked": "slot 2 (the shared expert) is lost",
    "shared-row-lost-where-a-slot-is-masked": "slot 2 (the shared expert) is lost",
    "shared-row-last-in-2026-11": "all is as contract 2026-09 says",
    "shared-row-first-in-2026-09": "all is as contract 2026-11 says",
    "shared-row-third": "the shared expert's row is added third",
    "shared-row-added-to-y-after-its-rounding": (
        "the shared expert's row is added to y after its rounding"
    ),
    "output-added-before-y-is-rounded": "the output is added before y is rounded",
    "output-added-where-a-slot-is-live": "the output is left out",
    "output-subtracted": "the output is subtracted",
    "output-replaces-y": "the output stands for y",
    "output-sum-truncated": "the sum with the output is truncated",
    "output-sum-tie-away-from-zero": "the sum with the output has ties away from zero",
    "fp8-rows-left-in-bf16": "slot rows are left in bfloat16",
    "fp8-group-of-32": "FP8 rows have a scale for each 32",
    "fp8-group-of-64": "FP8 rows have a scale for each 64",
    "fp8-scale-rounded-down": "FP8 rows have the exponent rounded down",
    "fp8-scale-one-up": "FP8 rows have an exponent one too large",
    "fp8-scale-floored-at-1e-4": "FP8 rows have an amax of at least 1e-4",
    "fp8-scale-not-a-power-of-two": "FP8 rows have codes by 448 / amax, which is no power of two",
    "fp8-codes-truncated": "FP8 rows have truncated codes",
    "fp8-tie-away-from-zero": "FP8 rows have codes with ties away from zero",
    "fp8-subnormal-codes-flushed": "FP8 rows lose subnormal codes",
    "fp8-shared-row-left-in-bf16": "the shared expert's row is left in bfloat16",
    "fp8-weighted-once-more": (
        "the routing weight is applied again at combine to the slot rows, by fp32 products"
    ),
    "fp8-row-doubled-by-bias-126": "FP8 rows are read an octave too large",
    "fp8-scale-0-of-a-zero-row-is-nan": "a zero FP8 row has the scale byte 255",
}

_NO_STAGE = "it shows in no stage of a forward"
_SHARED = "the activations of the shared expert are no stage, and explain takes them as right"
_CHANNELS = "it needs channels of y beside the 128 of the tile"
_NUMBER = "its number is no number of the contract or of a format"
REASONS = {
    **{m.name: "one channel of one token is another number" for m in SIZES},
    **{m.name: _NO_STAGE for m in (*EPLB, *LAYOUT, *REFUSALS)},
    "last-column-of-y-not-written": "one channel of y is another number",
    "column-127-of-y-of-column-126": "one channel of y is another number",
    "amax-over-rows-of-a-pair": "it needs the activations of another token",
    "scale-255-read-as-2e128": "no scale byte has the value 2^128",
    "scale-bytes-below-64-read-as-64": _NUMBER,
    "scale-product-in-fp32": "a product of two scales beyond fp32 is no scale byte",
    "step-bounded-below-too": _NUMBER,
    "precise-silu-two-ulps-high": "an error of the quotient that no rule chose",
    "precise-silu-two-ulps-low": "an error of the quotient that no rule chose",
    "fp8-masked-row-takes-part": "what it adds is in no stage",
    "fp8-group-of-the-row": _CHANNELS,
    "fp8-scale-of-the-next-group": _CHANNELS,
    "shared-row-weighted-by-slot-0": _SHARED,
    "shared-gate-and-up-swapped": _SHARED,
    "shared-expert-of-the-routed-width": _SHARED,
    "shared-expert-of-128-channels": _SHARED,
    "shared-activations-not-requantised": _SHARED,
    "shared-row-truncated-to-bf16": "one row of all is truncated; explain changes all",
    "shared-weights-lose-their-sign": _SHARED,
    "shared-scales-of-group-0": _SHARED,
    "shared-last-group-lost": _SHARED,
    "shared-rows-of-the-token-before": _SHARED,
    **{
        m.name: _NO_STAGE
        for m in SMALL
        if m.name.startswith(("staging-ids-", "staging-weights-", "staging-of-last-slot-"))
    },
    **{
        m.name: "explain does not follow NVFP4"
        for m in SMALL
        if cases()[m.cases].params.get("weight_format") == "nvfp4"
    },
    **{m.name: "padding is no input of a forward" for m in SMALL if "padding" in m.name},
}
"""Faults without a name, and why."""
LOOKS_LIKE = {
    "scale-product-in-fp32": "the four activation scales of a word are its first",
    "fp8-scale-of-the-next-group": "FP8 rows have the exponent rounded down",
}
"""Faults without a name that the data of their case does not tell from another one."""
QUICK = (
    "staged-tie-down",
    "requantised-tie-to-odd",
    "nan-requantised-as-448",
    "infinity-left-out-of-requant-amax",
    "requant-floor-104-at-september",
    "row-127-of-an-expert-lost",
    "output-added-where-a-slot-is-live",
    "fp8-group-of-32",
    "shared-row-third",
    "step-product-clamped",
    "product-clamped-alone",
    "weight-at-the-place-in-tiles-of-64",
    "exp-of-the-gate-in-fp32",
    "precise-silu-by-a-reciprocal",
    "precise-silu-by-a-quotient-in-sgl",
    "sum-of-128-in-bf16",
    "scales-of-up-of-stage-0-are-two-blocks-old",
    "last-row-of-16-takes-the-scales-of-the-row-before",
)
"""Cheap ones, of each stage and feature."""


def test_every_small_fault_has_a_name_or_a_reason():
    assert set(CAUSES) | set(REASONS) == {m.name for m in SMALL}
    assert not set(CAUSES) & set(REASONS)
    assert set(LOOKS_LIKE) < set(REASONS) and set(QUICK) < set(CAUSES)


BY_NAME = {m.name: m for m in SMALL}


@pytest.mark.parametrize("name", QUICK)
def test_a_fault_of_each_stage_is_named(name, tmp_path):
    result = explanation_of(BY_NAME[name], tmp_path)
    assert CAUSES[name] in result.exact and not result.partial


def _mask(*rows):
    return np.arange(20) < np.array(rows)[:, None]


def test_a_match_in_some_slots_needs_evidence():
    """Two slots with 20 values each; a deviation that is right in the second slot alone."""
    for wrong, is_exact in ((7, False), (8, True)):
        one = match.fit("a name", "silu", _mask(0, wrong), _mask(20, 0), [4, 6])
        assert one.where == "in slot 6 only" and one.explains == wrong
        assert one.is_exact == is_exact
    assert match.fit("a name", "silu", _mask(0, 1), _mask(0, 0), [4, 6]).is_exact


def test_a_match_of_all_slots_is_offered_alone():
    everywhere = match.fit("rightly", "silu", _mask(0, 9), _mask(0, 0), [4, 6])
    somewhere = match.fit("wrongly", "silu", _mask(0, 9), _mask(20, 0), [4, 6])
    for fits, names in (([somewhere, everywhere], ["rightly"]), ([somewhere], ["wrongly"])):
        report = match.report(fits, match.Evidence("codes", 9, 9, ""), 40, "codes", 2)
        assert [way["what"] for way in report["exact"]] == names


def _with_one_deviation(monkeypatch, name):
    """The catalogue without the deviations of other names."""
    for part in ("of_codes", "of_y", "of_all", "of_staging"):
        whole = getattr(deviations, part)
        monkeypatch.setattr(
            deviations, part, lambda *of, whole=whole: (w for w in whole(*of) if w.name == name)
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CAUSES if n not in QUICK])
def test_a_small_fault_has_its_name(name, tmp_path, monkeypatch):
    _with_one_deviation(monkeypatch, CAUSES[name].partition(" (in slot")[0])
    result = explanation_of(BY_NAME[name], tmp_path)
    assert set(result.exact) == {CAUSES[name]}  # twice where both linears show it


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wrong-at-a-capacity-of-128", "step-bounded-below-too",
                                  "amax-over-rows-of-a-pair", "shared-gate-and-up-swapped",
                                  "fp8-group-of-the-row", *LOOKS_LIKE])  # fmt: skip
def test_a_fault_without_a_name_gets_no_other_one(name, tmp_path):
    """A match in part says that it is one; it is no name."""
    result = explanation_of(BY_NAME[name], tmp_path)
    assert result.exact == ((LOOKS_LIKE[name],) if name in LOOKS_LIKE else ())
