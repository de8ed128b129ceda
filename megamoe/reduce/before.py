"""``megamoe reduce CASE --after``: the earlier case after which a case fails that passes alone.

Each try is a process of its own: the earlier cases run there, then the case. So nothing is left of
another try.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megamoe.cases import Case, kind_of, shards
from megamoe.cases.laws import MODES
from megamoe.cases.needs import lacking
from megamoe.golden import Store, make, regenerate
from megamoe.judge import BAD, Verdict
from megamoe.printable import quantity
from megamoe.reduce.core import Log, ReduceError, minimal
from megamoe.reduce.suspects import eligible, groups, likely, nearest
from megamoe.spec.contract import contract
from megamoe.suite.runner import Runner
from megamoe.worker.client import Worker
from megamoe.worker.outcomes import NoOutput
from megamoe.worker.session import Identity, Launch

Watch = Callable[[str], None]
"""Takes the place of the search within a try, for a person who waits."""


@dataclass(frozen=True)
class After:
    """What makes a case red."""

    earlier: list[Case]
    """Earlier cases, in their order."""
    verdict: Verdict
    """Of the case after them."""
    is_least: bool = True
    """Whether none of several can go, and none alone is enough; False where the time was over
    before that was tried."""


class _Late(Exception):
    """The time is over."""


@dataclass
class Search:
    """Tries of one case after others."""

    launch: Launch
    root: Path
    case: Case
    timeout: float
    seconds: float
    """Seconds for all tries."""
    log: Log
    watch: Watch = lambda text: None
    tries: int = 0
    _until: float = float("inf")
    _best: After | None = None
    """The fewest cases so far after which the case was red."""
    _earlier_ids: set[str] = field(default_factory=set)
    """The earlier cases of all groups that were begun."""

    def find(
        self, cases: Sequence[Case], among: Sequence[Case] = (), first: Sequence[Case] = ()
    ) -> After:
        """The fewest of ``cases`` after which the case fails; of ``among`` alone, in this order,
        where there are any. Each of ``first`` is tried before all others. Where the time is over
        before they are the fewest, those that are left. :class:`ReduceError` if the case fails
        alone too, or after none of them."""
        self._until = time.perf_counter() + self.seconds
        identity, alone = self._try([])
        if alone.status in BAD:
            raise ReduceError(
                f"{self.case.id} is red alone too, so no earlier case is needed ({alone.reason}); "
                "leave out --after"
            )
        if alone.status != "pass":
            raise ReduceError(f"{self.case.id} is not judged: {alone.status}, {alone.reason}")
        self.log(
            f"{self.case.id} passes alone; the search for an earlier case takes at most about "
            f"{self.seconds:g} s"
        )
        try:
            result = self._after_first(first) or self._after_any(cases, among, identity)
        except _Late:
            result = self._best and replace(self._best, is_least=len(self._best.earlier) == 1)
        if result is None:
            raise ReduceError(self._nothing(bool(among)))
        return result

    def _nothing(self, is_among: bool) -> str:
        """That no earlier case was found, and what to do."""
        before = quantity(len(self._earlier_ids), "earlier case")
        tries = quantity(self.tries, "process", "processes")
        text = f"{self.case.id} passes alone, and was not red in {tries} with {before}"
        if self._is_late():
            return (
                f"{text}; the time is over and not all was tried: `--seconds "
                f"{more_seconds(self.seconds):g}` goes further"
            )
        if is_among:
            return f"{text}; without --among it is tried after others"
        return f"{text}; `megamoe check` once more shows whether it is red there each time"

    def _after_first(self, first: Sequence[Case]) -> After | None:
        if not first:
            return None
        self.log(f"trying it after {quantity(len(first), 'case')} of --first")
        return self._after_group(list(first))

    def _after_any(
        self, cases: Sequence[Case], among: Sequence[Case], identity: Identity
    ) -> After | None:
        if among:
            for one in among:
                if why := lacking(one, identity):
                    raise ReduceError(f"--among: {one.id} cannot run, for {why}; leave it out")
            self.log(f"trying it after {quantity(len(among), 'case')} of --among")
            return self._after_group(list(among))
        seconds = shards.durations(self.root)
        others = eligible(self.case, cases, identity, seconds)
        self.log("trying it after itself")
        result = self._after_all([self.case])
        near = nearest(self.case, others, seconds)
        if result is None and near:
            self.log(f"trying it after {quantity(len(near), 'case')} before it in a run")
            result = self._after_group(near[::-1])
        some = [one for one in likely(self.case, others, seconds) if one not in near]
        if result is None and some:
            self.log(f"trying it after {quantity(len(some), 'case')} as large or of its H, I and "
                     "top-k")  # fmt: skip
            result = self._after_group(some[::-1])
        for what, group in groups(self.case, others):
            if result is not None:
                break
            self.log(f"trying it after {what}")
            rest = [one for one in group if one.id not in self._earlier_ids]
            result = self._after_all(group) or self._after_each(rest)
        return result

    def _after_group(self, group: list[Case]) -> After | None:
        """After all of them once, and then after each, the last one first. All of them come first
        because the case itself may repair the state: a cache that keeps its first entry is right
        for good once the case has filled it."""
        return self._after_all(group) or self._after_each(group[::-1])

    def _is_late(self) -> bool:
        return time.perf_counter() > self._until

    def _in_time(self) -> None:
        if self._is_late():
            raise _Late

    def _after_all(self, group: list[Case]) -> After | None:
        """The fewest of the group after which it fails, if it fails after the whole group."""
        return self._fewest(group) if self._fails(group) else None

    def _after_each(self, group: Sequence[Case]) -> After | None:
        """The same where only the call just before counts: it is judged after each of the group,
        in one process. What fails there must fail again after a part of these cases; if it does
        not, a new process goes on with the rest."""
        while group:
            at = self._first_red(group)
            if at is None:
                return None
            if self._fails(group[at : at + 1]):
                return self._best
            if at and self._fails(group[: at + 1]):
                return self._fewest(group[: at + 1])
            group = group[at + 1 :]
        return None

    def _first_red(self, group: Sequence[Case]) -> int | None:
        """The place in the group after which the case is first red, in one process."""
        self.tries += 1
        with Worker(self.launch) as worker:
            runner = self._runner(worker)
            for at, one in enumerate(group):
                self._next(at, len(group))
                self._earlier_ids.add(one.id)
                _call(runner, one)
                if runner.run(self.case).status in BAD:
                    return at
        return None

    def _fewest(self, group: Sequence[Case]) -> After | None:
        """A part of the group, after which it fails, of which no single case can go."""

        def fails(part: list[int]) -> bool:
            return self._fails([group[i] for i in part])

        minimal(range(len(group)), fails, late=lambda: False)  # a try says when the time is over
        return self._best

    def _fails(self, some: Sequence[Case]) -> bool:
        """Whether the case fails after these, in a fresh process; then they are the best so far."""
        _, verdict = self._try(some)
        if verdict.status in BAD:
            self._best = After(list(some), verdict)
        return verdict.status in BAD

    def _try(self, earlier: Sequence[Case]) -> tuple[Identity, Verdict]:
        """The verdict of the case after ``earlier``, in a fresh process."""
        self.tries += 1
        with Worker(self.launch) as worker:
            runner = self._runner(worker)
            for at, one in enumerate(earlier):
                self._next(at, len(earlier))
                self._earlier_ids.add(one.id)
                _call(runner, one)
            return worker.identity, runner.run(self.case)

    def _next(self, at: int, count: int) -> None:
        """Before each earlier case: stop where the time is over, and tell who waits."""
        self._in_time()
        best = "" if self._best is None else f"; red after {len(self._best.earlier)} together"
        self.watch(f"process {self.tries}, earlier case {at + 1} of {count}{best}")

    def _runner(self, worker: Worker) -> Runner:
        store = Store(self.root, make, contract(worker.identity.contract))
        runner = Runner(worker, store, timeout=self.timeout)
        runner.brief = True
        return runner


def more_seconds(seconds: float) -> float:
    """Seconds for a search that goes further than one of ``seconds``."""
    return 3 * seconds


def _call(runner: Runner, case: Case) -> None:
    """The calls of a case, judged only where they cannot be had otherwise."""
    kind = kind_of(case.kind)
    # The calls of a law of modes have a process of their own, so its ordinary call is all that
    # can leave something behind here.
    has_more = kind.judge is not None and case.params.get("law") not in MODES
    if has_more or kind.ask is None:
        runner.run(case)
        return
    try:
        with runner.caller() as call:
            kind.ask(call, case, regenerate(case))
    except NoOutput:
        return  # what it leaves behind is the question, not what it returns
