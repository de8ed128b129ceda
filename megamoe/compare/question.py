"""The question of a search: the test that makes a step good or bad."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from megamoe.cases import Case
from megamoe.compare.sides import Options
from megamoe.worker.choice import AUTO

EXTRA_RUNS: Final = 2
"""Runs more, once two have disagreed, so that a report can say how often."""


@dataclass(frozen=True)
class Test:
    """The test that makes a step good or bad."""

    cases: Sequence[Case]
    root: Path
    backend: str
    device: str = "cpu"
    how: str = "bits"
    """bits: the good end's bits or others; judge: the goldens' verdict; command: exit status."""
    command: str = ""
    repeat: int = 2
    timeout: float = 120.0
    options: Options = field(default_factory=Options)
    contract: str = AUTO


class Unclear(Exception):
    """A run that says nothing: the step is skipped, for this reason."""
