"""``megamoe list``: the cases."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megamoe.cases import KINDS, TIERS, load_entries, select


def add(commands: Any, command: Any) -> None:
    """The parser of ``list``."""
    s = command(commands, "list", "the cases", run)
    s.add_argument("--kind", choices=KINDS)
    s.add_argument("--tier", choices=TIERS)
    s.add_argument("--case", metavar="GLOB")


def run(a: argparse.Namespace) -> int:
    """A table in a terminal, else a line a case."""
    root = Path(a.golden) if a.golden else None
    cases = select(load_entries(root), a.kind, a.tier or "full", a.case)
    if not sys.stdout.isatty():  # for other programs: id, tier, what breaks
        for case in cases:
            print(case.id, case.tier, case.breaks, sep="\t")
        return 0
    from rich.console import Console  # a list for another program does without
    from rich.table import Table

    console = Console()
    table = Table("case", "tier", "what is broken if it fails")
    for case in cases:
        table.add_row(case.id, case.tier, case.breaks)
    console.print(table)
    console.print(f"{len(cases)} cases")
    return 0
