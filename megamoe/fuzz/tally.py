"""The counts of a run so far, and their display."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from rich.console import Console
from rich.table import Table

from megamoe.fuzz.draw import FuzzCase
from megamoe.fuzz.rare import RARE
from megamoe.fuzz.step import Result
from megamoe.judge import BAD, VERDICTS, Verdict

EVERY: Final = 10.0
"""Seconds between two lines of progress where nobody watches."""


@dataclass
class Tally:
    """Counts of one run."""

    console: Console
    problems: int = 0
    points: int = 0
    """Problems among these for which the class of the backend leaves one output; the comparison is
    bitwise."""
    how: Counter[str] = field(default_factory=Counter)
    """Counts of judgements."""
    skips: Counter[str] = field(default_factory=Counter)
    """Problems that were not judged, by the reason."""
    class_counts: Counter[int] = field(default_factory=Counter)
    """Judged problems of each class, by its index in ``RARE``."""
    reds: dict[int, tuple[FuzzCase, Verdict]] = field(default_factory=dict)
    """Reds by number."""
    start: float = field(default_factory=time.monotonic)
    _line_time: float = 0.0

    def add(self, case: FuzzCase, result: Result) -> None:
        """Count one result."""
        verdict = result.verdict
        if verdict is None:
            self.skips["an operand with its scale is no bfloat16 number (--wide)"] += 1
        elif verdict.status not in VERDICTS:
            self.skips[verdict.reason or verdict.status] += 1
        else:
            self.problems += 1
            self.points += result.is_point
            self.how.update(verdict.how)
            self.class_counts.update(result.classes)
            if verdict.status in BAD:
                self.reds[case.number] = case, verdict

    @property
    def seconds(self) -> float:
        return max(1e-9, time.monotonic() - self.start)

    def line(self) -> str:
        """Progress in one line."""
        share = 100 * self.points / max(1, self.problems)
        return (
            f"{self.problems} judged in {self.seconds:.0f} s, {self.problems / self.seconds:.1f} a "
            f"second; {share:.0f}% zero freedom; {len(self.reds)} red"
        )

    def progress(self) -> None:
        """Say the line now and then where the output is no terminal."""
        if not self.console.is_terminal and self.seconds - self._line_time >= EVERY:
            self._line_time = self.seconds
            self.say(self.line())

    def say(self, text: str) -> None:
        """Print text as it is."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def summary(self) -> None:
        """The number of problems of each class, the judgements, and the skipped problems: what a
        run without a red has looked at."""
        table = Table("problems that reached", "class: their number", box=None)
        dimensions: dict[str, list[str]] = {}
        for i, rare in enumerate(RARE):
            dimensions.setdefault(rare.dimension, []).append(f"{rare.name}: {self.class_counts[i]}")
        for dimension, counts in dimensions.items():
            table.add_row(dimension, "   ".join(counts))
        self.console.print(table)
        rest = self.problems - self.points
        self.say(f"{self.points} problems of zero freedom, {rest} with an envelope")
        how = ", ".join(f"{n} {c}" for n, c in self.how.items()) or "none"
        self.say(f"judgements, one or more of each problem: {how}")
        for why, count in self.skips.most_common():
            self.say(f"passed over, {count}: {why}")
        self.say(self.line())
