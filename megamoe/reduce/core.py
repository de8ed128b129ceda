"""A reduction in progress, and the judgement of a try."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch

from megamoe.backends.eager import EagerBackend
from megamoe.cases.stored import capacity_for
from megamoe.golden import StoredGolden, rows_of
from megamoe.judge import Verdict, forward_bits
from megamoe.printable import quantity
from megamoe.reduce.failure import Failure
from megamoe.spec.contract import CONTRACTS
from megamoe.spec.forms import BF16
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import TENSORS
from megamoe.suite.at_hand import GoldenNow, judge, judge_error, judge_output, run
from megamoe.suite.runner import TIMEOUT
from megamoe.worker.session import Session

LEAST_SECONDS: Final = 2.0
"""Time for the call of a try after a hang, at least."""
RIGHT_CALLS: Final = 5.0
"""A try is a hang from so many times the slowest right call on."""
BATCHES: Final = (1, 3, 12)
"""Tokens judged at a time, the most suspicious first; then the rest at once."""
Log = Callable[[str], None]


class ReduceError(ValueError):
    """There is nothing to reduce, or it does not hold still; one line."""


class Passes(ReduceError):
    """The backend does not fail the problem."""


@dataclass
class Reduction:
    """A problem on its way down."""

    session: Session
    problem: Problem
    failure: Failure
    verdict: Verdict
    timeout: float = TIMEOUT
    """Seconds for the calls of a try."""
    limit: float = TIMEOUT
    """Seconds that ``timeout`` may grow to."""
    deadline: float = float("inf")
    log: Log = lambda line: None
    watch: Callable[[Reduction], None] = lambda reduction: None
    """Is called before each try."""
    tries: int = 0
    accumulator: str = ""
    """The class of the backend, known also where its process is gone."""
    original: Verdict | None = None
    """The verdict of the whole problem, from which the reduction started."""

    def is_late(self) -> bool:
        return time.perf_counter() > self.deadline

    def _count_try(self) -> None:
        self.tries += 1
        self.watch(self)

    def take(self, candidate: Problem, always: bool = False) -> bool:
        """Whether ``candidate`` fails in the same way; then it becomes the problem.

        After the deadline nothing is tried any more, unless ``always``.
        """
        if self.is_late() and not always:
            return False
        self._count_try()
        verdict = self._verdict(candidate)
        if Failure.of(verdict) != self.failure:
            return False
        self.problem, self.verdict = candidate, verdict
        return True

    def _verdict(self, candidate: Problem) -> Verdict:
        """The verdict of the backend. Of a hang only whether it hangs: no oracle is asked."""
        if not self.failure.is_hang:
            return judge(candidate, self.session, "reduced", timeout=self.timeout)[0]
        start_time = time.perf_counter()
        try:
            run(candidate, self.session, self.timeout)
        except Exception as error:
            return judge_error(candidate, self.session, error, "reduced")
        took = time.perf_counter() - start_time
        self.timeout = min(self.limit, max(self.timeout, RIGHT_CALLS * took))
        return Verdict("forward/reduced", "forward", "pass")

    def after_hangs(self, seconds: float) -> None:
        """Give the calls of a try less time: a multiple of what a right call takes, for which
        ``eager`` is the first measure."""
        start_time = time.perf_counter()
        EagerBackend(CONTRACTS[self.session.identity.contract]).forward(self.problem)
        right = time.perf_counter() - start_time
        self.timeout = min(self.limit, max(LEAST_SECONDS, RIGHT_CALLS * right))
        self.log(
            f"to keep to --seconds {seconds:g}: the whole problem and the file have "
            f"{self.limit:g} s for a result, a try {self.timeout:.0f} s"
        )

    def keep(
        self, items: Sequence[int], make: Callable[[Problem, list[int]], Problem],
        guess: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """The fewest ``items`` with which ``make(problem, items)`` still fails this way."""
        before = self.problem
        alone = [*guess, *(items if len(items) <= 8 else ())]
        guesses = [[only] for only in dict.fromkeys(alone) if only in items]
        minimal(items, lambda part: self.take(make(before, part)), self.is_late, guesses)

    def golden_of(self, problem: Problem) -> GoldenNow:
        """The oracle's answer for the backend's class."""
        return GoldenNow.of(problem, self.session)

    def row_fails(self, candidate: Problem, row: int, golden: GoldenNow) -> bool:
        """Whether this row of ``candidate`` fails in the same way, regardless of the other rows."""
        self._count_try()
        try:
            actual = run(candidate, self.session, self.timeout)
        except Exception:
            return False
        output = _tensors(actual, [row])
        part, identity = rows_of(candidate, [row]), self.session.identity
        contract = CONTRACTS[identity.contract]
        verdict = judge_output(part, output, identity.accumulator, contract, golden=golden)
        return Failure.of(verdict) == self.failure

    def with_a_token_fewer(self) -> str:
        """The status of the problem without one token that is not the worst; empty where it has no
        second token, or where the time did not suffice to look for fewer."""
        worst = self.verdict.worst
        mine = None if worst is None else worst.token
        rest = [row for row in range(self.problem.num_tokens) if row != mine]
        if self.problem.num_tokens < 2 or self.is_late():
            return ""
        rows = sorted({*rest[1:], *(() if mine is None else (mine,))})
        candidate = replace(rows_of(self.problem, rows), max_num_tokens=capacity_for(len(rows)))
        return self._verdict(candidate).status

    def say(self, what: str) -> None:
        p = self.problem
        self.log(
            f"{what:<8} {quantity(p.num_tokens, 'token')}, {quantity(p.num_experts, 'expert')}, "
            f"top-{p.top_k}, H {p.hidden_size}, I {p.intermediate_size} "
            f"({quantity(self.tries, 'try', 'tries')})"
        )


def start(
    session: Session, problem: Problem, golden: StoredGolden | None = None,
    timeout: float = TIMEOUT,
) -> tuple[Problem, Failure, Verdict]:  # fmt: skip
    """The failure of the backend on ``problem``. :class:`ReduceError` if there is none, or if it
    does not repeat.

    Without a ``golden`` the oracle would have to answer for all tokens. So the tokens that lie
    farthest from the ``eager`` backend's are judged first.
    """
    if golden is not None:
        verdict, _ = judge(problem, session, "case", golden, timeout)
    else:
        verdict = _scout(session, problem, timeout)
    failure = Failure.of(verdict)
    if failure is None:
        reason = f": {verdict.reason}" if verdict.reason else ""
        raise Passes(
            f"the backend does not fail this ({verdict.status}{reason}); nothing to reduce"
        )
    return problem, failure, verdict


def _scout(session: Session, problem: Problem, timeout: float) -> Verdict:
    if not problem.num_tokens:
        return judge(problem, session, "case", timeout=timeout)[0]
    try:
        actual = run(problem, session, timeout)
    except Exception as error:  # the runner says it in its own words
        return judge_error(problem, session, error, "case")
    contract = CONTRACTS[session.identity.contract]
    scout = forward_bits(EagerBackend(contract).forward(problem), problem)
    far = np.abs(BF16.key(actual["y"]) - BF16.key(scout["y"])).max(axis=1)
    for name, bits in actual.items():
        if not TENSORS[name].reads_masked:
            differ = bits != scout[name]
            far = far + (differ & (problem.topk_ids.numpy() >= 0)[:, :, None]).sum(axis=(1, 2))
    order = np.argsort(-far, kind="stable").tolist()
    verdict, at = None, 0
    for size in (*BATCHES, len(order)):
        rows = sorted(order[at : at + size])
        at += size
        if not rows:
            break
        output = _tensors(actual, rows)
        verdict = judge_output(
            rows_of(problem, rows), output, session.identity.accumulator, contract
        )
        if Failure.of(verdict):
            return _with_tokens(verdict, rows)
    assert verdict is not None
    return verdict


def _tensors(actual: Mapping[str, Any], rows: Sequence[int]) -> dict[str, torch.Tensor]:
    """Some rows of the bits that a forward showed, as the tensors they were."""
    tensors = {name: torch.from_numpy(bits[list(rows)]) for name, bits in actual.items()}
    tensors["y"] = tensors["y"].view(torch.int16).view(torch.bfloat16)
    return tensors


def _with_tokens(verdict: Verdict, rows: Sequence[int]) -> Verdict:
    """The worst element named by the token of the whole problem."""
    worst = verdict.worst
    if worst is None or worst.token is None:
        return verdict
    return replace(verdict, worst=replace(worst, token=rows[worst.token]))


def minimal(
    items: Sequence[int], fails: Callable[[list[int]], bool], late: Callable[[], bool],
    guesses: Sequence[list[int]] = (),
) -> None:  # fmt: skip
    """Delta debugging: ends where no single one of the ``items`` that are left can go.

    ``fails(part)`` tries a part and remembers it if it fails. ``guesses`` are tried first.
    """
    items = list(items)
    for guess in guesses:
        if len(guess) < len(items) and fails(guess):
            items = list(guess)
            break
    parts = 2
    while len(items) > 1 and not late():
        size = -(-len(items) // parts)
        chunks = [items[i : i + size] for i in range(0, len(items), size)]
        attempts = [*(chunks if len(chunks) > 1 else ())]
        smaller = next((c for c in attempts if fails(c)), None)
        if smaller is not None:
            items, parts = smaller, 2
            continue
        rests = [[i for i in items if i not in c] for c in chunks] if len(chunks) > 2 else []
        rest = next((r for r in rests if fails(r)), None)
        if rest is not None:
            items, parts = rest, max(2, parts - 1)
        elif parts >= len(items):
            return
        else:
            parts = min(len(items), parts * 2)
