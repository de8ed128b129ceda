"""``megamoe fuzz``: judge a backend on problems that are drawn, and reduce the first failure."""

from __future__ import annotations

import argparse
import shlex
from contextlib import suppress

from megamoe.cases.stored_names import new_file, title
from megamoe.commands.output import complain
from megamoe.commands.parsers.fuzz import WORKERS_OF_A_GPU
from megamoe.commands.reduce import causes_of_whole
from megamoe.commands.shared import picture_of, replay_command
from megamoe.console import Console
from megamoe.fuzz import Options, Outcome, fuzz
from megamoe.suite.settings import Settings
from megamoe.suite.stops import release


def run(a: argparse.Namespace) -> int:
    """Judge, and say what was found: 0 for nothing, 1 for a failure, 2 if nothing was judged."""
    settings = Settings.read(lambda name: getattr(a, name, None))
    if a.out:
        new_file(a.out)
    workers = a.workers or (a.jobs if settings.device == "cpu" else min(a.jobs, WORKERS_OF_A_GPU))
    request = Options(a.seed, a.seconds, a.problems, a.only, a.wide, a.reduce_seconds, a.out)
    backend = f"megamoe fuzz --backend {shlex.quote(settings.backend)}{settings.again()}"
    wide = " --wide" if a.wide else ""
    console = Console()
    try:
        alone = f"{backend}{wide} --seed {a.seed} --only"
        outcome = fuzz(
            settings, request, a.jobs, workers, console, lambda n: f"{alone} {n}", causes_of_whole
        )
        with suppress(BrokenPipeError):
            _say(outcome, a, settings)
    finally:
        release()
    if outcome.stop_reason:
        complain(f"stopped: {outcome.stop_reason}")
    if outcome.first is None and not outcome.stop_reason and not outcome.tally.problems:
        complain("nothing was judged; the reasons stand above")
        return 2
    return 1 if outcome.first else outcome.code


def _say(outcome: Outcome, a: argparse.Namespace, settings: Settings) -> None:
    """The summary of a run without a failure. Else the picture of the failure, its cause, where it
    lies, and what to do next."""
    artifact, tally, first = outcome.remains, outcome.tally, outcome.first
    if first is None:
        tally.summary()
    if artifact is not None:
        again = replay_command(str(artifact.path), settings.backend, settings.device, a.contract)
        if artifact.verdict is not None:
            name = title(str(artifact.path), artifact.about)
            tally.say(f"\n{picture_of(artifact.verdict, name, settings.backend, again)}\n")
        if artifact.causes and artifact.causes.lines:
            tally.say(f"{artifact.causes.text(artifact.about['reduced_from']).lstrip()}\n")
        tally.say(f"{artifact.path}: {artifact.note or 'reduced'}")
        if artifact.passes and first is not None:  # the file would show nothing
            words = f"--backend {shlex.quote(settings.backend)}{settings.again()}"
            wide = " --wide" if a.wide else ""
            count = f"--seed {a.seed} --problems {first[0].number + 1}{wide} --jobs 1 --workers 1"
            tally.say(f"with those before it, in one process: megamoe fuzz {words} {count}")
            tally.say(f"next: megamoe check {words}")
            return
        tally.say(f"reproduce: {again}")
        if first is not None and first[1].status == "fail":
            tally.say(f"next: {again.replace(' replay ', ' explain ', 1)}")
