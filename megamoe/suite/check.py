"""``megamoe check``: judges and workers, and a verdict for every case whatever happens."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console

from megamoe.cases import Case, pattern, shards
from megamoe.environment import machine_class
from megamoe.golden.documents import manifest_of
from megamoe.golden.places import recorded_file
from megamoe.judge import BAD, Verdict
from megamoe.suite import alone, results
from megamoe.suite.judges import Desk, Judges, Order, get_ready, threads_of
from megamoe.suite.patience import Patience
from megamoe.suite.progress import Progress
from megamoe.suite.reds import PICTURES
from megamoe.suite.settings import Settings
from megamoe.suite.stops import Stop, stoppable
from megamoe.worker.outcomes import NoRoom
from megamoe.worker.pool import Pool
from megamoe.worker.session import Identity

if TYPE_CHECKING:
    from megamoe.suite.runner import Runner


@dataclass
class Outcome:
    """A report, and how the run ended."""

    report: results.Report
    cases: Sequence[Case] = ()
    """The cases that were chosen."""
    stop_reason: str = ""
    """Why it ended before its last case; empty if it did not."""
    code: int = 0
    """Exit status of a run that was stopped; 0 for one that was not."""
    alone: Mapping[str, str] = field(default_factory=dict)
    """The status of reds that ran again at the end, each alone in a fresh process."""


@dataclass
class _Run:
    """Verdicts so far."""

    cases: list[Case]
    progress: Progress
    maxfail: int | None
    pictures: int = PICTURES
    patience: Patience | None = None
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def on_start(self, case: Case) -> None:
        self.progress.on_start(case.id)

    def order(self, case: Case) -> Order:
        return Order(self.brief(), None if self.patience is None else self.patience.of(case.id))

    def brief(self) -> bool:
        """Enough fails are kept in full; what a map of one more takes is not computed. An error
        has no map, so it takes no place."""
        return self._reds("fail") >= self.pictures

    def _reds(self, *statuses: str) -> int:
        return sum(v.status in (statuses or BAD) for v in self.verdicts.values())

    def on_result(self, case: Case, result: Any) -> None:
        if isinstance(result, Exception):
            verdict = Verdict(case.id, case.kind, "error", f"case {case.id}: {result}")
        else:
            verdict, self.details[case.id] = result
        self.verdicts[case.id] = verdict
        self.progress.on_verdict(verdict)
        if self.patience is not None and (line := self.patience.add(verdict)):
            self.progress.say(line)
        rest = len(self.cases) - len(self.verdicts)
        if self.maxfail is not None and rest and self._reds() >= self.maxfail:
            raise Stop(f"--maxfail {self.maxfail} is reached", 1)

    def all(self, why: str) -> list[Verdict]:
        """A verdict for every case."""
        return [
            self.verdicts.get(c.id) or Verdict(c.id, c.kind, "not-run", f"not run: {why}")
            for c in self.cases
        ]


def check(
    settings: Settings, judges: int, workers: int, console: Console, pictures: int = PICTURES,
    maxfail: int | None = None, quiet: bool = False, explains: bool = False,
    verbose: bool = False, in_order: bool = False, learns: bool = False,
) -> Outcome:  # fmt: skip
    """Judge ``settings.backend``; raises what the command says in one line (``ValueError``).

    Of ``pictures`` fails the report has maps; of later ones a golden of digests names rows only,
    and the report's case is ``shortened``. ``maxfail``: stop after so many reds. ``quiet`` and
    ``verbose``: see :class:`Progress`. ``explains``: look for the single change of a model that
    explains an output inside the envelope and unlike its prediction. ``in_order``: one process
    judges the cases in the order in which the pattern names them. ``learns``: after a first hang
    the limit of a case follows from those that passed: :mod:`.patience`.
    """
    manifest_of(settings.root)  # a manifest that cannot be read is said before any work
    most = len(settings.cases())
    seconds = shards.durations(settings.root)
    start = time.perf_counter()
    ranks = settings.ranks()
    # Every rank's judge must ask for the same case at the same time, and a team has one call.
    judges = 1 if ranks is not None or in_order else max(1, min(judges, most))
    workers = 1 if in_order else max(1, min(workers, most))
    outcome = Outcome({})
    progress = Progress(most, console, settings, seconds, quiet, verbose)
    patience = Patience(settings.timeout, learns, seconds)
    run = _Run([], progress, maxfail, pictures, patience)
    run.progress.workers = judges
    identity: Identity | None = None
    try:
        with stoppable():
            get_ready()
            launch = settings.launch(threads_of(len(ranks.here) if ranks else max(judges, workers)))
            with Pool(launch, workers, ranks) as pool:
                identity = pool.address.identity
                cases = shards.small_first(settings.cases(identity.contract), seconds)
                cases = pattern.in_order(cases, settings.case) if in_order else cases
                run.cases = cases
                run.progress.expect(cases, identity)
                step = judge_and_explain if explains else judge
                desk = Desk(pool.address, settings.root, settings.timeout, step,
                            threads_of(judges))  # fmt: skip
                if cases:
                    with Judges(judges, desk) as bench, run.progress:
                        bench.run(cases, run.on_start, run.on_result, run.order)
            if ranks is None:
                # What was judged stands all the same where somebody stops this.
                with suppress(Stop), console.status("running reds again, each alone"):
                    outcome.alone = alone.again(
                        launch, settings.root, settings.timeout, [*run.verdicts.values()], cases
                    )
    except Stop as stop:
        outcome.stop_reason, outcome.code = str(stop), stop.code
    except NoRoom as full:
        outcome.stop_reason, outcome.code = str(full), 2
    if identity is None:
        raise Stop(outcome.stop_reason, outcome.code)
    verdicts = run.all(outcome.stop_reason)
    outcome.report = _report(settings, identity, run.cases, verdicts, run.details)
    outcome.report |= results.modules_of(settings.backend, pool.sources)
    outcome.cases = run.cases
    outcome.report["predicted"] = {"explained": explains}
    outcome.report["seconds"] = round(time.perf_counter() - start, 3)
    if outcome.stop_reason:
        outcome.report["stopped"] = outcome.stop_reason
    return outcome


def judge_and_explain(runner: Runner, case: Case) -> tuple[Verdict, Any]:
    """The same, and what would explain an output that is not the prediction."""
    runner.explains = True
    return judge(runner, case)


def judge(runner: Runner, case: Case) -> tuple[Verdict, Any]:
    """A judge's step: the verdict, and what a report draws of a bad one; None where that was left
    out."""
    verdict = runner.run(case)
    if runner.brief and verdict.findings:
        return verdict, None
    return verdict, runner.details if verdict.status in BAD else []


def _report(
    settings: Settings, identity: Identity, cases: list[Case], verdicts: list[Verdict],
    details: dict[str, Any],
) -> results.Report:  # fmt: skip
    path = recorded_file(settings.root, identity.name, identity.facts)
    file = str(path.relative_to(settings.root)) if path.exists() else None
    out = results.build(settings, identity, verdicts)
    results.describe(out, cases, details)
    out["options"] = settings.again()
    manifest = (settings.root / "manifest.json").read_bytes()
    out["goldens"] = {"manifest_sha256": hashlib.sha256(manifest).hexdigest()}
    out["recorded"] = {"machine_class": machine_class(identity.facts), "file": file}
    return out
