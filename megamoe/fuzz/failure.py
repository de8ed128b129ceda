"""The first failure as one file that ``replay``, ``reduce`` and ``explain`` take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megamoe.cases.recipes import forward_problem
from megamoe.cases.stored import Stored, to_bytes
from megamoe.fuzz.draw import Drawn
from megamoe.golden import write_atomically
from megamoe.judge import Verdict
from megamoe.reduce import Passes, keep, reduce
from megamoe.spec.problem import Problem
from megamoe.suite.next_command import OUTLIVES
from megamoe.worker.session import Session


@dataclass(frozen=True)
class Left:
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


def store(drawn: Drawn, verdict: Verdict, out: Path, seed: int, identity: Any) -> Left:
    """Write the whole problem to ``out``."""
    problem = forward_problem(drawn)
    about = {
        "fuzz": {"seed": seed, "number": drawn.number, "profile": drawn.profile},
        "backend": identity.name, "accumulator": identity.accumulator,
        "contract": identity.contract, "failure": verdict.reason[:500],
    }  # fmt: skip
    left = Left(problem, out, about, note="it is the whole problem: the run was stopped")
    _write(left)
    return left


def _write(left: Left) -> None:
    write_atomically(left.path, to_bytes(Stored(left.problem, {}, left.about)))


def shrink(
    left: Left, session: Session, seconds: float, timeout: float, log: Callable[[str], None],
    find: FindCauses | None = None,
) -> Left:  # fmt: skip
    """Reduce the problem within ``seconds`` in a ``session`` of a fresh process, and replace its
    file by the result, which has the causes that ``find`` reads from the whole problem. Where it
    passes there or does not hold still, the file has the whole problem."""
    about, causes = left.about, None
    try:
        r = reduce(session, left.problem, seconds, log=log, timeout=timeout)
        if find is not None and r.original is not None and r.original.status == "fail":
            causes = find(session, left.problem, r.original, timeout)
            name = "problem {number} of seed {seed}".format(**about["fuzz"])
            about = {**about, "reduced_from": name, **causes.about()}
        verdict, _ = keep(r, left.path, about, timeout)
    except Passes:
        note = f"it is the whole problem, which passes in a fresh process: {OUTLIVES}"
        return replace(left, note=note, passes=True)
    except ValueError as error:  # it does not hold still, or the worker is gone
        _write(left)  # a smaller one may have been written
        return replace(left, note=f"it is the whole problem: {error}")
    return replace(
        left, problem=r.problem, about=about, verdict=verdict, note="", causes=causes
    )  # fmt: skip
