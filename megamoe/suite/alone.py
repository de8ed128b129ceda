"""Reds that run again at the end of a run, each alone in a fresh process.

A red that passes there depends on an earlier call: something outlives a call in the backend. That
is another search than the one for a wrong step, so a run says it before it names the next command.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from megamoe.cases import Case
from megamoe.judge import BAD, HANG, Symptom, Verdict, symptoms
from megamoe.suite.judges import Desk, Judges
from megamoe.suite.next_command import FORWARDS, chosen_of, own_fault
from megamoe.suite.telling import size
from megamoe.worker.pool import Pool
from megamoe.worker.session import Launch, WorkerError

if TYPE_CHECKING:
    from megamoe.suite.runner import Runner

SYMPTOMS: Final = 3
"""Symptoms of which a red runs again, the most frequent first."""
SECONDS: Final = 20.0
"""No further red starts after this time."""
LONGEST: Final = 10.0
"""A red that took longer does not run again."""


def again(
    launch: Launch, root: Path, timeout: float, verdicts: Sequence[Verdict], cases: Sequence[Case]
) -> dict[str, str]:
    """The status of one red of each symptom, by its id, where it runs alone in a fresh process;
    where it passes there, also of the smallest red of the symptom, since ``reduce --after`` takes
    least time for that one.

    Empty where no red can depend on an earlier call: no case of its sort has passed.
    """
    started, out = time.perf_counter(), dict[str, str]()
    left = worth(verdicts, cases)
    while left and time.perf_counter() - started <= SECONDS:
        case = left.pop(0)
        try:
            out[case.id] = _status(launch, root, timeout, case)
        except (WorkerError, OSError):  # the run itself has said what is to be said
            break
        least = smallest_alike(case, verdicts, cases)
        if out[case.id] == "pass" and least.id not in out:
            left.insert(0, least)
    return out


def worth(verdicts: Sequence[Verdict], cases: Sequence[Case]) -> list[Case]:
    """The reds that are to run again: those that the next command would name."""
    known = {case.id: case for case in cases}
    passed = {_sort(v.kind) for v in verdicts if v.status == "pass"}
    found = symptoms([v.to_dict() for v in verdicts if v.status in BAD])
    named = [_named(symptom, known) for symptom in found[:SYMPTOMS]]
    return [
        known[red["id"]]
        for red in named
        if red["id"] in known and _sort(red["kind"]) in passed and _can_tell(red)
    ]


def _can_tell(red: Mapping[str, Any]) -> bool:
    """Whether another run of a red takes little, and may end in another way."""
    return red["seconds"] <= LONGEST and HANG not in red["reason"] and not own_fault(red)


def smallest_alike(case: Case, verdicts: Sequence[Verdict], cases: Sequence[Case]) -> Case:
    """The smallest red with the symptom of the red ``case``: itself, if there is none smaller."""
    known = {one.id: one for one in cases}
    found = symptoms([v.to_dict() for v in verdicts if v.status in BAD])
    (alike,) = (s.cases for s in found if any(red["id"] == case.id for red in s.cases))
    some = [known[red["id"]] for red in alike if red["id"] in known and _can_tell(red)]
    return min([case, *some], key=size)


def _named(symptom: Symptom, known: Mapping[str, Case]) -> Mapping[str, Any]:
    """The red of a symptom that the next command names; else the fastest."""
    chosen = chosen_of(symptom, known)
    fastest = min(symptom.cases, key=lambda red: red["seconds"])
    return next((red for red in symptom.cases if red["id"] == chosen), fastest)


def _sort(kind: str) -> str:
    """Kinds that call the same method are of one sort."""
    return FORWARDS[0] if kind in FORWARDS else kind


def _status(launch: Launch, root: Path, timeout: float, case: Case) -> str:
    found: list[Any] = []
    with (
        Pool(launch, 1) as pool,
        Judges(1, Desk(pool.address, root, timeout, _judged, 1)) as bench,
    ):
        bench.run([case], lambda case: None, lambda case, result: found.append(result))
    return "error" if isinstance(found[0], Exception) else str(found[0])


def _judged(runner: Runner, case: Case) -> str:
    """A judge's step: the status alone."""
    runner.brief = True
    return runner.run(case).status
