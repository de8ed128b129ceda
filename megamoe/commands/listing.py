"""``megamoe list``: the cases."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamoe.cases import load_cases, load_entries, select
from megamoe.printable import quantity

if TYPE_CHECKING:
    from megamoe.cases import Case


def run(a: argparse.Namespace) -> int:
    """A table in a terminal, else a line a case; with ``--json`` one array."""
    root = Path(a.golden) if a.golden else None
    if a.json:
        cases = select(load_cases(root), a.kind, a.tier or "full", a.case)
        print("[" + ",\n ".join(json.dumps(entry(case)) for case in cases) + "]")
        return 0
    entries = select(load_entries(root), a.kind, a.tier or "full", a.case)
    if sys.stdout is None or not sys.stdout.isatty():  # for other programs: id, tier, what breaks
        for one in entries:
            print(one.id, one.tier, one.breaks, sep="\t")
        return 0
    from rich.table import Table  # a list for another program does without

    from megamoe.console import Console

    console = Console()
    table = Table("case", "tier", "what is broken if it fails")
    for one in entries:
        table.add_row(one.id, one.tier, one.breaks)
    console.print(table)
    console.print(quantity(len(entries), "case"))
    return 0


def entry(case: Case) -> dict[str, Any]:
    """A case as ``list --json`` and ``show --json`` give it."""
    return {
        "id": case.id, "kind": case.kind, "tier": case.tier, "breaks": case.breaks,
        "file": case.source.name, "seed": case.seed, "params": dict(case.params),
    }  # fmt: skip
