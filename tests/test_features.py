"""Features of a call: a kernel that is wrong in one is red, by y alone, in the case for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megamoe.backends import eager
from megamoe.backends.eager import EagerBackend
from megamoe.cases import load_cases
from megamoe.cases.forms import FORWARD
from megamoe.golden import regenerate
from megamoe.spec.contract import MEGAMOE_2026_11
from megamoe.spec.problem import Problem
from megamoe.suite.at_hand import judge
from tests.helpers.local import Local

CASES = {case.name: case for case in load_cases() if case.kind == "forward"}


class Variant(EagerBackend):
    """``eager`` under vLLM 0.33's contract; it shows ``y`` and no codes."""

    def __init__(self) -> None:
        super().__init__(MEGAMOE_2026_11)

    def change(self, problem):
        return problem

    def forward(self, problem):
        return {"y": super().forward(self.change(problem))["y"]}


class ScalesOneGroupLate(Variant):
    def change(self, problem):
        return replace(problem, shared_w13_weight_scale=problem.shared_w13_weight_scale.roll(1, -1))


class ScalesOneRowLate(Variant):
    def change(self, problem):
        return replace(problem, shared_w2_weight_scale=problem.shared_w2_weight_scale.roll(1, 0))


class SharedExpertNotClamped(Variant):
    def _shared(self, problem, x, sf):
        return super()._shared(replace(problem, activation_clamp=None), x, sf)


class GateClampedBeforeSilu(Variant):
    def change(self, problem):
        return replace(problem, activation="swiglu")


class SituScalesSwapped(Variant):
    def change(self, problem):
        alpha, beta = problem.activation_alpha, problem.activation_beta
        return replace(problem, activation_alpha=beta, activation_beta=alpha)


WRONG = [
    (ScalesOneGroupLate, "shared-expert-wide-scales-drift"),
    (ScalesOneRowLate, "shared-expert-bell-data-drifts"),
    (SharedExpertNotClamped, "shared-expert-without-the-clamp"),
    (GateClampedBeforeSilu, "swiglustep-precise"),
    (SituScalesSwapped, "situ-2-8-precise"),
]


def verdict(backend, name: str):
    return judge(Problem(**regenerate(CASES[name])), Local(backend))[0]


@pytest.mark.parametrize(("wrong", "name"), WRONG)
def test_a_wrong_kernel_is_red_in_the_case_made_for_it(wrong, name):
    assert verdict(Variant(), name).status == "pass"
    assert verdict(wrong(), name).status == "fail"


def test_an_output_that_is_added_in_fp32_is_red(monkeypatch):
    def combined(slots, live, weights, contract, *, output, **_):
        rows = torch.where(live[:, :, None], slots.float(), 0.0)
        return (rows.sum(1) + output.float()).to(torch.bfloat16)

    assert verdict(Variant(), "shared-output-added-in-fp32").status == "pass"
    monkeypatch.setattr(eager, "combine", combined)
    assert verdict(Variant(), "shared-output-added-in-fp32").status == "fail"


@pytest.mark.parametrize("case", [c for c in CASES.values() if FORWARD.features(c)])
def test_a_case_and_its_problem_ask_the_same(case):
    """The features are read off the parameters, to select, and off the problem, to judge."""
    assert FORWARD.features(case) == Problem(**regenerate(case)).features
