"""``megamoe golden predict``, ``bless-predictions`` and ``verify-predictions``."""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from megamoe import golden
from megamoe.cases import load_cases, select
from megamoe.commands.shared import progress, root_of
from megamoe.console import Console
from megamoe.golden import predicted
from megamoe.predict import SM100
from megamoe.predict import record as predictions
from megamoe.printable import part, verb

MAX_CHANGES = 20
"""Changes that are named."""


def run_predict(a: argparse.Namespace) -> int:
    """Compute predictions as candidates."""
    root = root_of(a)
    cases = predictions.selection(select(load_cases(root), "forward", glob=a.case))
    with progress("predicting", len(cases), Console(stderr=True)) as on_result:
        path, faults = predictions.record(root, cases, SM100, a.j, on_result, a.envelope)
    for line in faults:
        print(line, file=sys.stderr)
    if path is None:
        return 1
    changes = golden.predicted.changes(root, SM100.name)
    for line in changes[:MAX_CHANGES]:
        print(line)
    kinds = Counter(line.partition(": ")[2] for line in changes)
    summary = ", ".join(f"{count} {what}" for what, count in kinds.items()) or "no changes"
    print(f"{path}: {summary}{_inside(a)}")
    return 0


def run_bless(a: argparse.Namespace) -> int:
    """Make the candidates the predicted goldens."""
    paths = predicted.bless(root_of(a))
    print(f"{', '.join(map(str, paths))}: blessed; commit {root_of(a) / predicted.FOLDER}")
    return 0


def run_verify(a: argparse.Namespace) -> int:
    """Compute the predicted goldens again; exit status 1 where one differs."""
    root = root_of(a)
    cases = predictions.selection(select(load_cases(root), "forward", glob=a.case))
    with progress("predicting", len(cases), Console(stderr=True)) as on_result:
        faults = predictions.verify(root, cases, SM100, a.j, on_result, a.envelope)
    same = len(cases) - len(faults)
    have = f"{part(same, len(cases), 'prediction')} {verb(same, 'has', 'have')}"
    print(f"{have} the same bits{_inside(a)}")
    for line in faults:
        print(line, file=sys.stderr)
    return 1 if faults else 0


def _inside(a: argparse.Namespace) -> str:
    return "; each lies inside its certified envelope" if a.envelope else ""
