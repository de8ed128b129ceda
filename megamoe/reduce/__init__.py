"""``megamoe reduce``: make a failing problem small while it still fails in the same way.

Tokens first, since the oracle's time goes with them, then slots, experts, I and H in blocks of
128, over again until nothing moves, then the values. Each try runs the backend and is judged by
the oracle, as ``megamoe replay`` would; so whatever is left fails for that command too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megamoe.cases.stored import StoredProblem, load, to_bytes
from megamoe.golden import StoredGolden, write_atomically
from megamoe.judge import Verdict
from megamoe.reduce import steps
from megamoe.reduce.core import (
    LEAST_SECONDS,
    Log,
    Passes,
    ReduceError,
    Reduction,
    start,
)
from megamoe.reduce.failure import Failure
from megamoe.spec.problem import Problem
from megamoe.suite.at_hand import judge
from megamoe.suite.runner import TIMEOUT
from megamoe.worker.client import Worker
from megamoe.worker.session import Session

_STEPS = (
    ("guess", steps.guess), ("I", steps.intermediate), ("H", steps.hidden),
    ("slots", steps.slots), ("experts", steps.experts), ("tokens", steps.tokens),
)  # fmt: skip
"""The order of the steps. If several slots or experts are needed, a try costs least once I and H
are small."""


def reduce(
    session: Session, problem: Problem, seconds: float = 100.0,
    golden: StoredGolden | None = None, log: Log = lambda line: None, timeout: float = TIMEOUT,
    watch: Callable[[Reduction], None] = lambda reduction: None,
) -> Reduction:  # fmt: skip
    """Shrink ``problem`` (CPU tensors) for at most about ``seconds`` more than its first run; of a
    hang that run and the last one count too.

    ``log`` takes a line for each step; ``watch`` gets the reduction before each try.
    """
    start_time = time.perf_counter()
    timeout = min(timeout, limit_of(seconds))
    problem, failure, verdict = start(session, problem, golden, timeout)
    log(f"fails: {failure}")
    r = Reduction(
        session, problem, failure, verdict, timeout, timeout, log=log, watch=watch,
        accumulator=session.identity.accumulator, original=verdict,
    )  # fmt: skip
    r.deadline = time.perf_counter() + seconds
    if failure.is_hang:
        r.after_hangs(seconds)
        # The last try may begin just before, and the file is tried after it.
        r.deadline = start_time + seconds - r.timeout - timeout
    # Repeat the failure through the path of every try, and refuse one that does not repeat. A try
    # with a token fewer is a repeat; so the whole is tried again only if no token can go.
    steps.tokens(r)
    if r.problem is problem and not r.take(problem, always=True):
        raise ReduceError(
            f"backend {session.identity.name} failed once ({failure}), then not again on the same "
            "input: it is not deterministic, or depends on what ran before; `megamoe check "
            "--backend B --case 'property/*'` judges that"
        )
    r.say("tokens")
    size = None
    while size != _size(r.problem) and not r.is_late():
        size = _size(r.problem)
        for name, step in _STEPS:
            before = _size(r.problem)
            step(r)
            if _size(r.problem) != before:
                r.say(name)
    steps.values(r)
    r.say("values")
    if r.is_late():
        log(f"stopped after {seconds:g} s; give it more with --seconds")
    return r


def limit_of(seconds: float) -> float:
    """Seconds for the calls of the whole problem and of the file where ``seconds`` are for all: two
    hangs leave half of them to the tries."""
    return max(LEAST_SECONDS, seconds / 4)


def store(r: Reduction, out: Path, about: Mapping[str, Any]) -> int:
    """Write the reduced problem to ``out``, untried; its bytes. ``about``: the origin."""
    failure = str(Failure.of(r.verdict) or r.failure)
    metadata = {**about, "accumulator": r.accumulator, "failure": failure}
    content = to_bytes(StoredProblem(r.problem, {}, metadata))
    write_atomically(out, content)
    return len(content)


def keep(
    r: Reduction, out: Path, about: Mapping[str, Any], timeout: float = TIMEOUT
) -> tuple[Verdict, int]:
    """Write the reduced problem to ``out``; returns the file's verdict, read back, and its bytes.

    ``about``: the origin. Raises a ``ValueError`` if the file fails in another way.
    """
    size = store(r, out, about)
    # The file is the result, so the file itself is tried last, as `megamoe replay` tries it: where
    # no earlier try has left anything behind.
    if isinstance(r.session, Worker):
        r.session.end()
    verdict, _ = judge(load(out).problem, r.session, out.stem, timeout=min(timeout, r.limit))
    if Failure.of(verdict) != r.failure:
        raise ValueError(
            f"{out} is written, but does not fail in the same way in a fresh process; the backend "
            "is not deterministic, or depends on what ran before: `megamoe check --backend B "
            "--case 'property/*'` judges that"
        )
    return verdict, size


def _size(p: Problem) -> tuple[int, ...]:
    return p.num_tokens, p.top_k, p.num_experts, p.intermediate_size, p.hidden_size


__all__ = ["Failure", "Passes", "ReduceError", "Reduction", "keep", "reduce", "store"]
