"""``megamoe explain`` names no cause by chance: it tries others of the wrong tokens, and counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megamoe.backends.eager import EagerBackend
from megamoe.backends.simulate import problem
from megamoe.explain import FromProblem, explain
from megamoe.explain.deviations.shown import CHANCE
from megamoe.explain.match import Evidence, general
from megamoe.explain.others import of_all_tokens, spread
from megamoe.explain.places import in_batch
from megamoe.explain.words import causes, explanation, is_clear, read_from
from megamoe.spec.contract import CONTRACTS
from megamoe.suite.at_hand import judge, run
from tests.helpers.local import Local

TOKEN = 1
ROLLED = "the routing weight is that of the slot after"


@pytest.fixture(scope="module")
def right():
    recipe = {"w13_scale": [120, 2], "w2_scale": [120, 2]}
    return problem(
        3, tokens=4, top_k=3, experts=4, hidden=128, intermediate=128, weights_recipe=recipe
    )


class Weighted(EagerBackend):
    """Takes other routing weights than it is given: those of the slot after, of some tokens; and
    of the others weights that no rule gives."""

    name = "weighted"

    def __init__(self, rolled):
        super().__init__()
        self.rolled = torch.tensor(rolled)[:, None]

    def forward(self, problem):
        w = problem.topk_weights
        w = torch.where(self.rolled, w.roll(-1, 1), w * 0.7).contiguous()
        return super().forward(replace(problem, topk_weights=w))


def report_of(p, backend):
    """The report of token 1 and of the batch."""
    session = Local(backend)
    findings = judge(p, session)[0].findings
    stages = run(p, session)
    source, contract = FromProblem(p), CONTRACTS[session.identity.contract]
    rows = {name: stage[TOKEN] for name, stage in stages.items()}
    of_class = session.identity.accumulator
    report = explain(source, TOKEN, 0, of_class, rows, contract=contract)
    actual = report["actual"]
    return report | of_all_tokens(actual, stages, TOKEN, source, p, findings, of_class, contract)


def test_a_deviation_that_fits_one_token_by_chance_is_no_cause(right):
    report = report_of(right, Weighted([False, True, True, False]))
    (step,) = report["actual"]["explanations"]
    assert not step["exact"] and step["tried_on"] == [0, 2, 3]
    (way,) = step["alone"]
    assert (way["what"], way["holds_on"], way["fails_on"]) == (ROLLED, [1, 2], [0, 3])
    first, second = causes(report)
    assert first.startswith("cause: unknown; none of ")
    assert first.endswith(" explains all 4 wrong tokens that were tried")
    assert second == f"  routing weight: {ROLLED}: fits tokens 1 and 2, but not tokens 0 and 3"
    assert read_from(report) == "tokens 0, 1, 2 and 3"


def test_a_deviation_that_fits_all_of_them_is_the_cause(right):
    report = report_of(right, Weighted([True] * 4))
    (step,) = report["actual"]["explanations"]
    assert is_clear(step) and step["exact"][0]["holds_on"] == [1, 0, 2, 3]
    first, second = causes(report)
    assert first == f"cause: routing weight: {ROLLED}"
    assert second.endswith(" of token 1, and of 3 more wrong tokens that were tried")


class ExpertBefore(EagerBackend):
    """Both linears of each expert but the first take the weights of the expert before."""

    name = "expert-before"

    def forward(self, problem):
        ids = problem.topk_ids
        return super().forward(replace(problem, topk_ids=torch.where(ids > 0, ids - 1, ids)))


def test_a_cause_in_some_slots_is_named_in_both_linears_with_the_slots(right):
    """Each token has expert 0 and others, so all tokens are wrong, and the slots say where."""
    ids = torch.tensor([[0, 1, 2], [2, 0, 3], [1, 3, 0], [3, 0, 1]])
    report = report_of(replace(right, topk_ids=ids), ExpertBefore())
    assert report["batch"]["wrong"] == 4
    assert report["batch"]["rules"] == [
        "experts 1 and later, at all of their 8 rows",
        "the first tile of 8 or more rows of each expert but expert 0: 8 rows",
    ]
    what = "weights and scales are those of the expert before, in some slots only"
    lines = [line for line in causes(report) if line.startswith("cause: ")]
    assert lines == [f"cause: linear {linear}: {what}" for linear in (1, 2)]


class ExpertBeforeWithRows(EagerBackend):
    """Expert 3 takes the weights of expert 1: expert 2 has no row, and a search passes over it."""

    name = "expert-before-with-rows"

    def forward(self, problem):
        ids = problem.topk_ids
        return super().forward(replace(problem, topk_ids=torch.where(ids == 3, 1, ids)))


def test_the_expert_before_may_be_the_one_before_that_has_rows(right):
    ids = torch.tensor([[0, 3, -1], [3, 0, -1], [0, 3, -1], [1, 0, -1]])
    report = report_of(replace(right, topk_ids=ids), ExpertBeforeWithRows())
    what = "weights and scales are those of the expert before, of those with rows"
    lines = [line for line in causes(report) if line.startswith("cause: ")]
    assert lines == [f"cause: linear {linear}: {what}" for linear in (1, 2)]


class Reweighted(EagerBackend):
    """Takes the routing weights of a permutation of the batch, or others."""

    name = "reweighted"

    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def forward(self, problem):
        return super().forward(replace(problem, topk_weights=self.weights))


DONOR = 53
"""The token whose weight token 1 takes."""


@pytest.fixture(scope="module")
def many():
    """One slot a token, and weights so close that a token may fit one of them by chance."""
    recipe = {"w13_scale": [120, 2], "w2_scale": [120, 2]}
    p = problem(
        3, tokens=60, top_k=1, experts=4, hidden=128, intermediate=128, weights_recipe=recipe
    )
    return replace(p, topk_weights=torch.linspace(0.3, 1, 60)[:, None])


def test_weights_of_other_slots_are_named_where_several_tokens_prove_it(many):
    report = report_of(many, Reweighted(many.topk_weights[torch.arange(60) * DONOR % 60]))
    (step,) = report["actual"]["explanations"]
    assert step["may_be"]["chance"] > CHANCE, "token 1 alone proves nothing"
    assert len(step["tried_on"]) == 16 and is_clear(step)
    assert step["exact"][0]["what"] == (
        "routing weights are those of other slots: "
        f"slot 0 of token 1 takes that of slot 0 of token {DONOR}"
    )


def test_they_are_named_also_where_another_deviation_fits_one_token_by_chance(many):
    weights = many.topk_weights[torch.arange(60) * DONOR % 60]
    weights[1] = many.topk_weights[2]
    (step,) = report_of(many, Reweighted(weights))["actual"]["explanations"]
    assert is_clear(step) and not step["alone"] and step["exact"][0]["holds_on"][0] == 1
    assert step["exact"][0]["what"].startswith("routing weights are those of other slots: ")


@pytest.mark.parametrize("factor", [1, 0.7])
def test_they_are_not_named_where_other_tokens_do_not_show_it(many, factor):
    """The other tokens are right, or have weights that no slot has."""
    weights = many.topk_weights * factor
    weights[1] = many.topk_weights[DONOR]
    (step,) = report_of(many, Reweighted(weights))["actual"]["explanations"]
    assert step["may_be"]["is_unique"] and not step["exact"]


def test_they_are_not_named_where_the_other_token_fits_two_slots(many):
    """Such a token proves nothing, and token 1 alone too little."""
    original = many.topk_weights.clone()
    original[20] = original[10]
    weights = original.clone()
    weights[1], weights[5] = original[DONOR], original[10]
    report = report_of(replace(many, topk_weights=original), Reweighted(weights))
    (step,) = report["actual"]["explanations"]
    assert step["may_be"]["chance"] > CHANCE and not step["exact"]


class TiesAway(EagerBackend):
    """Rounds ties of x away from zero, and nothing else."""

    name = "ties-away"

    def _stage(self, problem):
        x, x_sf = super()._stage(problem)
        x[problem.hidden_states == 272] = 0x79  # 272 lies between 256 and 288; amax is 448
        return x, x_sf


def test_right_codes_of_other_tokens_tell_causes_apart(right):
    """All inexact codes of token 1 are ties; in the other tokens a code is inexact and no tie."""
    hidden = torch.zeros_like(right.hidden_states)
    hidden[:, ::32], hidden[:, 1::32], hidden[1, 2::4] = 448, 1.03, 272
    hidden[1, 1::32] = 0
    report = report_of(replace(right, hidden_states=hidden), TiesAway())
    step = report["actual"]["explanations"][0]
    assert [way["what"] for way in step["exact"]][:1] == [
        "ties of codes are rounded away from zero"
    ]
    assert "codes are rounded away from zero" not in [way["what"] for way in step["exact"]]


def test_some_tokens_are_tried_from_the_first_to_the_last():
    assert spread(range(100), 50, 4) == [0, 32, 66, 99]
    assert spread([3, 5, 8], 5, 4) == [3, 8] and spread([5], 5, 4) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [("slot 1 (expert 2) is lost", "slot 0 (expert 5) is lost"),
     ("slot 1 (expert 2) takes the weights of expert 3",
      "slot 0 (expert 3) takes the weights of expert 2"),
     ("the experts are those of token 4", "the experts are those of token 9")],
)  # fmt: skip
def test_a_deviation_has_one_name_on_all_tokens(one, other):
    assert general(one) == general(other) != one
    assert general("the routing weight is that of slot 0").endswith("slot 0")


# --- too little to tell -------------------------------------------------------------------------


def groups(*wrong):
    """``(2, 2 + 64)``: wrong scale bytes and codes of two groups in two slots."""
    mask = np.zeros((2, 66), np.bool_)
    for place in wrong:
        mask[place] = True
    return mask


@pytest.mark.parametrize(
    ("wrong", "decisions", "text"),
    [(groups((0, 1), (0, slice(34, 66))), 1, "one group of one slot"),
     (groups((0, 0), (1, 0)), 2, "two groups of two slots"),
     (groups((1, slice(2, 7))), 5, "one group of one slot")],
)  # fmt: skip
def test_a_scale_byte_and_its_codes_are_one_decision(wrong, decisions, text):
    evidence = Evidence.of_groups("codes", wrong)
    assert (evidence.decisions, evidence.text) == (decisions, text)
    assert evidence.values == wrong.sum()


def test_one_wrong_group_tells_no_cause():
    way = {"stage": "requantise", "what": "amax is rounded to bfloat16", "where": ""}
    step = {"differing": 33, "of": 528, "compared": "codes of token 0", "tried": 3, "not_tried": 0,
            "follows": False, "exact": [way], "partial": [], "tried_on": [], "alone": [],
            "decisions": 1, "evidence": "one group of one slot"}  # fmt: skip
    assert explanation(step) == [
        "cause: unknown; one group of one slot is wrong: too little to tell a cause",
        "may be: requantise: amax is rounded to bfloat16",
        "  gives all 33 wrong values of 528 codes of token 0",
    ]
    assert not is_clear(step)
    assert is_clear({**step, "decisions": 3})
    assert explanation({**step, "decisions": 3})[0] == (
        "cause: requantise: amax is rounded to bfloat16"
    )


# --- where --------------------------------------------------------------------------------------

IDS = np.array([[0, 1], [1, 2], [0, 2]])
WRONG = np.array([True, True, False])


@pytest.mark.parametrize(("slots", "is_named"), [({0: {1}, 1: {0}}, True), ({0: {0}}, False)])
def test_a_rule_gives_the_wrong_slots_too(slots, is_named):
    """Expert 1 is at slot 1 of token 0 and at slot 0 of token 1."""
    actual = {"explanations": [{"exact": []}]}
    rules = in_batch(actual, {}, 0, IDS, 3, WRONG, slots)["rules"]
    assert ("expert 1, at all of its 2 rows" in rules) == is_named
