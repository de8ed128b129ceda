"""The first failure as one file that ``replay``, ``reduce`` and ``explain`` take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megamoe.cases.recipes import forward_problem
from megamoe.cases.stored import StoredProblem, to_bytes
from megamoe.fuzz.draw import FuzzCase
from megamoe.golden import write_atomically
from megamoe.judge import Verdict
from megamoe.reduce import Passes, keep, reduce
from megamoe.spec.problem import Problem
from megamoe.suite.next_command import OUTLIVES
from megamoe.worker.session import Session


@dataclass(frozen=True)
class Remains:
    """The remains of a failure: its problem, and its file."""

    problem: Problem
    path: Path
    about: dict[str, Any]
    verdict: Verdict | None = None
    """The verdict on the reduced file after it was read back; None if the problem is whole."""
    note: str = ""
    """The reason why the problem is whole."""
    passes: bool = False
    """Whether the whole problem passes in a fresh process: an earlier one has spoiled it."""
    causes: Any = None
    """As :data:`FindCauses` gives it."""


FindCauses = Callable[[Session, Problem, Verdict, float], Any]
"""Looks for the causes of a whole problem's verdict, before the problem is small: an object with
``lines``, ``text`` and ``about``. The last argument: the seconds for a call of the backend."""


def store(case: FuzzCase, verdict: Verdict, out: Path, seed: int, identity: Any) -> Remains:
    """Write the whole problem to ``out``."""
    problem = forward_problem(case)
    about = {
        "fuzz": {"seed": seed, "number": case.number, "profile": case.profile},
        "backend": identity.name, "accumulator": identity.accumulator,
        "contract": identity.contract, "failure": verdict.reason[:500],
    }  # fmt: skip
    remains = Remains(problem, out, about, note="it is the whole problem: the run was stopped")
    _write(remains)
    return remains


def _write(remains: Remains) -> None:
    write_atomically(remains.path, to_bytes(StoredProblem(remains.problem, {}, remains.about)))


def shrink(
    remains: Remains, session: Session, seconds: float, timeout: float, log: Callable[[str], None],
    find: FindCauses | None = None,
) -> Remains:  # fmt: skip
    """Reduce the problem within ``seconds`` in a ``session`` of a fresh process, and replace its
    file by the result, which has the causes that ``find`` reads from the whole problem. Where it
    passes there or does not hold still, the file has the whole problem."""
    about, causes = remains.about, None
    try:
        r = reduce(session, remains.problem, seconds, log=log, timeout=timeout)
        if find is not None and r.original is not None and r.original.status == "fail":
            causes = find(session, remains.problem, r.original, timeout)
            name = "problem {number} of seed {seed}".format(**about["fuzz"])
            about = {**about, "reduced_from": name, **causes.about()}
        verdict, _ = keep(r, remains.path, about, timeout)
    except Passes:
        note = f"it is the whole problem, which passes in a fresh process: {OUTLIVES}"
        return replace(remains, note=note, passes=True)
    except ValueError as error:  # it does not hold still, or the worker is gone
        _write(remains)  # a smaller one may have been written
        return replace(remains, note=f"it is the whole problem: {error}")
    return replace(
        remains, problem=r.problem, about=about, verdict=verdict, note="", causes=causes
    )  # fmt: skip
