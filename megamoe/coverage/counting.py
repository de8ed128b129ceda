"""Counting what cases enter, over a few processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

import torch

from megamoe.cases import Case
from megamoe.coverage import kinds
from megamoe.coverage.calls import Call
from megamoe.coverage.dimension import Seen
from megamoe.coverage.places import calls, places
from megamoe.coverage.values import values
from megamoe.spec.contract import NEWEST, REVISIONS, Contract
from megamoe.spec.problem import Problem

Done = Callable[[Case], None]
Entered = dict[str, set[str]]
PIECE = 8
"""Cases that a process takes at a time."""


def entered(case: Case, contract: Contract = NEWEST) -> Entered:
    """Dimension -> classes that one case enters. Raises what its recipe raises."""
    other = {"staging": kinds.staging, "eplb": kinds.eplb, "layout": kinds.layout,
             "errors": kinds.errors}.get(case.kind)  # fmt: skip
    if other is not None:
        return other(case, contract)
    call = Call.of_case(case)
    made = {**values(call, contract), **places(call, case.params)}
    return made | calls(call.problem, case.params.get("law"))


def entered_by(problem: Problem, contract: Contract = NEWEST) -> Entered:
    """The same of a problem at hand, all its rows judged."""
    call = Call.of(problem)
    return {**values(call, contract), **places(call, {}), **calls(problem, None)}


def count(
    cases: Sequence[Case], contract: Contract = NEWEST, jobs: int = 1, done: Done | None = None
) -> Seen:
    """What the cases enter, all of them; ``done`` is called after each."""
    seen = {case.id: dict[str, set[str]]() for case in cases}
    by_id = {case.id: case for case in cases}
    for name, found in _each(cases, contract, jobs):
        seen[name] = found
        if done is not None:
            done(by_id[name])
    out = Seen()
    for name, found in seen.items():  # in the order of the cases, however many processes
        out.add(name, found)
    return out


def _each(cases: Sequence[Case], contract: Contract, jobs: int) -> Any:
    if jobs <= 1:
        for case in cases:
            yield case.id, entered(case, contract)
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


def _piece(cases: Sequence[Case], revision: str) -> list[tuple[str, Entered]]:
    return [(case.id, entered(case, REVISIONS[revision])) for case in cases]


def _cost(case: Case) -> int:
    p = case.params
    return int(p.get("tokens", 1)) * int(p.get("hidden", 1)) * int(p.get("intermediate", 1))
