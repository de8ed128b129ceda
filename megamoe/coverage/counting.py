"""The count of the classes that cases enter, over a few processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from time import process_time
from typing import Final

import torch

from megamoe.cases import Case
from megamoe.coverage import kinds
from megamoe.coverage.calls import Call
from megamoe.coverage.dimension import Tally
from megamoe.coverage.places import SHALLOW, calls, places
from megamoe.coverage.values import values
from megamoe.spec.contract import NEWEST, REVISIONS, Contract
from megamoe.spec.problem import Problem

OnCase = Callable[[Case], None]
Classes = dict[str, set[str]]
Timing = tuple[str, Classes, float]
PIECE: Final = 8
"""Cases that a process takes at a time."""


def classes_of(case: Case, contract: Contract = NEWEST) -> Classes:
    """Dimension -> classes that one case enters. Raises the errors of its recipe."""
    other = {"staging": kinds.staging, "eplb": kinds.eplb, "layout": kinds.layout,
             "errors": kinds.errors}.get(case.kind)  # fmt: skip
    if other is not None:
        return other(case, contract)
    call = Call.of_case(case)
    out = {**values(call, contract), **places(call, case.params)}
    return out | calls(call.problem, case.params.get("law"), is_full=len(call.ids) == call.capacity)


def shallow(case: Case) -> Classes:
    """The classes of :data:`~megamoe.coverage.places.SHALLOW` that one forward or property case
    enters."""
    classes = places(Call.of_case(case, shallow=True), case.params)
    return {name: classes[name] for name in SHALLOW if name in classes}


def classes_of_problem(problem: Problem, contract: Contract = NEWEST) -> Classes:
    """The same of a problem at hand, all its rows judged."""
    call = Call.of(problem)
    return {**values(call, contract), **places(call, {}), **calls(problem, None)}


@dataclass
class CaseClasses:
    """The classes of each case, in the order of the cases."""

    classes: dict[str, Classes]
    """Classes by case id."""
    seconds: dict[str, float]
    """Seconds of the counting of a case."""

    @property
    def tally(self) -> Tally:
        """All of it together."""
        out = Tally()
        for name, classes in self.classes.items():
            out.add(name, classes)
        return out


def count(
    cases: Sequence[Case], contract: Contract = NEWEST, jobs: int = 1, on_case: OnCase | None = None
) -> CaseClasses:
    """The classes that the cases enter; ``on_case`` is called after each case."""
    by_id = {case.id: case for case in cases}
    results = {}
    for one in _each(cases, contract, jobs):
        results[one[0]] = one[1:]
        if on_case is not None:
            on_case(by_id[one[0]])
    return CaseClasses({n: results[n][0] for n in by_id}, {n: results[n][1] for n in by_id})


def _each(cases: Sequence[Case], contract: Contract, jobs: int) -> Iterator[Timing]:
    if jobs <= 1:
        for case in cases:
            yield _timing(case, contract)
        return
    dearest = sorted(cases, key=_cost, reverse=True)
    # Each piece has a dear case and cheap ones.
    pieces = [dearest[at :: -(-len(cases) // PIECE)] for at in range(-(-len(cases) // PIECE))]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,)) as pool:
        parts = [pool.submit(_piece, piece, contract.revision) for piece in pieces]
        for part in as_completed(parts):
            yield from part.result()


def _piece(cases: Sequence[Case], revision: str) -> list[Timing]:
    return [_timing(case, REVISIONS[revision]) for case in cases]


def _timing(case: Case, contract: Contract) -> Timing:
    start = process_time()
    classes = classes_of(case, contract)
    return case.id, classes, round(process_time() - start, 3)


def _cost(case: Case) -> int:
    p = case.params
    return int(p.get("tokens", 1)) * int(p.get("hidden", 1)) * int(p.get("intermediate", 1))
