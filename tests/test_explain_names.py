"""``megamoe explain`` names planted faults: each mutant that the stages show; or there is a reason.

The problems are small, and each shows what the others cannot: NaN and infinity, tiny values, a
clamp that is no bfloat16, slots that cancel, a masked slot, many rows of one expert.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from megamoe.backends.eager import EagerBackend
from megamoe.backends.simulate import (
    blackwell_mxf8f6f4,
    forward,
    hopper_bf16,
    hopper_e4m3,
    problem,
)
from megamoe.explain import FromProblem, explain, predict
from megamoe.explain.deviations import of_codes
from megamoe.explain.life import linear1, live
from megamoe.explain.match import Evidence, Fit, in_part, report
from megamoe.explain.predict import Predictor
from megamoe.explain.ways import right
from megamoe.explain.words import causes, explanation
from megamoe.layer.kernel_weights import interleave_gate_up, transform_sf
from megamoe.spec.contract import BASE, NEWEST
from megamoe.suite.at_hand import run
from tests.helpers.local import Local
from tests.helpers.mutants import EPLB, FORWARD, LAYOUT, MUTANTS, STAGING, Mutant, build
from tools.false_names import CORRUPTIONS, corrupted

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
    "nan": {"intermediate": 128, "hidden_recipe": _patch((0, 1, 0x7FC0))},
    "small codes": {
        "intermediate": 128,
        "hidden_recipe": _patch(*((g, 1, 0x43E0) for g in range(0, 256, 32)),
                                *((g + 1, 31, 0x3C10) for g in range(0, 256, 32))),
    },
}  # fmt: skip

CAUSES = {
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
    "clamp-lets-nan-through": ("nan", "NaN passes the clamp of the gate"),
    "silu-is-relu": ("plain", "relu stands for silu"),
    "silu-of-1-7-times-gate": ("plain", "silu has the factor 1.702 of the fast gelu"),
    "silu-in-bf16": ("plain", "silu is rounded to bfloat16"),
    "routing-weight-dropped": ("plain", "the routing weight is dropped"),
    "routing-weight-of-slot-0": ("plain", "the routing weight is that of slot 0"),
    "routing-weight-after-requantise": (
        "plain", "the routing weight is applied after linear 2 to its fp32 sums",
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
    "rows-beyond-128-read-row-0": (
        "many", "a slot reads codes of the row of token 0, its own scales",
    ),
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

REASONS = {
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
def problem_of(name):
    base = {
        "tokens": 2, "top_k": 3, "intermediate": 256, "clamp": 2.0, "weights_recipe": SCALES,
    }  # fmt: skip
    return problem(3, **{**base, **PROBLEMS[name]})


def departure_of(name, stages, token=1, accumulator="fp32-ordered"):
    actual = {k: v[token] for k, v in stages.items()}
    return explain(FromProblem(problem_of(name)), token, 0, accumulator, actual, contract=BASE)[
        "actual"
    ]


def names(departure, kind="exact"):
    return [way["what"] for step in departure["explanations"] for way in step[kind]]


def test_every_mutant_has_a_name_or_a_reason():
    assert set(CAUSES) | set(REASONS) == {m.name for m in MUTANTS}
    assert not set(CAUSES) & set(REASONS)


@pytest.mark.parametrize("name", CAUSES)
def test_a_mutant_is_named_and_nothing_is_left(name, tmp_path):
    mutant = next(m for m in (*FORWARD, *STAGING) if m.name == name)
    problem_name, cause = CAUSES[name]
    departure = departure_of(
        problem_name, run(problem_of(problem_name), Local(build(mutant, tmp_path))), AT.get(name, 1)
    )
    assert cause in names(departure)
    assert not names(departure, "partial")


# --- faults planted in what a correct backend is given ------------------------------------------


def _swizzled(scale, rows, tiles):
    """``(E, N, G)`` bytes from linear order to tiles of ``rows`` by 4 groups, as a flat buffer."""
    experts, count, groups = scale.shape
    cut = scale.view(experts, count // rows, *tiles, groups // 4, 4)
    last = cut.dim() - 1
    inner = [*range(2, last - 1)][::-1]  # of the rows in a tile the slowest one becomes the fastest
    return cut.permute(0, 1, last - 1, *inner, last).reshape(experts, -1)


def _layout(rows, *tiles):
    def read_as_linear(scale):
        return _swizzled(scale, rows, tiles).view(scale.shape)

    return read_as_linear


def _inverse_layout(rows, *tiles):
    """Linear bytes that are read as tiles: the inverse permutation."""

    def read(scale):
        places = torch.arange(scale[0].numel()).view(1, *scale.shape[1:])
        order = _swizzled(places, rows, tiles).argsort(dim=1)[0]
        return scale.flatten(1)[:, order].view(scale.shape)

    return read


def _transformed_rows(scale):
    """What ``transform_sf`` does to the rows, and nobody undoes."""
    packed = transform_sf(scale).contiguous()
    return packed.view(torch.uint8).view(scale.shape)


BOTH = ("w13_weight_scale", "w2_weight_scale")
FAULTS = {
    "weight scales are written 128x4 and read linear": (BOTH, _layout(128, 4, 32)),
    "weight scales are written 8x4 and read linear": (BOTH, _layout(8, 8)),
    "weight scales are written linear and read 128x4": (BOTH, _inverse_layout(128, 4, 32)),
    "weight scales are written linear and read 8x4": (BOTH, _inverse_layout(8, 8)),
    "weight scales are left in the 4 x 32 order of rows": (BOTH, _transformed_rows),
    "gate and up rows are in turn by 8 and are read as halves": (
        ("w13_weight", "w13_weight_scale"), interleave_gate_up,
    ),
    "scales of gate and up rows are in turn by 8, their weights not": (
        BOTH[:1], interleave_gate_up,
    ),
    "weight scales are read 8 rows late": (BOTH, lambda sf: sf.roll(8, 1)),
    "weight scales are read 16 rows late, but for the first 16": (
        BOTH, lambda sf: torch.cat([sf[:, :16], sf[:, :-16]], 1),
    ),
    "weight scales are read 32 rows early": (BOTH, lambda sf: sf.roll(-32, 1)),
    "weight scales are an octave too large": (BOTH, lambda sf: sf + 1),
    "weight scale bytes are signed: from 128 on the scale is negative": (
        ("w13_weight",), lambda w: w ^ 0x88,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_weights_layout_is_named(name):
    """``eager`` is right and is given wrong weights; ``explain`` is given the right ones."""
    fields, change = FAULTS[name]
    original = problem_of("plain")
    if "signed" in name:  # every scale byte is from 128 on, so every weight changes its sign
        original = problem(3, tokens=2, top_k=3, clamp=2.0, weights_recipe={"w13_scale": [129, 2]},
                        hidden_recipe={"log2_scale": -9})  # fmt: skip
    wrong = replace(original, **{f: change(getattr(original, f)).contiguous() for f in fields})
    actual = {k: v[1] for k, v in run(wrong, Local(EagerBackend(BASE))).items()}
    departure = explain(FromProblem(original), 1, 0, "fp32-ordered", actual, contract=BASE)[
        "actual"
    ]
    links = 2 if "w2_weight_scale" in fields else 1
    assert len(departure["explanations"]) == links
    for step in departure["explanations"]:
        exact = [way["what"] for way in step["exact"]]
        assert name in exact and len(exact) <= 3


def _exact_sums(*operands):
    blocks, exact, _, _ = linear1(*operands)
    return blocks, exact, exact, exact


def _acts(output):
    return {k: (output.codes[1, k], output.sf[1, k]) for k in range(3)}


def test_the_freedom_of_an_instruction_is_no_fault(monkeypatch):
    """A tensor core's sums are neither the exact ones nor fp32's; the fault is named still."""
    original = problem_of("plain")
    wrong = replace(original, w13_weight_scale=_layout(128, 4, 32)(original.w13_weight_scale))
    output = forward(wrong, hopper_e4m3(), 1)
    actual = {"l2_acts": output.codes[1], "l2_acts_sf": output.sf[1], "y": output.y[1]}
    departure = explain(FromProblem(original), 1, 0, "sm90-e4m3", actual, contract=BASE)["actual"]
    assert names(departure) == ["weight scales are written 128x4 and read linear"]
    life, source = _life(original, "sm90-e4m3")
    predictor = Predictor(life, source, _acts(output))
    way = next(w for w in of_codes(life, source) if w.name == names(departure)[0])
    assert not predictor.outside_codes(way).any()
    monkeypatch.setattr(predict, "linear1", _exact_sums)
    assert predictor.outside_codes(way).any()  # by exact sums alone it would be no exact match


def test_what_a_correct_kernel_shows_has_no_fault_by_any_class():
    """The contract's way, followed by the same code as a deviation, gives all that was shown."""
    for kernel in (hopper_e4m3(), blackwell_mxf8f6f4(), hopper_bf16()):
        output = forward(problem_of("plain"), kernel, 2)
        life, source = _life(problem_of("plain"), kernel.accumulator)
        predictor = Predictor(life, source, _acts(output))
        assert not predictor.outside_codes(right(life)).any()
        assert not predictor.outside_y(right(life), output.y[1, :128]).any()


