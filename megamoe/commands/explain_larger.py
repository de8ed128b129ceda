"""The larger case that ``megamoe explain`` names where the data of one tells no cause."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Final

from megamoe.cases import Case, load_cases, shards
from megamoe.commands.shared import further_options
from megamoe.commands.work import Work
from megamoe.golden import Store, make
from megamoe.judge import BAD
from megamoe.spec.contract import contract
from megamoe.suite.next_command import wrong_tokens
from megamoe.suite.runner import Runner
from megamoe.suite.settings import Settings
from megamoe.suite.telling import has_pattern, larger
from megamoe.worker.client import Worker
from megamoe.worker.session import WorkerError

TRIED: Final = 4
"""Larger cases that are judged."""
SECONDS: Final = 10.0
"""No further one is begun after this time, and none that is recorded to take as long."""


def line(a: argparse.Namespace, case: Case) -> str:
    """The larger case to explain in place of ``case``, which has just been judged red; what it
    means if none is; empty where there is no larger case. Without a backend, which would have to
    run, the one that may be red."""
    settings = Settings.read(lambda name: getattr(a, name, None))
    found = larger(case, load_cases(settings.root))
    if not a.backend:
        return f"try a larger case, if it is red too: {found[0].id}" if found else ""
    seconds = shards.durations(settings.root)
    short = [one for one in found if seconds.get(one.id, shards.DEFAULT_SECONDS) < SECONDS]
    if not short:
        return ""
    with Work("judging larger cases"):
        red, passed = _judged(settings, islice(short, TRIED))
    if red is not None:
        command = f"megamoe explain {red.id} --backend {shlex.quote(a.backend)}{further_options(a)}"
        return f"a larger case is red too, and may tell more: `{command}`"
    if not passed:
        return ""
    these = "a larger case passes" if len(passed) == 1 else "larger cases pass"
    return f"{these}: {', '.join(one.id for one in passed)}"


def _judged(settings: Settings, cases: Iterable[Case]) -> tuple[Case | None, Sequence[Case]]:
    """The first red whose wrong tokens show a pattern, else the first red; and those that pass."""
    red, passed, until = None, list[Case](), time.perf_counter() + SECONDS
    try:
        with Worker(settings.launch()) as worker:
            rule = contract(worker.identity.contract)
            runner = Runner(worker, Store(settings.root, make, rule), None, SECONDS)
            runner.brief = True
            for case in cases:
                if time.perf_counter() > until or rule.revision not in case.revisions:
                    continue
                verdict = runner.run(case)
                if verdict.status in BAD:
                    red = red or case
                    if has_pattern(wrong_tokens(verdict.to_dict()), case.params["tokens"]):
                        return case, passed
                elif verdict.status == "pass":
                    passed.append(case)
    except WorkerError:  # it ran a moment ago; what was found stands
        pass
    return red, passed
