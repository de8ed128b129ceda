"""``megamoe golden``: record, diff, bless and verify the goldens; import a case.

The acts on a backend's own bits are in :mod:`.bits`, those on predictions in :mod:`.predictions`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from rich.table import Table

from megamoe import golden
from megamoe.cases import Case, load_cases, select
from megamoe.commands import UsageError
from megamoe.commands.shared import progress, root_of
from megamoe.console import Console
from megamoe.golden.imported import import_file
from megamoe.printable import part, quantity, verb
from megamoe.suite.shard_report import read_report


def run_record(a: argparse.Namespace) -> int:
    """Compute candidates; the exit status."""
    root, cases = _selection(a)
    with progress("recording", len(cases), Console(stderr=True)) as on_result:
        errors = golden.record(root, cases, a.j, on_result)
    print(f"{quantity(len(cases) - len(errors), 'candidate')} in {root / 'candidates'}")
    return _report(errors)


def run_verify(a: argparse.Namespace) -> int:
    """Compute the goldens again; exit status 1 where one differs."""
    root, cases = _selection(a)
    with progress("verifying", len(cases), Console(stderr=True)) as on_result:
        problems = golden.verify(root, cases, a.j, on_result)
    extra = []
    if a.case is None:
        ids = {case.id for case in cases}
        extra = [
            f"case {key}: in the manifest, but in no case file; restore the case, or bless"
            for key in sorted(golden.Store(root, golden.make).cases)
            if key.partition("@")[0] not in ids
        ]
    right = len(cases) - len(problems)
    print(f"{part(right, len(cases), 'golden')} {verb(right)} what the oracle computes")
    return _report(problems + extra)


def run_diff(a: argparse.Namespace) -> int:
    """A table of what blessing would change."""
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
        f"{quantity(len(changes), 'change')}; `megamoe golden bless` makes them"
        if changes
        else "no changes"
    )
    return 0


def run_bless(a: argparse.Namespace) -> int:
    """Make the candidates the goldens, or take durations from reports."""
    root = root_of(a)
    if a.durations:
        count = golden.bless_durations(root, [read_report(path) for path in a.durations])
        print(f"{quantity(count, 'duration')} taken")
        return 0
    goldens = golden.bless(root, load_cases(root))
    print(f"{quantity(len(goldens), 'golden')} blessed; commit {root}")
    return 0


def run_import(a: argparse.Namespace) -> int:
    """Make a stored problem a case, with its candidate."""
    if not a.golden:
        raise ValueError("golden import: say where with --golden DIR, a directory of your own; it "
                         "is made if it is not there")  # fmt: skip
    case = import_file(Path(a.golden), Path(a.file), a.name, a.breaks)
    root = shlex.quote(a.golden)
    print(f"{case.source}: case {case.id}; its golden is recorded as a candidate")
    print(f"next: megamoe golden bless --golden {root}")
    print(f"then: megamoe check --golden {root} --case {case.id} --backend B")
    return 0


def _selection(a: argparse.Namespace) -> tuple[Path, list[Case]]:
    root = root_of(a)
    cases = select(load_cases(root), glob=a.case)
    if not cases:
        raise UsageError(f"no cases under {root / 'cases'}")
    return root, cases


def _report(errors: list[str]) -> int:
    for error in sorted(errors):
        print(f"megamoe: error: {error}", file=sys.stderr)
    return 1 if errors else 0
