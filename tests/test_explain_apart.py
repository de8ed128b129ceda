"""Causes that fit one red alike: a plain case that passes refutes those that would show in it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from megamoe.backends.eager import EagerBackend
from megamoe.cases import load_cases
from megamoe.commands.explain_apart import tell_apart
from megamoe.explain.words import explanation
from megamoe.spec.contract import CONTRACTS
from megamoe.suite.settings import Settings
from megamoe.suite.similar import plain
from tests.helpers.local import Local

FIRST = "up is multiplied by the weight first"
"""Moves few roundings, so plain data do not show it."""
GATE = "the routing weight is applied before silu to the gate"
UP = "the routing weight is applied before silu to up"
PASSES = "forward/precise-silu-bell-clamp-none"


class Shows(EagerBackend):
    """Right, and shows some stages."""

    name = "shows"

    def __init__(self, *stages):
        super().__init__()
        self.stages = stages

    def forward(self, problem):
        out = super().forward(problem)
        return {name: out[name] for name in self.stages}


class Wrong(Shows):
    """Red in every case: the codes are right, and y is zero."""

    def forward(self, problem):
        out = super().forward(problem)
        return {**out, "y": out["y"] * 0}


CODES = Shows("l2_acts", "l2_acts_sf", "y")


@pytest.fixture(scope="module")
def directed_case():
    (case,) = (one for one in load_cases() if one.name == "directed-product-order")
    return case


def survivors(case, backend, *names, where="", **more):
    """The survivors of the names that fit the red ``case``, and its step."""
    ways = [{"stage": "routing weight", "what": what, "where": where} for what in names]
    step = {"differing": 4, "of": 528, "compared": "codes of token 0", "tried": 300, "not_tried": 0,
            "decisions": 4, "follows": False, "exact": ways, "partial": [], "tried_on": [],
            "alone": [], "overflow": []}  # fmt: skip
    report = copy.deepcopy({"actual": {"explanations": [step]}, **more})
    session = Local(backend)
    of_class, contract = session.identity.accumulator, CONTRACTS[session.identity.contract]
    tell_apart(case, report, session, of_class, contract, Settings().root)
    (step,) = report["actual"]["explanations"]
    return [way["what"] for way in step["exact"]], step


def test_the_plain_case_has_the_features_of_the_red_one(directed_case):
    """Precise silu, and no clamp: a fault of this path alone would show there too."""
    cases = plain(directed_case, load_cases())
    assert cases[0].id == PASSES
    assert all(one.params["fast_math"] is False for one in cases)


@pytest.mark.parametrize(
    ("clamp", "name"), [(10, "bell-h256-i128-drifts"), (7, "clamp-7-bell-misapplied")]
)
def test_the_smallest_plain_case_of_the_same_clamp_is_taken(directed_case, clamp, name):
    fast = replace(
        directed_case, params={**directed_case.params, "clamp": clamp, "fast_math": True}
    )
    assert plain(fast, load_cases())[0].name == name


@pytest.mark.parametrize("backend", [CODES, Shows("y")], ids=["codes", "y only"])
def test_a_cause_that_a_passing_case_would_show_is_left_out(directed_case, backend):
    names, step = survivors(directed_case, backend, GATE, UP, FIRST)
    assert names == [FIRST]
    assert explanation(step) == [
        f"cause: routing weight: {FIRST}",
        "  explains all 4 wrong values of 528 codes of token 0",
        f"  left out, since {PASSES} passes, and would be red with them:",
        f"    routing weight: {GATE}",
        f"    routing weight: {UP}",
    ]


def test_no_cause_is_left_out_where_the_plain_case_is_red_too(directed_case):
    names, step = survivors(directed_case, Wrong(*CODES.stages), GATE, FIRST)
    assert names == [GATE, FIRST] and "refuted_by" not in step


@pytest.mark.parametrize(
    "more",
    [{"where": "in slot 1 only"}, {"batch": {"rules": ["expert 5, at all of its 12 rows"]}}],
)
def test_a_fault_of_some_places_may_pass_a_plain_case(directed_case, more):
    assert survivors(directed_case, CODES, GATE, FIRST, **more)[0] == [GATE, FIRST]


def test_if_all_would_show_none_is_left_out(directed_case):
    """The fault then is none that a plain case has, such as one of a batch of one token."""
    assert survivors(directed_case, CODES, GATE, UP)[0] == [GATE, UP]
