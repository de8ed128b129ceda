"""``megamoe golden``: record, diff, bless and verify the goldens; import a case.

The acts on a backend's own bits are in :mod:`.bits`, those on predictions in :mod:`.predictions`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from megamoe import golden
from megamoe.cases import Case, load_cases, select
from megamoe.commands import UsageError, bits, predictions
from megamoe.commands.options import add_case, add_jobs
from megamoe.commands.shared import progress, root_of
from megamoe.console import Console
from megamoe.golden.imported import import_file
from megamoe.printable import counted
from megamoe.suite import merge


def add(commands: Any, command: Any) -> None:
    """The parsers of ``golden`` and its acts."""
    g = commands.add_parser("golden", help="record, diff, bless, verify", allow_abbrev=False)
    acts = g.add_subparsers(required=True, metavar="ACT")
    for name, text, run in (
        ("record", "compute candidates with the oracle", _record),
        ("verify", "recompute the goldens; they must be equal in every bit", _verify),
    ):
        r = command(acts, name, text, run)
        add_case(r)
        add_jobs(r)
    command(acts, "diff", "what blessing the candidates would change", _diff)
    b = command(acts, "bless", "make the candidates the goldens; refuses where CI is set", _bless)
    b.add_argument("--durations", nargs="+", metavar="REPORT",
                   help="instead: take the cases' seconds from JSON reports")  # fmt: skip
    bits.add(acts, command)
    predictions.add(acts, command)
    r = command(acts, "import", "make a stored problem a case, and record its candidate", _import)
    r.add_argument("file", metavar="FILE.safetensors")
    r.add_argument("--name", help="of the case; default: the file's")
    r.add_argument("--breaks", metavar="SENTENCE", help="what is broken if it fails")


def _record(a: argparse.Namespace) -> int:
    root, cases = _selected(a)
    with progress("recording", len(cases), Console()) as done:
        errors = golden.record(root, cases, a.j, done)
    print(f"{counted(len(cases) - len(errors), 'candidate')} in {root / 'candidates'}")
    return _said(errors)


def _verify(a: argparse.Namespace) -> int:
    root, cases = _selected(a)
    with progress("verifying", len(cases), Console()) as done:
        problems = golden.verify(root, cases, a.j, done)
    extra = []
    if a.case is None:
        known = {case.id for case in cases}
        extra = [
            f"case {key}: in the manifest, but in no case file; restore the case, or bless"
            for key in sorted(golden.Store(root, golden.make).cases)
            if key.partition("@")[0] not in known
        ]
    print(f"{len(cases) - len(problems)} of {len(cases)} goldens are what the oracle computes")
    return _said(problems + extra)


def _diff(a: argparse.Namespace) -> int:
    root = root_of(a)
    table = Table()
    for name in ("case", "tensor", "what"):
        table.add_column(name)
    for name in ("elements", "ULPs"):
        table.add_column(name, justify="right")
    changes = golden.diff(root, load_cases(root))
    for c in changes:
        ulps = "" if c.ulps is None else str(c.ulps)
        table.add_row(c.case_id, c.tensor, c.what, str(c.elements or ""), ulps)
    if changes:
        Console().print(table)
    print(
        f"{counted(len(changes), 'change')}; `megamoe golden bless` makes them"
        if changes
        else "no changes"
    )
    return 0


def _bless(a: argparse.Namespace) -> int:
    root = root_of(a)
    if a.durations:
        count = golden.bless_durations(root, [merge.read_report(path) for path in a.durations])
        print(f"{counted(count, 'duration')} taken")
        return 0
    blessed = golden.bless(root, load_cases(root))
    print(f"{counted(len(blessed), 'golden')} blessed; commit {root}")
    return 0


def _import(a: argparse.Namespace) -> int:
    if not a.golden:
        raise ValueError("golden import: say where with --golden DIR, a directory of your own; it "
                         "is made if it is not there")  # fmt: skip
    case = import_file(Path(a.golden), Path(a.file), a.name, a.breaks)
    root = shlex.quote(a.golden)
    print(f"{case.source}: case {case.id}; its golden is recorded as a candidate")
    print(f"next: megamoe golden bless --golden {root}")
    print(f"then: megamoe check --golden {root} --case {case.id} --backend B")
    return 0


def _selected(a: argparse.Namespace) -> tuple[Path, list[Case]]:
    root = root_of(a)
    cases = select(load_cases(root), glob=a.case)
    if not cases:
        raise UsageError(f"no cases under {root / 'cases'}")
    return root, cases


def _said(errors: list[str]) -> int:
    for error in sorted(errors):
        print(f"megamoe: error: {error}", file=sys.stderr)
    return 1 if errors else 0
