"""Progress of a run: one live line on a terminal, a line now and then where nobody watches."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Final

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megamoe.cases import Case
from megamoe.cases.needs import lacking
from megamoe.cases.shards import DEFAULT_SECONDS
from megamoe.judge import BAD, STATUSES, WORDS, Verdict, symptom_of
from megamoe.printable import quantity
from megamoe.suite.pace import Pace
from megamoe.suite.settings import Settings
from megamoe.worker.session import Identity

LINE_LIMIT: Final = 10
"""Reds that get a line while the run lasts, each of another symptom or kind."""
LINE_SECONDS: Final = 30.0
"""Between two lines of progress where no terminal shows a bar."""


class Progress:
    """Shows I of N, reds, what runs now and when it may end. Use as a context manager.

    N counts the cases that the backend provides; it is known at the start and stays.
    """

    def __init__(
        self, total: int, console: Console, settings: Settings, seconds: Mapping[str, float],
        quiet: bool = False, verbose: bool = False,
    ) -> None:  # fmt: skip
        """``quiet``: lines for reds only. ``verbose``: a line for every case."""
        self.total = total
        """Cases of all contracts at first; then those that will be judged."""
        self.console = console
        self.lacking: set[str] = set()
        """Ids of the cases that ask what the backend does not offer: they have no line and take no
        number."""
        self.settings = settings
        self.seconds = seconds
        self.counts: Counter[str] = Counter()
        self.running: dict[str, float] = {}
        self.backlog = 0.0
        """Recorded seconds of the cases that are not yet judged, one after the other."""
        self.pace = Pace()
        self.workers = 1
        self.quiet, self.verbose = quiet, verbose
        self._line_time = time.monotonic()
        self._symptoms: set[tuple[str, str, str]] = set()
        self._has_further = False
        self._live = (
            Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def expect(self, cases: Sequence[Case], identity: Identity) -> None:
        """What will be judged, and under which contract."""
        others = self.total - len(cases)
        self.lacking = {case.id for case in cases if lacking(case, identity)}
        self.total = len(cases) - len(self.lacking)
        self.backlog = sum(map(self._seconds, (case.id for case in cases)))
        lacks = f"; {quantity(len(self.lacking), 'case')} not provided" if self.lacking else ""
        if len(cases) == 1:
            self.say(f"{identity.contract_line}, 1 case")
            return
        of_others = f"; {others} more are of other contracts alone" if others > 0 else ""
        self.say(f"{self.settings.scope(cases)}{of_others}")
        self.say(f"{identity.contract_line}{lacks}")

    def on_start(self, case_id: str) -> None:
        """A worker has taken the case."""
        self.running[case_id] = time.monotonic()

    def on_verdict(self, verdict: Verdict) -> None:
        """A case has its verdict. The first red of each symptom gets a line at once; the pictures
        come at the end. What a backend does not provide is counted at the end."""
        self.running.pop(verdict.case_id, None)
        if verdict.case_id in self.lacking:
            return
        self.backlog -= self._seconds(verdict.case_id)
        self.pace.add(self._seconds(verdict.case_id), verdict.seconds)
        self.counts[verdict.status] += 1
        if self.verbose:
            self._line(verdict, verdict.reason)
        elif verdict.status in BAD:
            self._red(verdict)
        elif self._live is None and not self.quiet:
            self._now_and_then()

    def _red(self, verdict: Verdict) -> None:
        """A line for the first red of a symptom and kind; one line for all that get none."""
        if self.total == 1:  # its picture follows at once
            return
        text = symptom_of(verdict.case_id, verdict.status, verdict.reason)
        symptom = verdict.kind, verdict.status, text
        if symptom not in self._symptoms and len(self._symptoms) < LINE_LIMIT:
            self._symptoms.add(symptom)
            first = verdict.reason.partition("; ")[0] if verdict.findings else verdict.reason
            self._line(verdict, first)
        elif not self._has_further:
            self._has_further = True
            self.say("further reds of listed symptoms: see the end (or use --verbose)")
        elif self._live is None and not self.quiet:
            self._now_and_then()

    def _line(self, verdict: Verdict, reason: str) -> None:
        word = WORDS.get(verdict.status, verdict.status)
        reason = reason.removeprefix(f"case {verdict.case_id}: ")
        self.say(
            f"[{self._place()}] {word} {verdict.case_id} {verdict.seconds:.1f} s"
            f"{f'  {reason}' if reason else ''}"
        )

    def _now_and_then(self) -> None:
        """I/N, the reds and the time left, where the last line is some time ago."""
        if time.monotonic() - self._line_time > LINE_SECONDS and self._count() < self.total:
            red = sum(self.counts[status] for status in BAD)
            self.say(f"[{self._place()}] {quantity(red, 'red')}, {self._remaining()}")

    def _seconds(self, case_id: str) -> float:
        return 0.0 if case_id in self.lacking else self.seconds.get(case_id, DEFAULT_SECONDS)

    def _count(self) -> int:
        return sum(self.counts.values())

    def _place(self) -> str:
        return f"{self._count()}/{self.total}"

    def _remaining(self) -> str:
        """``about 4 min left``: see :mod:`.pace`."""
        now = time.monotonic()
        running = [(self._seconds(name), now - since) for name, since in [*self.running.items()]]
        waiting = max(0, self.total - self._count() - len(running))
        baseline = max(0.0, self.backlog - sum(duration for duration, _ in running))
        seconds = max(1.0, self.pace.eta(waiting, baseline, running, self.workers))
        text = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
        return f"about {text} left"

    def say(self, text: str) -> None:
        """A line as it is."""
        self._line_time = time.monotonic()
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> Group:
        count = self._count()
        line = Table.grid(padding=(0, 1))
        parts = [f"{WORDS.get(s, s)} {self.counts[s]}" for s in STATUSES if self.counts[s]]
        line.add_row(
            ProgressBar(max(1, self.total), count, width=20),
            Text(self._place()),
            Text("  ".join(parts)),
            Text(self._remaining() if count < self.total else ""),
        )
        now = time.monotonic()
        lines = [
            Text(f"  {case_id} {now - since:.0f} s", style="dim", no_wrap=True)
            for case_id, since in list(self.running.items())
        ]
        return Group(line, *lines)
