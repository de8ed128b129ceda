"""Progress of a run: one live line on a terminal, a line a case where nobody watches."""

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

from megamoe.cases import Case, form_of
from megamoe.cases.shards import DEFAULT_SECONDS
from megamoe.judge import BAD, STATUSES, WORDS, Verdict
from megamoe.printable import counted
from megamoe.suite.settings import Settings
from megamoe.worker.session import Identity

LISTED: Final = 20
"""Reds that get a line while the run lasts; the later ones are counted."""
QUIET_SECONDS: Final = 60.0
"""Between two lines of a quiet run that no terminal shows."""


class Progress:
    """Shows I of N, counts, what runs now and when it may end. Use as a context manager."""

    def __init__(
        self, total: int, console: Console, settings: Settings, seconds: Mapping[str, float],
        quiet: bool = False,
    ) -> None:  # fmt: skip
        """``quiet``: no line for a case that is not red."""
        self.total = total
        self.console = console
        self.lacking = 0
        """Cases to come that ask what the backend does not offer."""
        self.settings = settings
        self.seconds = seconds
        self.counts: Counter[str] = Counter()
        self.running: dict[str, float] = {}
        self.left = 0.0
        """Seconds that the cases not yet judged are expected to take, one after the other."""
        self.workers = 1
        self.quiet = quiet
        self._said = time.monotonic()
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
        more = sum(self.counts[status] for status in BAD) - LISTED
        if more > 0:
            self._say(f"and {counted(more, 'more red')}, grouped below; --json FILE lists all")

    def expect(self, cases: Sequence[Case], identity: Identity) -> None:
        """What will be judged, and under which contract."""
        self.total = len(cases)
        self.left = sum(self.seconds.get(c.id, DEFAULT_SECONDS) for c in cases)
        offers = set(identity.callables)
        self.lacking = sum(not offers.issuperset(_asks(case)) for case in cases)
        lacks = f", {self.lacking} of them not provided" if self.lacking else ""
        self._say(f"{identity.judged_under}, {counted(self.total, 'case')}{lacks}")

    def started(self, case_id: str) -> None:
        """A worker has taken the case."""
        self.running[case_id] = time.monotonic()

    def judged(self, verdict: Verdict) -> None:
        """A case has its verdict. Each of the first reds gets a line at once; the pictures come
        at the end, where reds stand by symptom. What a backend does not provide is counted at the
        end."""
        self.running.pop(verdict.case_id, None)
        self.left -= self.seconds.get(verdict.case_id, DEFAULT_SECONDS)
        self.counts[verdict.status] += 1
        self.lacking -= verdict.status == "not-provided" and self.lacking > 0
        is_red = verdict.status in BAD
        if is_red and sum(self.counts[status] for status in BAD) > LISTED:
            return
        reason = verdict.reason.removeprefix(f"case {verdict.case_id}: ")
        if self._live is not None:
            if is_red:
                self._say(f"{verdict.status.upper()} {verdict.case_id}: {reason}")
        elif is_red or not (self.quiet or verdict.status == "not-provided"):
            word = WORDS.get(verdict.status, verdict.status)
            self._say(
                f"[{self._place()}] {word:<12} {verdict.case_id} "
                f"{verdict.seconds:.1f} s{f'  {reason}' if reason else ''}"
            )
        elif self.quiet and time.monotonic() - self._said > QUIET_SECONDS:
            self._say(f"[{self._place()}]")

    def _place(self) -> str:
        """I/N of the cases that the backend provides: others have no line, and take no number."""
        lacks = self.counts["not-provided"]
        done = sum(self.counts.values()) - lacks
        return f"{done}/{self.total - lacks - self.lacking}"

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> Group:
        done = sum(self.counts.values())
        line = Table.grid(padding=(0, 1))
        parts = [f"{WORDS.get(s, s)} {self.counts[s]}" for s in STATUSES if self.counts[s]]
        eta = max(0.0, self.left) / self.workers
        line.add_row(
            ProgressBar(max(1, self.total), done, width=30),
            Text(f"{done} of {self.total}"),
            Text("  ".join(parts)),
            Text(f"about {eta:.0f} s left" if done < self.total else ""),
        )
        now = time.monotonic()
        lines = [
            Text(f"  {case_id} {now - since:.0f} s", style="dim", no_wrap=True)
            for case_id, since in list(self.running.items())
        ]
        return Group(line, *lines)


def _asks(case: Case) -> list[str]:
    """The callable and the features that a backend needs for the case."""
    form = form_of(case.kind)
    return [*filter(None, [form.needs]), *form.features(case)]
