"""One drawn problem and its judgement: by the oracle's live answer, and by the judge of
``check``."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any

from megamoe import oracle
from megamoe.cases import Case
from megamoe.cases.recipes import forward_problem
from megamoe.fuzz.draw import FuzzCase
from megamoe.fuzz.rare import Instance, classes_of
from megamoe.judge import Verdict
from megamoe.oracle.folding import leaves_bf16
from megamoe.spec.contract import CONTRACTS, Contract
from megamoe.spec.problem import Problem
from megamoe.suite.at_hand import GoldenNow, judge
from megamoe.suite.runner import Runner
from megamoe.worker.session import FOLDS_SCALES

FOLDING = ("fp32", "fp32-ordered")
"""Accumulator classes whose kernels may fold scale factors into bfloat16 operands."""


class GoldenOfOne(GoldenNow):
    """The oracle's golden for one class, which knows whether that class has any freedom.

    If the envelope of the class is one point, that is the reference point, since every envelope
    contains it. The outputs are then compared with it bit by bit.
    """

    def __init__(
        self, problem: Problem, accumulator: str, contract: Contract, is_calibrated: bool
    ) -> None:
        super().__init__(problem, accumulator, contract)
        self.is_calibrated = is_calibrated
        trace: dict[str, Any] = {}
        answer = oracle.forward(problem, [accumulator], contract=contract, trace=trace)
        self._tensors = answer.to_tensors()
        envelope = answer.envelopes[accumulator]
        self.zero_freedom = envelope.is_point(answer.y, answer.codes, answer.sf)
        self.instance = Instance(problem, answer, trace.get("gate_up", answer.y[:0]))


@dataclass(frozen=True)
class Result:
    """The result of one problem; plain data."""

    verdict: Verdict | None
    """The verdict; None: not judged, since its operands are no bfloat16 numbers."""
    is_point: bool = False
    classes: tuple[int, ...] = ()


def judge_problem(wide: bool, runner: Runner, case: Case) -> Result:
    """A judge's step. ``wide``: also where scaled operands are no bfloat16 numbers."""
    assert isinstance(case, FuzzCase)
    identity = runner.session.identity
    try:
        problem = forward_problem(case)
        golden = GoldenOfOne(
            problem, identity.accumulator, CONTRACTS[identity.contract], case.calibrated
        )
        may_fold = identity.accumulator in FOLDING and not wide
        may_fold |= identity.provides(FOLDS_SCALES)
        if may_fold and leaves_bf16(
            problem, golden.instance.golden.codes, golden.instance.golden.sf
        ):
            return Result(None)
        classes = classes_of(golden.instance)
    except Exception as error:  # of ours: the problem, the oracle; the run must not lose it
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"megamoe itself raised {type(error).__name__}: {error} ({frame.name})"
        return Result(Verdict(case.id, case.kind, "error", " ".join(text.split())))
    runner.brief = True
    verdict, _ = judge(problem, runner.session, case.name, golden, runner.timeout)
    return Result(verdict, golden.zero_freedom, classes)
