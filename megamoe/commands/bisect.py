"""``megamoe bisect``: which commit, version or input moved the bits."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from megamoe.commands.shared import (
    comparison_cases,
    note_repository,
    side_options,
    write_comparison,
)
from megamoe.compare import bisect
from megamoe.compare.job import Job, Range
from megamoe.compare.question import Test
from megamoe.compare.running import COMPARABLE
from megamoe.compare.sides import parse
from megamoe.console import Console
from megamoe.judge import Worst
from megamoe.printable import quantity
from megamoe.worker.choice import AUTO

_COLOURS = {"good": "green", "bad": "red", "skip": "dim", "flaky": "yellow"}


def run(a: argparse.Namespace) -> int:
    """Search, and say which is the first bad one."""
    root, cases = comparison_cases(a)
    cases = [case for case in cases if case.kind in COMPARABLE]
    if a.script:
        cases = []
    elif not cases:
        raise ValueError("no case with tensors is selected; errors cases cannot be compared")
    how = "command" if a.script else "judge" if a.judge else "bits"
    test = Test(cases, root, a.backend, a.device, how, a.script or "", a.repeat, a.timeout,
                side_options(a), a.contract or AUTO)  # fmt: skip
    job = Job(_range(a), test, Path(a.state).absolute() if a.state else None, a.fresh,
                     Path(a.archive) if a.archive else None)  # fmt: skip
    console, notes = Console(), Console(stderr=True)
    note_repository([job.where.good.repo] if job.where.good.kind == "git" else [], notes)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        with console.status("checking the ends, the bad one first", spinner="line") as status:

            def on_step(step: dict[str, Any], is_known: bool) -> None:
                console.print(_line(step, is_known), highlight=False, soft_wrap=True)
                status.update("walking")

            def note(text: str) -> None:
                notes.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

            report = bisect.run(job, on_step, note)
    finally:
        signal.signal(signal.SIGTERM, before)
    _show(report, console)
    if a.json:
        write_comparison(a.json, report)
    return 0 if report["first_bad"] else 1


def _stop(*_: object) -> None:
    raise KeyboardInterrupt  # so that the worktree goes, and git's walk with it


def _range(a: argparse.Namespace) -> Range:
    repo = Path(a.repo).resolve() if a.repo else None
    if a.over:
        sides = tuple(parse(word, repo) for text in a.over for word in _spread(text))
        return Range(sides[0], sides[-1], sides)
    good, bad = (parse(f"git:{rev.removeprefix('git:')}", repo) for rev in (a.good, a.bad))
    return Range(good, bad, (), tuple(a.only))


def _spread(text: str) -> list[str]:
    """``name==1,2`` and ``flake:input=url,url`` as one word each."""
    for mark in ("==", "="):
        head, separator, tail = text.partition(mark)
        if separator and (mark == "==" or text.startswith("flake:")):
            return [f"{head}{mark}{part}" for part in tail.split(",") if part]
    return [text]


def _line(step: dict[str, Any], is_known: bool) -> Text:
    rev = step["rev"][:12] if len(step["rev"]) == 40 else step["rev"]
    out = Text()
    out.append(f"{step['verdict'] if step['verdict'] != 'seen' else step['role'] + ' end':<8} ",
               style=_COLOURS.get(step["verdict"], ""))  # fmt: skip
    out.append(f"{rev}  {step['subject']}".rstrip())
    out.append(f"  {'known' if is_known else str(step['seconds']) + ' s'}", style="dim")
    return out.append(f"  {step['reason']}") if step["reason"] else out


def _show(report: dict[str, Any], console: Console) -> None:
    if report["cases"]:
        table = Table("case", "first stage that moved", title="what the first bad one moved",
                      title_justify="left")  # fmt: skip
        table.add_column("elements that moved", justify="right")
        table.add_column("most ULPs apart", justify="right")
        for case in report["cases"][:10]:
            stage = case["stages"][case["first_stage"]]
            far = "NaN" if stage["max_ulps"] is None else str(stage["max_ulps"])
            table.add_row(case["id"], case["first_stage"], f"{stage['moved']} of "
                          f"{stage['elements']}", far)  # fmt: skip
        console.print(table)
        if len(report["cases"]) > 10:
            rest = quantity(len(report["cases"]) - 10, "more case")
            console.print(f"and {rest} (--json has them)")
    plain: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
    worst = report["worst"]
    if worst:
        line = Worst(**{k: v for k, v in worst.items() if k != "case"}).line()
        for word, ours in (("expected", "good"), ("got", "bad"), ("ULP outside", "ULP")):
            line = line.replace(word, ours)
        console.print(f"worst    {worst['case']}: {line}", **plain)
    if report["archive"]:
        console.print(f"archive  {report['archive']}", **plain)
    console.print(report["headline"], **plain)
