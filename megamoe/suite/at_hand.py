"""Judging one problem that is at hand: no store, the oracle answers for it now.

The same runner and the same judge as ``megamoe check``; only the golden is made on the spot, for
the one accumulator class of the backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from megamoe import oracle
from megamoe.cases import Case
from megamoe.cases.stored import case_of
from megamoe.golden import StoredGolden
from megamoe.judge import Verdict, forward_bits
from megamoe.kinds import forward
from megamoe.kinds.forward import ForwardOutput
from megamoe.spec.contract import CONTRACTS, Contract, decides
from megamoe.spec.problem import Problem
from megamoe.suite.runner import TIMEOUT, Runner
from megamoe.worker.exchange import Caller
from megamoe.worker.session import Identity, Session


class _Now:
    """Stands where a runner has its store."""

    def __init__(self, contract: Contract) -> None:
        self.contract = contract

    def entry(self, case: Case) -> Mapping[str, Any]:
        return {"inputs": ""}


class GoldenNow:
    """The oracle's golden of a problem for one accumulator class, made when it is first needed."""

    zero_freedom = False
    """Proven for all classes only; an envelope of one point is as sharp."""
    is_calibrated = True

    def __init__(self, problem: Problem, accumulator: str, contract: Contract) -> None:
        self.problem, self.accumulator, self.contract = problem, accumulator, contract
        self._tensors: dict[str, Any] | None = None

    @classmethod
    def of(cls, problem: Problem, session: Session) -> GoldenNow:
        """For the class and the contract of a session's backend."""
        identity = session.identity
        return cls(problem, identity.accumulator, CONTRACTS[identity.contract])

    def _make(self) -> dict[str, Any]:
        if self._tensors is None:
            golden = oracle.forward(self.problem, [self.accumulator], contract=self.contract)
            self._tensors = golden.to_tensors()
        return self._tensors

    @property
    def full(self) -> Mapping[str, Any]:
        """All tensors by name: none is stored as digests."""
        return self._make()

    def names(self) -> Sequence[str]:
        return [*self._make()]

    def get(self, name: str) -> Any:
        return self._make()[name]

    def matches(self, name: str, actual: Any, nan: Any = None) -> bool:
        return False

    def other_rows(self, name: str, actual: Any) -> None:
        return None


Golden = StoredGolden | GoldenNow


class _Runner(Runner):
    """A runner of one problem."""

    def __init__(
        self, session: Session, problem: Problem, golden: Golden | None, timeout: float
    ) -> None:
        now = _Now(CONTRACTS[session.identity.contract])
        super().__init__(session, now, timeout=timeout)  # type: ignore[arg-type]
        self._problem = problem
        self.answer: Any = golden or GoldenNow.of(problem, session)

    def golden(self, case: Case) -> Any:
        return self.answer, self._problem.arguments

    def other_goldens(self, case: Case) -> Iterator[tuple[list[str], Any]]:
        accumulator = self.session.identity.accumulator
        groups: dict[Any, list[str]] = {}
        features = set(self._problem.features)
        for name, contract in CONTRACTS.items():
            if not contract.takes(features):
                continue
            key = tuple(
                c.value for n, c in contract.clauses.items() if decides(n, "forward", features)
            )
            groups.setdefault(key, []).append(name)
        for names in groups.values():
            if self.store.contract.revision not in names:
                yield names, GoldenNow(self._problem, accumulator, CONTRACTS[names[0]])

    def with_others(self, case: Case, verdict: Verdict, view: ForwardOutput) -> Verdict:
        """The verdict, and under which other contracts what was shown is right."""
        return self.under_others(
            case, verdict, lambda g: forward.judge_output(self, case, replace(view, golden=g))
        )


def judge(
    problem: Problem, session: Session, name: str = "replay", golden: Golden | None = None,
    timeout: float = TIMEOUT, others: bool = False,
) -> tuple[Verdict, Mapping[str, Any] | None]:  # fmt: skip
    """The verdict of a session's backend on ``problem`` (CPU tensors), and the bits it showed.

    ``golden``: the oracle's answer, where it is at hand already. ``others``: a fail says under
    which other contracts it is right.
    """
    runner, case = _Runner(session, problem, golden, timeout), case_of(problem, name)
    verdict, view = runner.run_and_show(case)
    if others and view is not None:
        verdict = runner.with_others(case, verdict, view)
    return verdict, None if view is None else view.actual


class _Nobody:
    """A session of nobody: outputs that somebody recorded, of a claimed class."""

    folder = None

    def __init__(self, accumulator: str, contract: Contract) -> None:
        self.identity = Identity("observed", accumulator, ("forward",), contract.revision)


def judge_output(
    problem: Problem,
    output: Mapping[str, torch.Tensor],
    accumulator: str,
    contract: Contract,
    name: str = "observed",
    golden: Golden | None = None,
    others: bool = False,
) -> Verdict:
    """The verdict on tensors that some engine returned for ``problem``."""
    runner = _Runner(_Nobody(accumulator, contract), problem, golden, TIMEOUT)  # type: ignore[arg-type]
    case, views = case_of(problem, name), []

    def show() -> ForwardOutput:
        views.append(ForwardOutput(runner.answer, problem, "", forward_bits(output, problem)))
        return views[0]

    verdict = runner.judge_view(case, show)
    return runner.with_others(case, verdict, views[0]) if others and views else verdict


def judge_error(
    problem: Problem, session: Session, error: Exception, name: str = "replay"
) -> Verdict:
    """The verdict on a call that gave ``error`` in place of an output."""
    runner = _Runner(session, problem, None, TIMEOUT)

    def show() -> ForwardOutput:
        raise error

    return runner.judge_view(case_of(problem, name), show)


def run(problem: Problem, session: Session, timeout: float = TIMEOUT) -> dict[str, Any]:
    """The backend's stages on ``problem`` as bits. Raises what :mod:`megamoe.worker.exchange`
    does."""
    with Caller(session, timeout) as call:
        return forward_bits(call.forward(problem).result, problem)
