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
from megamoe.suite.next_command import FORWARDS, choice_of
from megamoe.suite.origins import own_fault
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
    start, out = time.perf_counter(), dict[str, str]()
    queue = worth(verdicts, cases)
    while queue and time.perf_counter() - start <= SECONDS:
        case = queue.pop(0)
        try:
            out[case.id] = _status(launch, root, timeout, case)
        except (WorkerError, OSError):  # the run itself has said what is to be said
            break
        least = smallest_alike(case, verdicts, cases)
        if out[case.id] == "pass" and least.id not in out:
            queue.insert(0, least)
    return out


def worth(verdicts: Sequence[Verdict], cases: Sequence[Case]) -> list[Case]:
    """The reds that are to run again: those that the next command would name."""
    by_id = {case.id: case for case in cases}
    sorts = {_sort(v.kind) for v in verdicts if v.status == "pass"}
    groups = symptoms([v.to_dict() for v in verdicts if v.status in BAD])
    reds = [_red_of(symptom, by_id) for symptom in groups[:SYMPTOMS]]
    return [
        by_id[red["id"]]
        for red in reds
        if red["id"] in by_id and _sort(red["kind"]) in sorts and _can_tell(red)
    ]


def _can_tell(red: Mapping[str, Any]) -> bool:
    """Whether another run of a red takes little, and may end in another way."""
    return red["seconds"] <= LONGEST and HANG not in red["reason"] and not own_fault(red)


def smallest_alike(case: Case, verdicts: Sequence[Verdict], cases: Sequence[Case]) -> Case:
    """The smallest red with the symptom of the red ``case``: itself, if there is none smaller."""
    by_id = {one.id: one for one in cases}
    groups = symptoms([v.to_dict() for v in verdicts if v.status in BAD])
    (alike,) = (s.cases for s in groups if any(red["id"] == case.id for red in s.cases))
    some = [by_id[red["id"]] for red in alike if red["id"] in by_id and _can_tell(red)]
    return min([case, *some], key=size)


def _red_of(symptom: Symptom, by_id: Mapping[str, Case]) -> Mapping[str, Any]:
    """The red of a symptom that the next command names; else the fastest."""
    choice = choice_of(symptom, by_id)
    fastest = min(symptom.cases, key=lambda red: red["seconds"])
    return next((red for red in symptom.cases if red["id"] == choice), fastest)


def _sort(kind: str) -> str:
    """Kinds that call the same method are of one sort."""
    return FORWARDS[0] if kind in FORWARDS else kind


def _status(launch: Launch, root: Path, timeout: float, case: Case) -> str:
    results: list[Any] = []
    with (
        Pool(launch, 1) as pool,
        Judges(1, Desk(pool.address, root, timeout, _judge_status, 1)) as bench,
    ):
        bench.run([case], lambda case: None, lambda case, result: results.append(result))
    return "error" if isinstance(results[0], Exception) else str(results[0])


def _judge_status(runner: Runner, case: Case) -> str:
    """A judge's step: the status alone."""
    runner.brief = True
    return runner.run(case).status
