"""What verbs that judge write: reports, and a line on standard error."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress
from typing import Any

from megamoe.suite import results


def write_reports(a: argparse.Namespace, report: dict[str, Any]) -> bool:
    """Write what ``--json`` and ``--junit`` ask for; whether a file could not be written."""
    wrong = []
    if a.json:
        wrong.append(results.write(a.json, (json.dumps(report, indent=1) + "\n").encode()))
    if a.junit:
        wrong.append(results.write(a.junit, results.junit(report)))
    for text in filter(None, wrong):
        complain(text)
    return any(wrong)


def complain(text: str) -> None:
    """One line on standard error, if somebody still reads there."""
    with suppress(BrokenPipeError):
        print(f"megamoe: error: {text}", file=sys.stderr)
