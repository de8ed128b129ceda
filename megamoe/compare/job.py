"""The question of a bisect: its range, its test, and the folder of its state."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

import megamoe
from megamoe.compare.question import Test
from megamoe.compare.sides import Side
from megamoe.worker.known import source_of

PROTOCOL: Final = 2
"""Version of the requests to a side and of the stored bits: a state of another version is of no
use."""


@dataclass(frozen=True)
class Range:
    """The range: commits of a checkout, or a list of sides with the good one first."""

    good: Side
    bad: Side
    sides: tuple[Side, ...] = ()
    """For a list: the whole list with both ends."""
    only: tuple[str, ...] = ()
    """For commits: paths; commits that touch none of them are not tried."""


@dataclass(frozen=True)
class Job:
    """A whole bisect."""

    where: Range
    test: Test
    folder: Path | None = None
    """The folder of the state; None: a folder in the cache for this question."""
    fresh: bool = False
    archive: Path | None = None


def request_of(job: Job) -> dict[str, Any]:
    """Everything that decides a verdict: the state of another request is of no use."""
    t, w = job.test, job.where
    revs = [side.target for side in w.sides] or [w.good.target, w.bad.target]
    spec = source_of(Path(t.backend.rpartition(":")[0] or "-").expanduser())
    source = spec.read_text(errors="replace") if spec.is_file() else ""
    return {
        "protocol": PROTOCOL, "megamoe": megamoe.__version__, "python": sys.version,
        "torch": torch.__version__,
        "revs": revs, "repo": str(w.good.repo or ""), "only": list(w.only), "backend": t.backend,
        "source": source, "device": t.device, "how": t.how, "command": t.command,
        "repeat": t.repeat, "timeout": t.timeout, "golden": str(t.root),
        "options": repr(t.options), "contract": t.contract,
        "cases": {c.id: c.definition() for c in t.cases},
    }  # fmt: skip