def _life(p, accumulator):
    source = FromProblem(p)
    return live(source, 1, range(128), accumulator, BASE), source


# --- matches in part, two faults, none ----------------------------------------------------------


def right_rows(name="plain"):
    return {k: v[1].copy() for k, v in run(problem_of(name), Local(EagerBackend(BASE))).items()}


def _mutated(name, folder, problem_="plain"):
    mutant = next(m for m in FORWARD if m.name == name)
    return {
        k: v[1].copy() for k, v in run(problem_of(problem_), Local(build(mutant, folder))).items()
    }


def test_a_match_in_part_says_what_it_leaves(tmp_path):
    """Silu is missing, and a tenth of the codes are something else besides."""
    rows = _mutated("silu-is-relu", tmp_path)
    rows["l2_acts"][:, 5::10] ^= 0x40
    departure = explain_token(rows)
    step = departure["explanations"][0]
    best = step["partial"][0]
    assert best["what"] == "relu stands for silu" and not step["exact"]
    hit = sum(len(range(5, 256, 10)) for _ in range(3))
    assert best["unexplained"] + best["contradicts"] == hit
    assert best["explains"] + best["unexplained"] == step["differing"]
    text = "\n".join(explanation(step))
    assert f"explains {best['explains']} of {step['differing']}" in text
    assert f"{best['unexplained']} left unexplained" in text and "in part" in text


