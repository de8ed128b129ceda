"""``megamoe list``: the cases."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.table import Table

from megamoe.cases import KINDS, TIERS, Case, load_cases, select
from megamoe.commands.options import add_case
from megamoe.commands.shared import root_of
from megamoe.console import Console


def add(commands: Any, command: Any) -> None:
    """The parser of ``list``."""
    s = command(commands, "list", "the cases", run)
    s.add_argument("--kind", choices=KINDS)
    s.add_argument("--tier", choices=TIERS)
    add_case(s)
    s.add_argument("--json", action="store_true", help="an array of objects, a line a case")


def run(a: argparse.Namespace) -> int:
    """A table in a terminal, else a line a case; with ``--json`` one array."""
    cases = select(load_cases(root_of(a)), a.kind, a.tier or "full", a.case)
    if a.json:
        print("[" + ",\n ".join(json.dumps(entry(case)) for case in cases) + "]")
        return 0
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


def entry(case: Case) -> dict[str, Any]:
    """A case as ``list --json`` and ``show --json`` give it."""
    return {
        "id": case.id, "kind": case.kind, "tier": case.tier, "breaks": case.breaks,
        "file": case.source.name, "seed": case.seed, "params": dict(case.params),
    }  # fmt: skip
