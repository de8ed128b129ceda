"""``megamoe coverage``: what the cases enter, and what no case enters."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress
from rich.table import Table

from megamoe.cases import load_cases, select
from megamoe.commands import UsageError
from megamoe.commands.early import unknown_dimension
from megamoe.commands.output import complain
from megamoe.commands.shared import progress, root_of
from megamoe.console import Console
from megamoe.coverage import holes, recorded, traffic
from megamoe.coverage.counting import CaseClasses, count
from megamoe.coverage.dimension import Dimension, Tally, brief
from megamoe.coverage.dimensions import dimensions
from megamoe.coverage.document import document, with_traffic
from megamoe.coverage.places import SHALLOW
from megamoe.files import write_atomically
from megamoe.printable import part, quantity
from megamoe.report.page import page
from megamoe.spec.contract import NEWEST, REVISIONS, Contract, contract
from megamoe.spec.dialects import DIALECTS

MAX_RUNS = 6
"""Runs of holes that a row of the table names."""


def run(a: argparse.Namespace) -> int:
    """Count, show and compare with the known holes; 1 where these are not the holes of today."""
    root = root_of(a)
    revision = NEWEST if a.contract is None else contract(a.contract)
    if revision.revision in DIALECTS:
        raise UsageError(
            f"coverage counts classes of MegaMoE's formats, which {revision.revision} does not "
            f"have; take one of {', '.join(REVISIONS)}"
        )
    dims = _dimensions(a, revision)
    whole = not (a.kind or a.case or (a.tier or "full") != "full") and revision is NEWEST
    if a.record and not whole:
        raise UsageError("--record counts all cases under the newest contract; drop --kind, "
                         "--tier, --case and --contract")  # fmt: skip
    calls = traffic.files(Path(a.traffic)) if a.traffic else []
    reasons = holes.read(root, dimensions(NEWEST)) if revision is NEWEST else {}
    cases = select(load_cases(root), a.kind, a.tier or "full", a.case, revision.revision)
    console = Console()
    with progress("coverage", len(cases), Console(stderr=True)) as on_result:
        counts = count(cases, revision, a.j, lambda case: on_result(case, ""))
    hits = counts.tally
    report = document(revision.revision, len(cases), _selection(a), dims, hits, reasons)
    _show(report, dims, hits, reasons, console, a.dimension is not None)
    if calls:
        gaps = traffic.beyond(_count_calls(calls, revision), hits, dims)
        report = with_traffic(report, len(calls), gaps)
        _show_traffic(report["traffic"], console)
    if a.json:
        write_atomically(Path(a.json), (json.dumps(report, indent=1) + "\n").encode())
    if a.page:
        write_atomically(Path(a.page), page("coverage", report))
    if not whole:
        return 0
    comparison = holes.compare(hits, dimensions(NEWEST), reasons)
    if a.record:
        _record(root, cases, counts, reasons, comparison)
        return _complain(holes.Comparison(comparison.new, []))
    return _complain(comparison)


def _dimensions(a: argparse.Namespace, revision: Contract) -> Sequence[Dimension]:
    every = dimensions(revision)
    if a.dimension is None:
        return every
    matches = [d for d in every if d.name == a.dimension]
    if not matches:
        raise UsageError(unknown_dimension(a.dimension, [d.name for d in every]))
    return matches


def _selection(a: argparse.Namespace) -> dict[str, str]:
    options = {name: getattr(a, name) for name in ("kind", "tier", "case", "dimension")}
    return {name: value for name, value in options.items() if value}


def _count_calls(paths: Sequence[Path], revision: Contract) -> Tally:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("traffic", total=len(paths))
        return traffic.count(paths, revision, lambda path: bar.update(task, advance=1))


# --- what is shown ----------------------------------------------------------------------------


def _show(
    report: Mapping[str, Any], dims: Sequence[Dimension], hits: Tally, reasons: holes.Reasons,
    console: Console, closely: bool,
) -> None:  # fmt: skip
    """A row a dimension, or a row a class."""
    if closely:
        table = Table("class", "cases", "for example", "what could hide in the hole")
        for one in report["dimensions"][0]["classes"]:
            hole = one["fault"] if not one["cases"] else ""
            reason = f" Known: {one['known']}" if one["known"] else ""
            table.add_row(
                one["class"], str(one["cases"]), ", ".join(one["examples"]), hole + reason
            )
        console.print(table, markup=False)
        return
    table = Table("dimension", "goal", "reached", "known holes", "new holes", "holes")
    for d in dims:
        gaps = hits.holes(d)
        new = [one for one in gaps if (d.name, one) not in reasons]
        runs = brief(gaps, d.goal)
        more = f" and {len(runs) - MAX_RUNS} more" if len(runs) > MAX_RUNS else ""
        table.add_row(d.name, str(len(d.goal)), str(len(d.goal) - len(gaps)),
                      str(len(gaps) - len(new)), str(len(new)),
                      ", ".join(runs[:MAX_RUNS]) + more)  # fmt: skip
    console.print(table, markup=False)
    every = report["dimensions"]
    goal, coverage = (sum(d[key] for d in every) for key in ("goal", "reached"))
    enter = quantity(report["cases"], "case enters", "cases enter")
    classes, of = part(coverage, goal, "class", "classes"), quantity(len(every), "dimension")
    console.print(f"{enter} {classes} of {of} under contract {report['contract']}")


def _show_traffic(report: Mapping[str, Any], console: Console) -> None:
    """A row a dimension in which some call enters a class that no case enters."""
    table = Table("dimension", "classes of the calls", "that no case enters", "in the file")
    for row in report["dimensions"]:
        for one, files in row["missing"].items():
            table.add_row(row["name"], str(row["entered"]), one, ", ".join(files))
    entries = sum(row["entered"] for row in report["dimensions"])
    missing = sum(len(row["missing"]) for row in report["dimensions"])
    if missing:
        console.print(table, markup=False)
    calls = quantity(report["calls"], "captured call enters", "captured calls enter")
    console.print(f"{calls} {quantity(entries, 'class', 'classes')}; {missing} of these no case "
                  "enters")  # fmt: skip


# --- the known holes --------------------------------------------------------------------------


def _complain(comparison: holes.Comparison) -> int:
    """A line for each dimension with a hole that is not known, or a known one that is closed."""
    every = {d.name: d for d in dimensions(NEWEST)}
    for gaps, advice in (
        (
            comparison.new,
            "close it with a case, or write it into golden/holes.toml with its reason",
        ),
        (comparison.closed, f"is closed and still listed in golden/holes.toml; {recorded.AGAIN}"),
    ):
        for name in dict.fromkeys(d for d, _ in gaps):
            classes = brief((one for d, one in gaps if d == name), every[name].goal)
            what = "new hole" if gaps is comparison.new else "known hole"
            complain(f"{what} in {name}: {', '.join(classes)}: {advice}")
    return 1 if comparison.new or comparison.closed else 0


def _record(
    root: Path, cases: Sequence[Any], counts: CaseClasses, reasons: holes.Reasons,
    comparison: holes.Comparison,
) -> None:  # fmt: skip
    """Write golden/coverage.json, and golden/holes.toml without the closed ones."""
    if os.environ.get("CI"):
        raise ValueError("--record refuses to run where CI is set; unset CI if you are a person")
    every = dimensions(NEWEST)
    hits = counts.tally
    numbers = {d.name: {one: hits.of(d)[one] for one in d.goal} for d in every}
    costs = {name: 0.01 + seconds for name, seconds in counts.seconds.items()}
    content = recorded.content(NEWEST.revision, cases, counts.classes, costs, every, SHALLOW,
                               numbers)  # fmt: skip
    write_atomically(root / recorded.FILE, content)
    rest = {hole: reason for hole, reason in reasons.items() if hole not in comparison.closed}
    write_atomically(root / holes.FILE, holes.text(rest, every).encode())
    print(f"{root / recorded.FILE}: {quantity(len(cases), 'case')}; {root / holes.FILE}: "
          f"{quantity(len(rest), 'known hole')}, {len(comparison.closed)} dropped")  # fmt: skip
