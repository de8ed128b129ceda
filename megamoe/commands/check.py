"""``megamoe check``: judge a backend against the goldens."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress

from megamoe.commands.output import complain, write_reports
from megamoe.console import Console
from megamoe.suite import check, next_command, reds, results
from megamoe.suite.settings import Settings, is_default
from megamoe.suite.stops import Stop, release
from megamoe.suite.summary import print_summary


def run(a: argparse.Namespace) -> int:
    """Judge, and say how it went."""
    settings = Settings.read(lambda name: getattr(a, name, None))
    workers = a.workers or (a.n if settings.device == "cpu" else 1)
    ranks = settings.ranks()
    speaks = ranks is None or 0 in ranks.here
    console = Console(quiet=not speaks)  # under torchrun the judges of all ranks see the same
    if not speaks:
        a.json = a.junit = None
    try:
        outcome = check.check(
            settings,
            a.n,
            workers,
            console,
            a.pictures,
            a.maxfail,
            a.quiet,
            a.explain_predictions,
            a.verbose,
            a.in_order,
            learns=is_default("timeout", a.timeout),
        )
        if not speaks:
            return _silent(outcome)
        return _finish(a, outcome, console)
    except Stop as stopped:  # before the backend was loaded
        print(f"megamoe: stopped ({stopped}); nothing was judged", file=sys.stderr)
        return stopped.code
    finally:
        release()


def _silent(outcome: check.Outcome) -> int:
    """Of a rank of torchrun besides the first: a line for the first error, which others may know
    only by its effect. The first rank judges what all have, and has the exit status: torchrun ends
    every process as soon as one of them fails."""
    errors = [c["reason"] for c in outcome.report["cases"] if c["status"] == "error"]
    if errors:
        complain(errors[0])
    return outcome.code


def _finish(a: argparse.Namespace, outcome: check.Outcome, console: Console) -> int:
    """Write the reports and show the table; the exit status."""
    lines = next_command.lines_of(outcome.report, outcome.cases, outcome.alone)
    if lines:
        outcome.report["next"] = lines
    wrong = write_reports(a, outcome.report)
    with suppress(BrokenPipeError):
        is_folded = reds.show(outcome.report, console, a.pictures, outcome.cases, outcome.alone)
        print_summary(outcome.report, console)
        next_command.show_next(lines, console, outcome.alone, is_folded)
    if outcome.stop_reason:
        complain(f"stopped: {outcome.stop_reason}")
    return outcome.code or results.exit_code(outcome.report["counts"]) or (2 if wrong else 0)