def test_a_match_in_part_that_right_values_refute_says_so(tmp_path):
    """Relu stands for silu in all groups but two, which are no tile: there relu would change right
    values."""
    rows, right_ = _mutated("silu-is-relu", tmp_path), right_rows()
    groups = np.array([1, 4])
    at = (groups[:, None] * 32 + np.arange(32)).ravel()
    rows["l2_acts"][:, at], rows["l2_acts_sf"][:, groups] = (
        right_["l2_acts"][:, at], right_["l2_acts_sf"][:, groups]
    )  # fmt: skip
    step = explain_token(rows)["explanations"][0]
    best = step["partial"][0]
    assert not step["exact"] and best["what"] == "relu stands for silu"
    assert best["explains"] == step["differing"] and best["contradicts"]
    first, second, *_ = explanation(step)
    assert "in part" not in first and second == (
        f"  refuted: silu: relu stands for silu: explains {step['differing']} of "
        f"{step['differing']}, but would change {best['contradicts']} values that are right"
    )


def test_what_right_values_refute_comes_after_what_they_do_not():
    """``near`` leaves more wrong than ``complete``, which would change one right value."""
    near, complete = Fit("a", "silu", "", 20, 30, 0), Fit("b", "silu", "", 30, 30, 1)
    assert [f.name for f in in_part([complete, near])] == ["a", "b"]
    step = report([complete, near], Evidence("codes", 30, 30, ""), 99, "codes", 2)
    assert [line.split(":")[0].strip() for line in explanation(step)[1:]] == ["silu", "refuted"]


