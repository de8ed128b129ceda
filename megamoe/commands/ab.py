"""``megamoe ab``: run the same cases in two environments, bit for bit."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table

from megamoe.commands.shared import (
    comparison_cases,
    note_repository,
    side_options,
    write_comparison,
)
from megamoe.compare import ab, disk, stages
from megamoe.compare.running import COMPARABLE, contract_lines
from megamoe.compare.sides import parse
from megamoe.console import Console
from megamoe.printable import quantity
from megamoe.worker.choice import AUTO


def run(a: argparse.Namespace) -> int:
    """Run both sides, and say what moved."""
    repo = Path(a.repo).resolve() if a.repo else None
    sides = (parse(a.left, repo), parse(a.right, repo))
    root, cases = comparison_cases(a)
    backends = (a.left_backend or a.backend, a.right_backend or a.backend)
    q = ab.Question(
        sides, backends, cases, root, a.device, a.timeout, side_options(a), a.contract or AUTO
    )
    console, notes = Console(), Console(stderr=True)
    note_repository([side.repo for side in sides if side.kind == "git"], notes)
    total = len([c for c in cases if c.kind in COMPARABLE])
    count = 0
    with console.status("starting both sides", spinner="line") as status:

        def on_result(result: dict[str, Any]) -> None:
            nonlocal count
            count += 1
            status.update(f"{count} of {total}: {result['id']}")
            if result["status"] in ("moved", "error"):
                console.print(
                    f"{result['status']:<6} {result['id']}  {result.get('reason', '')}",
                    markup=False, highlight=False, soft_wrap=True,
                )  # fmt: skip

        try:
            report = ab.run(q, on_result)
        except OSError as error:
            raise disk.cause_of(error) from error
    for line in contract_lines({name: report[name] for name in ab.NAMES}):
        notes.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
    _show(report, console)
    if a.json:
        write_comparison(a.json, report)
    return ab.exit_code(report)


def _show(report: dict[str, Any], console: Console) -> None:
    table = Table(
        "stage",
        title="what moved, and how many elements the goldens call wrong",
        title_justify="left",
    )
    for name in ("cases", "elements", "most ULPs apart", "wrong left", "wrong right"):
        table.add_column(name, justify="right")
    rows: dict[str, list[dict[str, Any]]] = {}
    for case in report["cases"]:
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
    count = len(report["not_compared"])
    if count:
        console.print(f"{quantity(count, 'case')} not compared: neither backend has what they need")
    console.print(report["headline"], markup=False, highlight=False, soft_wrap=True)
