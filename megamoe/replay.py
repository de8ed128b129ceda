"""Judging one problem that is at hand: no store, the oracle answers for it now.

The same runner and the same judge as ``megamoe check``; only the golden is made on the spot, for
the one accumulator class of the backend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megamoe import oracle
from megamoe.cases import Case
from megamoe.golden import StoredGolden
from megamoe.judge import Verdict, forward_bits
from megamoe.problem import Output, Problem
from megamoe.stored import case_of
from megamoe.suite.run import Runner


class _Now:
    """Stands where a runner has its store."""

    def entry(self, case: Case) -> Mapping[str, Any]:
        return {"inputs": ""}


class GoldenNow:
    """The oracle's golden of a problem for one accumulator class, made when it is first needed."""

    zero_freedom = False
    """Proven for all classes only; an envelope of one point is as sharp."""

    def __init__(self, problem: Problem, accumulator: str) -> None:
        self.problem, self.accumulator = problem, accumulator
        self._tensors: dict[str, Any] | None = None

    def _made(self) -> dict[str, Any]:
        if self._tensors is None:
            self._tensors = oracle.forward(self.problem, [self.accumulator]).to_tensors()
        return self._tensors

    def names(self) -> Sequence[str]:
        return [*self._made()]

    def get(self, name: str) -> Any:
        return self._made()[name]

    def matches(self, name: str, actual: Any, nan: Any = None) -> bool:
        return False


Golden = StoredGolden | GoldenNow


class _Runner(Runner):
    """A runner of one problem."""

    def __init__(self, backend: Any, problem: Problem, device: str, golden: Golden | None) -> None:
        super().__init__(backend, _Now(), device)  # type: ignore[arg-type]
        self.problem = problem
        self.golden = golden or GoldenNow(problem, backend.accumulator)

    def _golden(self, case: Case) -> Any:
        return self.golden, dict(vars(self.problem))


def judge(
    problem: Problem,
    backend: Any,
    device: str = "cpu",
    name: str = "replay",
    golden: Golden | None = None,
) -> tuple[Verdict, Mapping[str, Any] | None]:
    """The verdict of ``backend`` on ``problem`` (CPU tensors), and the bits that it showed.

    ``golden``: the oracle's answer, where it is at hand already.
    """
    runner = _Runner(backend, problem, device, golden)
    verdict, shown = runner.run_and_show(case_of(problem, name))
    return verdict, None if shown is None else shown.actual


class _Returned:
    """What was returned once, as a backend."""

    name = "observed"

    def __init__(self, accumulator: str, output: Output) -> None:
        self.accumulator = accumulator
        self._output = output

    def forward(self, problem: Problem) -> Output:
        return self._output


def judge_output(
    problem: Problem,
    output: Mapping[str, torch.Tensor],
    accumulator: str,
    name: str = "observed",
    golden: Golden | None = None,
) -> Verdict:
    """The verdict on tensors that some engine returned for ``problem``."""
    return judge(problem, _Returned(accumulator, output), "cpu", name, golden)[0]


def run(problem: Problem, backend: Any, device: str = "cpu") -> dict[str, Any]:
    """``backend``'s stages on ``problem`` as bits; raises what it raises."""
    moved = problem if device == "cpu" else problem.to(device)
    return forward_bits(backend.forward(moved), problem)
