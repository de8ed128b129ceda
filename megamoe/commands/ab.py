"""``megamoe ab``: run the same cases in two environments, bit for bit."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table

from megamoe.commands.shared import compared_cases, note_repository, side_options, write_compared
from megamoe.compare import ab, disk, stages
from megamoe.compare.running import COMPARABLE, judged_under
from megamoe.compare.sides import parse
from megamoe.console import Console
from megamoe.printable import counted
from megamoe.worker.choice import AUTO


def run(a: argparse.Namespace) -> int:
    """Run both sides, and say what moved."""
    repo = Path(a.repo).resolve() if a.repo else None
    sides = (parse(a.left, repo), parse(a.right, repo))
    root, cases = compared_cases(a)
    backends = (a.left_backend or a.backend, a.right_backend or a.backend)
    q = ab.Question(
        sides, backends, cases, root, a.device, a.timeout, side_options(a), a.contract or AUTO
    )
    console, notes = Console(), Console(stderr=True)
    note_repository([side.repo for side in sides if side.kind == "git"], notes)
    total = len([c for c in cases if c.kind in COMPARABLE])
    counted = 0
    with console.status("starting both sides", spinner="line") as status:

        def done(result: dict[str, Any]) -> None:
            nonlocal counted
            counted += 1
            status.update(f"{counted} of {total}: {result['id']}")
            if result["status"] in ("moved", "error"):
                console.print(
                    f"{result['status']:<6} {result['id']}  {result.get('reason', '')}",
                    markup=False, highlight=False, soft_wrap=True,
                )  # fmt: skip

        try:
            made = ab.run(q, done)
        except OSError as error:
            raise disk.said(error) from error
    for line in judged_under({name: made[name] for name in ab.NAMES}):
        notes.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
    _show(made, console)
    if a.json:
        write_compared(a.json, made)
    return ab.exit_code(made)


def _show(made: dict[str, Any], console: Console) -> None:
    table = Table("stage", title="what moved", title_justify="left")
    for name in ("cases", "elements", "most ULPs", "outside left", "outside right"):
        table.add_column(name, justify="right")
    rows: dict[str, list[dict[str, Any]]] = {}
    for case in made["cases"]:
        for name, stage in case["stages"].items():
            if stage["moved"]:
                rows.setdefault(name, []).append(stage)
    for name in sorted(rows, key=stages.place):
        few = rows[name]
        ulps = [s["max_ulps"] for s in few]
        outs = [[s[f"outside_{side}"] for s in few] for side in ab.NAMES]
        table.add_row(
            name, str(len(few)), str(sum(s["moved"] for s in few)),
            "NaN" if None in ulps else str(max(ulps)),
            *("not judged" if None in out else str(sum(out)) for out in outs),
        )  # fmt: skip
    if rows:
        console.print(table)
    skipped = len(made["not_compared"])
    if skipped:
        console.print(
            f"{counted(skipped, 'case')} not compared: neither backend has what they need"
        )
    console.print(made["headline"], markup=False, highlight=False, soft_wrap=True)
