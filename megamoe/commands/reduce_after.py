"""``megamoe reduce CASE --after``: the earlier cases after which a case fails that passes alone."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from typing import Final

from megamoe.cases import Case, load_cases, select
from megamoe.cases.pattern import STORED, in_order
from megamoe.commands.shared import case_without_ranks
from megamoe.commands.work import Work
from megamoe.printable import counted
from megamoe.reduce.before import After, Search, more_seconds
from megamoe.suite.next_command import OUTLIVES
from megamoe.suite.settings import Settings

NAMED: Final = 6
"""Earlier cases that a sentence names."""
SHOWN: Final = 60
"""Earlier cases of a list that may be longer than needed, which a command names."""
ALONE: Final = "run it alone"
"""What the judge and the worker advise about a red among others; this one passes alone."""


def run(a: argparse.Namespace) -> int:
    """Find them, and show the command that shows it."""
    if a.out:
        raise ValueError("--out: --after writes no file; leave one of the two out")
    if a.subject.endswith(STORED):
        raise ValueError(f"--after: {a.subject} holds one call and no case; name a case")
    settings = Settings.read(lambda name: getattr(a, name, None))
    root = settings.root
    case = case_without_ranks(root, a.subject, "reduce")
    every = load_cases(root)
    among = in_order(every, a.among) if a.among else []
    with Work(f"looking for the case after which {case.id} fails") as work:
        search = Search(
            settings.launch(), root, case, settings.timeout, a.seconds, work.say, work.pulse
        )
        found = search.find(select(every, None, "quick", None), among)
    print("\n".join(lines_of(found, case, a.backend, a.seconds, settings.again())))
    return 0


def lines_of(found: After, case: Case, backend: str, seconds: float, options: str) -> list[str]:
    """What the search found, the command that shows it, and the one that goes further where the
    time was over. ``options``: further ones of a command, which begin with a space."""
    names = ",".join(one.id for one in found.earlier)
    words = f"--backend {shlex.quote(backend)}"
    said = f"{case.id} is red after {after_what(found, case)}; it passes alone: {OUTLIVES}"
    both = shlex.quote(f"{names},{case.id}")
    reproduce = f"reproduce: megamoe check {words} --case {both} --in-order{options}"
    reason = f"  {found.verdict.reason.replace(ALONE, 'run the reproduce line')}"
    if found.is_least:
        return ["", said, reason, reproduce]
    count = len(found.earlier)
    late = f"the time is over ({seconds:g} s): fewer than these {count} may be enough"
    further = f"next: megamoe reduce {case.id} --after"
    more = f"--seconds {more_seconds(seconds):g} {words}{options}"
    if count > SHOWN:
        reason = f"  {found.verdict.reason.partition(f'; {ALONE}')[0]}"
        return ["", late, said, reason, f"{further} {more}"]
    return ["", late, said, reason, reproduce, f"{further} --among {shlex.quote(names)} {more}"]


def after_what(found: After, case: Case) -> str:
    """The cases after which a case is red, for a sentence."""
    earlier = found.earlier
    if len(earlier) == 1:
        return "itself, in its second run" if earlier[0].id == case.id else earlier[0].id
    together = f"{counted(len(earlier), 'case')} together"
    if not found.is_least:
        return together
    many = len(earlier) > NAMED
    why = ", as where a count grows and is not reset" if many else f": {_listed(earlier)}"
    return f"{together} and after none of them alone{why}"


def _listed(cases: Sequence[Case]) -> str:
    return ", ".join(one.id for one in cases)
