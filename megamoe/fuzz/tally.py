"""The counts of a run so far, and their display."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from rich.console import Console
from rich.table import Table

from megamoe.fuzz.draw import Drawn
from megamoe.fuzz.rare import RARE
from megamoe.fuzz.step import Result
from megamoe.judge import BAD, JUDGED, Verdict

EVERY: Final = 10.0
"""Seconds between two lines of progress where nobody watches."""


@dataclass
class Tally:
    """Counts of one run."""

    console: Console
    judged: int = 0
    points: int = 0
    """Problems among these for which the class of the backend leaves one output; the comparison is
    bitwise."""
    how: Counter[str] = field(default_factory=Counter)
    """Counts of judgements."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """Problems that were not judged, by the reason."""
    reached: Counter[int] = field(default_factory=Counter)
    """Judged problems of each class, by its index in ``RARE``."""
    reds: dict[int, tuple[Drawn, Verdict]] = field(default_factory=dict)
    """Reds by number."""
    begun: float = field(default_factory=time.monotonic)
    _said: float = 0.0

    def done(self, drawn: Drawn, result: Result) -> None:
        """Count one result."""
        verdict = result.verdict
        if verdict is None:
            self.passed_over["an operand with its scale is no bfloat16 number (--wide)"] += 1
        elif verdict.status not in JUDGED:
            self.passed_over[verdict.reason or verdict.status] += 1
        else:
            self.judged += 1
            self.points += result.is_point
            self.how.update(verdict.how)
            self.reached.update(result.reached)
            if verdict.status in BAD:
                self.reds[drawn.number] = drawn, verdict

    @property
    def seconds(self) -> float:
        return max(1e-9, time.monotonic() - self.begun)

    def line(self) -> str:
        """Progress in one line."""
        share = 100 * self.points / max(1, self.judged)
        return (
            f"{self.judged} judged in {self.seconds:.0f} s, {self.judged / self.seconds:.1f} a "
            f"second; {share:.0f}% zero freedom; {len(self.reds)} red"
        )

    def progress(self) -> None:
        """Say the line now and then where the output is no terminal."""
        if not self.console.is_terminal and self.seconds - self._said >= EVERY:
            self._said = self.seconds
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
            dimensions.setdefault(rare.dimension, []).append(f"{rare.name}: {self.reached[i]}")
        for dimension, counts in dimensions.items():
            table.add_row(dimension, "   ".join(counts))
        self.console.print(table)
        rest = self.judged - self.points
        self.say(f"{self.points} problems of zero freedom, {rest} with an envelope")
        how = ", ".join(f"{n} {c}" for n, c in self.how.items()) or "none"
        self.say(f"judgements, one or more of each problem: {how}")
        for why, count in self.passed_over.most_common():
            self.say(f"passed over, {count}: {why}")
        self.say(self.line())
