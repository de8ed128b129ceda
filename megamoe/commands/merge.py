"""``megamoe merge``: prove that shard reports hold each case once."""

from __future__ import annotations

import argparse

from megamoe.cases import load_cases, select
from megamoe.commands.output import write_reports
from megamoe.console import Console
from megamoe.printable import quantity
from megamoe.suite import merge, next_command, reds, results
from megamoe.suite.settings import Settings
from megamoe.suite.shard_report import read_report
from megamoe.suite.summary import print_summary


def run(a: argparse.Namespace) -> int:
    """Merge, and show the table of all shards."""
    reports = [read_report(path) for path in a.reports]
    first = reports[0]
    root = Settings(golden=a.golden).root  # `shared` has it too, and imports torch
    selection = select(
        load_cases(root), first.get("kind"), first.get("tier", "full"), first.get("case"),
        first.get("contract"),
    )  # fmt: skip
    report = merge.merge(reports, selection, a.reports)
    if lines := next_command.lines_of(report, selection, {}):
        report["next"] = lines
    wrong = write_reports(a, report)
    console = Console()
    reds.show(report, console, pictures=0)
    print_summary(report, console)
    every = "the one case" if len(selection) == 1 else f"each of {len(selection)} cases"
    print(f"{every} stands once in {quantity(len(reports), 'report')}")
    next_command.show_next(lines, console)
    return results.exit_code(report["counts"]) or (2 if wrong else 0)
