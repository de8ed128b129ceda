"""``megamoe reduce CASE --after``: the earlier case after which a case fails that passes alone.

Each try is a process of its own: the earlier cases run there, then the case. So nothing is left of
another try.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from megamoe.cases import SIZES, Case, form_of, kind_of, shards
from megamoe.cases.needs import lacking
from megamoe.golden import Store, make, regenerate
from megamoe.judge import BAD, Verdict
from megamoe.printable import counted
from megamoe.reduce.core import Log, ReduceError, minimal
from megamoe.spec.contract import contract
from megamoe.suite.runner import Runner
from megamoe.worker.client import Worker
from megamoe.worker.outcomes import NoOutput
from megamoe.worker.session import Identity, Launch

SHAPE: Final = ("hidden", "intermediate", "top_k")
"""Sizes by which a kernel chooses its buffers; the number of tokens and experts varies more."""


@dataclass(frozen=True)
class After:
    """What makes a case red."""

    earlier: list[Case]
    """The fewest earlier cases, in their order."""
    verdict: Verdict
    """Of the case after them."""


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
    tries: int = 0
    _until: float = float("inf")

    def find(self, cases: Sequence[Case]) -> After:
        """The fewest of ``cases`` after which the case fails. :class:`ReduceError` if it fails
        alone too, or after none of them."""
        self._until = time.perf_counter() + self.seconds
        identity, alone = self._tried([])
        if alone.status in BAD:
            raise ReduceError(
                f"{self.case.id} is red alone too, so no earlier case is needed ({alone.reason}); "
                "leave out --after"
            )
        if alone.status != "pass":
            raise ReduceError(f"{self.case.id} is not judged: {alone.status}, {alone.reason}")
        self.log(f"{self.case.id} passes alone")
        count = 0
        for what, group in groups(self.case, cases, identity, shards.durations(self.root)):
            if self._is_late():
                break
            count += len(group)
            self.log(f"trying it after {what}")
            found = self._after_all(group) or self._after_each(group)
            if found is not None:
                return found
        raise ReduceError(
            f"{self.case.id} passes alone, and after {counted(count, 'case')}, in "
            f"{counted(self.tries, 'process', 'processes')}; --seconds gives the search more time, "
            "and `megamoe check` once more shows whether it is red there each time"
        )

    def _is_late(self) -> bool:
        return time.perf_counter() > self._until

    def _after_all(self, group: list[Case]) -> After | None:
        """The fewest of the group after which it fails, if it fails after the whole group."""
        _, verdict = self._tried(group)
        if verdict.status not in BAD:
            return None
        return self._fewest(group) or After(group, verdict)

    def _after_each(self, group: list[Case]) -> After | None:
        """The same where only the call just before counts: it is judged after each of the group,
        in one process. What fails there must fail again after a part of these cases."""
        at = self._first_red(group) if len(group) > 1 else None
        if at is None:
            return None
        return self._fewest(group[at : at + 1]) or self._fewest(group[: at + 1])

    def _first_red(self, group: list[Case]) -> int | None:
        """The place in the group after which the case is first red, in one process."""
        self.tries += 1
        with Worker(self.launch) as worker:
            runner = self._runner(worker)
            for at, one in enumerate(group):
                if self._is_late():
                    break
                _call(runner, one)
                if runner.run(self.case).status in BAD:
                    return at
        return None

    def _fewest(self, group: Sequence[Case]) -> After | None:
        """A part of the group of which no single case can go; None if no part fails."""
        found: After | None = None

        def fails(part: list[int]) -> bool:
            nonlocal found
            some = [group[i] for i in part]
            _, verdict = self._tried(some)
            if verdict.status in BAD:
                found = After(some, verdict)
            return verdict.status in BAD

        if len(group) > 1:
            minimal(range(len(group)), fails, self._is_late)
        else:
            fails([0])
        return found

    def _tried(self, earlier: Sequence[Case]) -> tuple[Identity, Verdict]:
        """The verdict of the case after ``earlier``, in a fresh process."""
        self.tries += 1
        with Worker(self.launch) as worker:
            runner = self._runner(worker)
            for one in earlier:
                _call(runner, one)
            return worker.identity, runner.run(self.case)

    def _runner(self, worker: Worker) -> Runner:
        store = Store(self.root, make, contract(worker.identity.contract))
        runner = Runner(worker, store, timeout=self.timeout)
        runner.brief = True
        return runner


def groups(
    case: Case, cases: Sequence[Case], identity: Identity, seconds: dict[str, float]
) -> Iterator[tuple[str, list[Case]]]:
    """Earlier cases to try together, in words and in the order of a run: those that share most
    with ``case`` first, each once. All call the same method."""
    needs = form_of(case.kind).needs
    left = [
        one for one in shards.small_first(cases, seconds)
        if form_of(one.kind).needs == needs and identity.contract in one.revisions
        and seconds.get(one.id, 0.0) <= shards.SMALL_SECONDS
        and one.id != case.id and not lacking(one, identity)
    ]  # fmt: skip
    yield "itself", [case]
    for what, names in (("of all its sizes", SIZES), ("of its H, I and top-k", SHAPE), ("", ())):
        group = [one for one in left if _sizes(one, names) == _sizes(case, names)]
        left = [one for one in left if one not in group]
        if group:
            yield f"{counted(len(group), 'case')} {what or 'of other sizes'}", group


def _sizes(case: Case, names: Sequence[str]) -> list[int | None]:
    return [case.params.get(name) for name in names]


def _call(runner: Runner, case: Case) -> None:
    """The calls of a case, judged only where they cannot be had otherwise."""
    kind = kind_of(case.kind)
    if kind.judge is not None or kind.ask is None:
        runner.run(case)
        return
    try:
        with runner.caller() as call:
            kind.ask(call, case, regenerate(case))
    except NoOutput:
        return  # what it leaves behind is the question, not what it returns
