"""``megamoe list``: the cases."""

from __future__ import annotations

import argparse
from typing import Any

from rich.table import Table

from megamoe.cases import KINDS, TIERS, load_cases, select
from megamoe.commands.shared import root_of
from megamoe.console import Console


def add(commands: Any, command: Any) -> None:
    """The parser of ``list``."""
    s = command(commands, "list", "the cases", run)
    s.add_argument("--kind", choices=KINDS)
    s.add_argument("--tier", choices=TIERS)
    s.add_argument("--case", metavar="GLOB")


def run(a: argparse.Namespace) -> int:
    """A table in a terminal, else a line a case."""
    cases = select(load_cases(root_of(a)), a.kind, a.tier or "full", a.case)
    console = Console()
    if not console.is_terminal:  # for other programs: id, tier, what breaks
        for case in cases:
            print(case.id, case.tier, case.breaks, sep="\t")
        return 0
    table = Table("case", "tier", "what is broken if it fails")
    for case in cases:
        table.add_row(case.id, case.tier, case.breaks)
    console.print(table)
    console.print(f"{len(cases)} cases")
    return 0
