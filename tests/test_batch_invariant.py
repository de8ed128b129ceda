"""A backend that is not batch-invariant by design says so, and the verdict names it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from megamoe.backends import load_backend
from megamoe.cases import Case, golden_root, load_cases
from megamoe.golden import Store, make
from megamoe.kinds.property import COUNTS_TOKENS
from megamoe.spec.contract import BASE
from megamoe.suite import results, summary
from megamoe.suite.runner import Runner
from megamoe.suite.settings import Settings
from tests.helpers.local import Local

WHY = "the backend has no promise of law {}: it says batch_invariant = False"


class SplitK:
    """``eager``, but a call of less or more than ``tokens`` tokens rounds elsewhere."""

    name, accumulator = "split-k", "fp32-ordered"

    def __init__(self, tokens: int, factor: float = 1.0) -> None:
        self.eager, self.tokens, self.factor = load_backend("eager"), tokens, factor

    def forward(self, problem: Any) -> Any:
        y = self.eager.forward(problem)["y"]
        return y * self.factor if problem.num_tokens == self.tokens else y * 1.5


class SaysSo(SplitK):
    batch_invariant = False


def case_of(law: str) -> Case:
    """The smallest case of a law."""
    cases = [c for c in load_cases() if c.params.get("law") == law and BASE.revision in c.revisions]
    return min(cases, key=lambda c: c.params["tokens"] * c.params["hidden"])


def judge(backend: Any, case: Case) -> Any:
    runner = Runner(Local(backend), Store(golden_root(), make))
    return runner.run(case), runner.session.identity


@pytest.mark.parametrize("law", ["batch-invariance", "padding-rows"])
def test_the_law_is_not_provided_and_the_verdict_names_it(law: str) -> None:
    case = case_of(law)
    tokens = case.params["tokens"]
    verdict, _ = judge(SplitK(tokens), case)
    assert verdict.status == "fail" and verdict.reason.startswith(f"{law}: ")
    verdict, _ = judge(SaysSo(tokens), case)
    assert (verdict.status, verdict.reason) == ("not-provided", WHY.format(law))


def test_the_golden_of_the_case_is_judged_all_the_same() -> None:
    case = case_of("batch-invariance")
    verdict, _ = judge(SaysSo(case.params["tokens"], 1.5), case)
    assert verdict.status == "fail" and "law" not in verdict.how


def test_other_laws_are_owed() -> None:
    case = case_of("token-permutation")
    verdict, _ = judge(SaysSo(case.params["tokens"]), case)
    assert verdict.status == "pass" and "law" in verdict.how
    assert "token-permutation" not in COUNTS_TOKENS and "repeat" not in COUNTS_TOKENS


def test_it_is_part_of_what_a_backend_says_of_itself() -> None:
    case = case_of("batch-invariance")
    (_, plain), (verdict, says) = (
        judge(SplitK(1), case),
        judge(SaysSo(case.params["tokens"]), case),
    )
    assert (plain.batch_invariant, says.batch_invariant) == (True, False)
    assert plain.digest != says.digest
    assert "batch_invariant True, but said False" in says.differs(
        {"name": says.name, "accumulator": says.accumulator, "callables": list(says.callables),
         "contracts": None}
    )  # fmt: skip
    report = results.build(Settings(), says, [verdict])
    assert report["batch_invariant"] is False
    console = Console(file=io.StringIO(), width=150)
    summary.print_summary(report, console)
    assert isinstance(console.file, io.StringIO)
    line = "not batch-invariant, by the backend's own word: in 1 case the law was not judged"
    assert line in console.file.getvalue()
    assert summary.invariance_line({"cases": []}) == "", "an earlier report says nothing of it"


def test_a_verdict_of_the_module_alone_is_counted_apart() -> None:
    of_module = {"id": "errors/a", "kind": "errors", "status": "pass", "how": ["error", "module"]}
    of_backend = {**of_module, "id": "errors/b", "how": ["error"]}
    report = {"cases": [of_module, of_backend], "counts": {"pass": 2}}
    start = "1 of the judged cases is a wrong call of megamoe's own module: it says nothing"
    assert summary.module_line(report).startswith(start)
    both = {"cases": [of_module, of_module], "counts": {"pass": 2}}
    assert summary.module_line(both).startswith("2 of the judged cases are wrong calls of megamoe")
    assert summary.module_line({**report, "cases": [of_backend]}) == ""
