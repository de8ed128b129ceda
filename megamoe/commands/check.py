"""``megamoe check``: judge a backend against the goldens."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from megamoe.cases import KINDS, TIERS
from megamoe.commands import UsageError
from megamoe.commands.options import (
    DEFAULT_WORKERS,
    add_case,
    add_contract,
    add_reports,
    at_least_one,
    seconds,
)
from megamoe.commands.shared import complain, write_reports
from megamoe.console import Console
from megamoe.suite import check, reds, results
from megamoe.suite.settings import Settings
from megamoe.suite.stops import Stopped, release


def add(commands: Any, command: Any) -> None:
    """The parser of ``check``."""
    c = command(commands, "check", "judge a backend against the goldens", run)
    c.add_argument("--backend", required=True, help="a name, or path/to/file.py:OBJECT_OR_FACTORY")
    c.add_argument("--kind", choices=KINDS)
    c.add_argument("--tier", choices=TIERS, help="default: quick; full where --case is given")
    add_case(c)
    add_contract(c)
    c.add_argument("--failed", metavar="REPORT", help="only cases that failed in a JSON report")
    c.add_argument("--shard", metavar="I/N", help="the I-th of N parts, balanced by duration")
    c.add_argument("-n", type=at_least_one, default=DEFAULT_WORKERS, metavar="N",
                   help=f"judging processes (default {DEFAULT_WORKERS})")  # fmt: skip
    c.add_argument("--workers", type=at_least_one, metavar="N",
                   help="processes that run it (default: 1 on a GPU, else as -n)")  # fmt: skip
    c.add_argument("--python", dest="interpreter", metavar="PYTHON",
                   help="the Python that runs the backend; it needs torch only")  # fmt: skip
    c.add_argument("--timeout", type=seconds, help="seconds of the backend a case (default 120)")
    c.add_argument("--load-timeout", type=seconds,
                   help="seconds until the backend is loaded (default 300)")  # fmt: skip
    c.add_argument("--quiet", "-q", action="store_true",
                   help="lines for reds only; the end counts the rest")  # fmt: skip
    c.add_argument("--maxfail", type=at_least_one, metavar="N", help="stop after N reds")
    c.add_argument("--pictures", type=at_least_one, default=reds.PICTURES, metavar="N",
                   help="pictures at the end, and fails that a report draws "
                   f"(default {reds.PICTURES})")  # fmt: skip
    c.add_argument("--explain-predictions", action="store_true",
                   help="which change of a model gives an output unlike its bits")  # fmt: skip
    add_reports(c)
    c.add_argument("--device", choices=("cpu", "cuda"))


def run(a: argparse.Namespace) -> int:
    """Judge, and say how it went."""
    settings = Settings.read(lambda name: getattr(a, name, None))
    for path in (a.json, a.junit):
        if path and Path(path).is_dir():
            raise UsageError(f"{path} is a directory; name a file")
    workers = a.workers or (a.n if settings.device == "cpu" else 1)
    console = Console()
    try:
        made = check.check(
            settings, a.n, workers, console, a.pictures, a.maxfail, a.quiet, a.explain_predictions
        )
        return _finished(a, made, console)
    except Stopped as stopped:  # before the backend was loaded
        print(f"megamoe: stopped ({stopped}); nothing was judged", file=sys.stderr)
        return stopped.code
    finally:
        release()


def _finished(a: argparse.Namespace, outcome: check.Outcome, console: Console) -> int:
    """Write the reports and show the table; the exit status."""
    wrong = write_reports(a, outcome.report)
    with suppress(BrokenPipeError):
        reds.show(outcome.report, console, a.pictures)
        results.print_summary(outcome.report, console)
        reds.show_next(outcome.report, console)
    if outcome.stopped:
        complain(f"stopped: {outcome.stopped}")
    return outcome.code or results.exit_code(outcome.report["counts"]) or (2 if wrong else 0)