def test_two_faults_of_two_steps_are_both_named(tmp_path):
    two = [m for m in FORWARD if m.name in ("silu-is-relu", "combine-loses-last-slot")]
    both = Mutant("both", "", [edit for m in two for edit in m.edits])
    rows = {k: v[1] for k, v in run(problem_of("plain"), Local(build(both, tmp_path))).items()}
    assert names(explain_token(rows)) == ["relu stands for silu", "slot 2 (expert 2) is lost"]


def test_a_fault_of_one_slot_is_said_to_be_of_that_slot(tmp_path):
    rows, wrong = right_rows(), _mutated("silu-is-relu", tmp_path)
    for stage in ("l2_acts", "l2_acts_sf"):
        rows[stage][1] = wrong[stage][1]
    step = explain_token(rows)["explanations"][0]
    assert [(w["what"], w["where"]) for w in step["exact"]] == [
        ("relu stands for silu", "in slot 1 only")
    ]


def test_deviations_that_give_the_same_are_all_named_as_alternatives(tmp_path):
    step = explain_token(_mutated("requant-exponent-rounded-down", tmp_path))["explanations"][0]
    assert [w["what"] for w in step["exact"]] == [
        "the exponent is rounded down", "the exponent is one too small",
    ]  # fmt: skip
    lines = explanation(step)
    assert lines[0] == "cause: one of these 2, which this data cannot tell apart:"
    assert lines[1] == "  requantise: the exponent is rounded down"
    assert lines[-1].startswith(f"  each explains all {step['differing']} wrong values of ")


def test_codes_that_are_shown_wrong_and_used_right_are_one_fault():
    rows = right_rows()
    rows["l2_acts"][0, 3] ^= 0x55
    departure = explain_token(rows)
    assert [s["stage"] for s in departure["stages"] if s["outside"]] == ["l2_acts"]
    assert len(departure["explanations"]) == 1 and not names(departure)


@pytest.mark.parametrize("how", CORRUPTIONS, ids=lambda f: f.__name__)
def test_a_random_corruption_gets_no_name(how):
    """A few of those that ``tools/false_names.py`` draws by the hundred."""
    rng, right = np.random.default_rng(5), right_rows()
    for shows in ("stages", "y"):
        departure = explain_token(corrupted(rng, right, how, shows))
        assert not names(departure) and not names(departure, "partial")


def explain_token(actual):
    return explain(FromProblem(problem_of("plain")), 1, 0, "fp32-ordered", actual, contract=BASE)[
        "actual"
    ]


# --- the routing weight at other places -----------------------------------------------------------

APPLIED = "the routing weight is applied "


def _unweighted(y):
    """Codes without the weight, which is in ``y`` as ``y(rows, weights)`` says: ``rows`` are those
    of the slots, ``(3, T, H)`` float32."""
    original = problem_of("plain")
    ones = replace(original, topk_weights=torch.ones_like(original.topk_weights))
    stages = run(ones, Local(EagerBackend(BASE)))
    rows = []
    for k in range(3):
        ids = torch.where(torch.arange(3) == k, original.topk_ids, -1)
        rows.append(EagerBackend(BASE).forward(replace(ones, topk_ids=ids))["y"].float())
    output = y(torch.stack(rows), original.topk_weights.T[:, :, None]).bfloat16()
    return {**stages, "y": output.view(torch.int16).numpy().view(np.uint16)}


