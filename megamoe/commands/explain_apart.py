"""Causes that fit one red alike, told apart by a plain case that the backend passes.

Chosen values leave many deviations alike; bell-shaped data show most of them. A deviation that
would make a passing case red is no cause: the backend does not do this.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from megamoe.cases import Case, load_cases
from megamoe.commands.explain_subject import Subject
from megamoe.explain import refutations
from megamoe.explain.match import Names, general
from megamoe.explain.others import leave_out
from megamoe.judge import judge_forward
from megamoe.spec.contract import Contract
from megamoe.suite import at_hand
from megamoe.suite.similar import plain
from megamoe.worker.exchange import NoOutput
from megamoe.worker.session import Session, WorkerError

Plain = dict[str, Any]
MAX_CASES: Final = 2
"""Plain cases that are judged."""
SECONDS: Final = 2.0
"""The most that one of them may take the backend."""


def tell_apart(
    case: Case, diagnosis: Plain, session: Session, accumulator: str, contract: Contract, root: Path
) -> None:
    """Take those causes out of the ``diagnosis`` of ``case`` that a passing plain
    case refutes, where that leaves any; each step keeps them as ``refuted_by``.

    A fault that holds at some places only may pass a case that lacks these, so it is left as it
    is.
    """
    if diagnosis.get("batch", {}).get("rules") or not open_causes(diagnosis):
        return
    cases = [one for one in load_cases(root) if contract.revision in one.revisions]
    for one in plain(case, cases)[:MAX_CASES]:
        only = open_causes(diagnosis)
        if only:
            against = _refutations(Subject(one.id, root), session, accumulator, contract, only)
            leave_out(diagnosis["actual"], against, one.id)


def open_causes(diagnosis: Plain) -> Names:
    """The deviations of which several fit a step, without those of single slots or of some
    channels."""
    steps = (diagnosis["actual"] or {"explanations": []})["explanations"]
    ways: Iterable[Plain] = (
        way for step in steps if len(step["exact"]) > 1 for way in step["exact"]
        if not way["where"] and not way.get("channels") and general(way["what"]) == way["what"]
    )  # fmt: skip
    return frozenset((way["stage"], way["what"]) for way in ways)


def _refutations(
    subject: Subject, session: Session, accumulator: str, contract: Contract, only: Names
) -> Names:
    """Those of ``only`` that would make a case red which the backend passes."""
    if subject.only_y:
        return frozenset()
    try:
        actual = at_hand.run(subject.problem, session, SECONDS)
    except (NoOutput, WorkerError):  # this case says nothing
        return frozenset()
    golden = subject.golden(accumulator, contract)
    if any(one.bad for one in judge_forward(actual, golden, accumulator, subject.problem).findings):
        return frozenset()
    against: Names = frozenset()
    for token in range(subject.source.tokens):
        rows = {name: stage[token] for name, stage in actual.items()}
        against |= refutations(
            subject.source, token, accumulator, rows, contract, only - against, True
        )
        if against == only:
            break
    return against