LATE = {
    "at combine to the slot rows, by fp32 products": lambda rows, w: (rows * w).sum(0),
    "at combine to the slot rows, which are rounded to bfloat16 again": (
        lambda rows, w: (rows * w).bfloat16().float().sum(0)
    ),
    "after the sum of the slots, as the weight of slot 0": lambda rows, w: rows.sum(0) * w[0],
}


@pytest.mark.parametrize("place", LATE)
def test_y_tells_where_a_late_routing_weight_is_applied(place):
    departure = departure_of("plain", _unweighted(LATE[place]))
    of_codes, of_y = departure["explanations"]
    exact = [way["what"] for way in of_codes["exact"]]
    assert APPLIED + place in exact and of_y["follows"] and of_y["exact"] == of_codes["exact"]
    assert "the routing weight is dropped" not in exact and len(exact) <= 2
    assert causes({"actual": departure})[-1].endswith(" too")


def test_y_that_follows_from_the_codes_tells_that_the_weight_is_dropped():
    departure = departure_of("plain", _unweighted(lambda rows, w: rows.sum(0)))
    assert names(departure) == ["the routing weight is dropped"]


def test_places_that_y_does_not_tell_apart_are_one_line():
    """Besides the weight, ``y`` has another fault."""
    stages = _unweighted(lambda rows, w: rows.sum(0))
    stages["y"] = stages["y"] ^ 0x155
    lines = causes({"actual": departure_of("plain", stages)})
    assert lines[0].startswith(
        "cause: routing weight: the routing weight is dropped; or is applied after linear 2 to its "
        "fp32 sums; or is applied "
    )
    assert lines[0].endswith("(this data cannot tell these apart)")
    assert lines[1].startswith("  explains all ") and lines[2].startswith("cause: unknown; none of")


def test_a_routing_weight_before_silu_is_named():
    """A weight of a half on gate and up is a scale byte less."""
    original = problem_of("plain")
    half = replace(original, topk_weights=torch.full_like(original.topk_weights, 0.5))
    wrong = replace(
        half, topk_weights=torch.ones_like(original.topk_weights),
        w13_weight_scale=original.w13_weight_scale - 1,
    )  # fmt: skip
    actual = {k: v[1] for k, v in run(wrong, Local(EagerBackend(BASE))).items()}
    departure = explain(FromProblem(half), 1, 0, "fp32-ordered", actual, contract=BASE)["actual"]
    assert names(departure) == [f"{APPLIED}before silu to gate and up"]


def test_a_logarithm_in_fp32_rounds_one_unit_above_a_power_of_two_down():
    """At 2^-9 and not at 1/2: the exponent takes bits from the fraction of the logarithm."""
    source = FromProblem(problem_of("plain"))
    life = live(source, 1, range(128), "fp32-ordered", NEWEST)
    ways = {way.name: way for way in of_codes(life, source)}
    way = ways["the exponent is the logarithm in fp32, rounded up"]
    above = np.nextafter(np.float32(448), np.float32(np.inf)) * np.float32([2**-9, 2**-1])
    assert list(way.exponent(above)) == [127 - 9, 127]
    assert list(right(life).exponent(above)) == [127 - 8, 127]


def test_another_rounding_of_a_scale_byte_keeps_the_floor():
    """A kernel that rounds wrongly and holds zeros to the floor is named on data with zeros."""
    source = FromProblem(problem_of("plain"))
    life = live(source, 1, range(128), "fp32-ordered", NEWEST)
    ways = [way for way in of_codes(life, source) if " rounded " in way.name and way.exponent]
    floors = {way.name: int(way.exponent(np.zeros(1, np.float32))[0]) for way in ways}
    for name in ("the exponent is rounded down", "the exponent is rounded to nearest",
                 "the exponent is that of amax / 256, rounded down"):  # fmt: skip
        assert floors[name] == NEWEST.requant_exponent_min.value > 0
