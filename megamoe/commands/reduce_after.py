"""``megamoe reduce CASE --after``: the earlier cases after which a case fails that passes alone."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from typing import Final

from megamoe.cases import Case, load_cases, select
from megamoe.cases.pattern import in_order
from megamoe.commands.shared import case_without_ranks
from megamoe.commands.work import Work
from megamoe.printable import quantity
from megamoe.reduce.before import After, Search, more_seconds
from megamoe.suite.next_command import OUTLIVES
from megamoe.suite.settings import Settings

MAX_NAMES: Final = 6
"""Earlier cases that a sentence names."""
MAX_ARGUMENTS: Final = 60
"""Earlier cases of a list that may be longer than needed, which a command names."""
ALONE: Final = "run it alone"
"""What the judge and the worker advise about a red among others; this one passes alone."""


def run(a: argparse.Namespace) -> int:
    """Find them, and show the command that shows it."""
    settings = Settings.read(lambda name: getattr(a, name, None))
    root = settings.root
    case = case_without_ranks(root, a.subject, "reduce")
    every = load_cases(root)
    among, first = (in_order(every, names) if names else [] for names in (a.among, a.first))
    with Work(f"looking for the case after which {case.id} fails") as work:
        search = Search(
            settings.launch(), root, case, settings.timeout, a.seconds, work.say, work.pulse
        )
        finding = search.find(select(every, None, "quick", None), among, first)
    print("\n".join(lines_of(finding, case, a.backend, a.seconds, settings.again())))
    return 0


def lines_of(finding: After, case: Case, backend: str, seconds: float, options: str) -> list[str]:
    """What the search found, the command that shows it, and the one that goes further where the
    time was over. ``options``: further ones of a command, which begin with a space."""
    names = ",".join(one.id for one in finding.earlier)
    words = f"--backend {shlex.quote(backend)}"
    headline = f"{case.id} is red after {after_what(finding, case)}; it passes alone: {OUTLIVES}"
    both = shlex.quote(f"{names},{case.id}")
    reproduce = f"reproduce: megamoe check {words} --case {both} --in-order{options}"
    reason = f"  {finding.verdict.reason.replace(ALONE, 'run the reproduce line')}"
    if finding.is_least:
        return ["", headline, reason, reproduce]
    count = len(finding.earlier)
    late = f"the time is over ({seconds:g} s): fewer than these {count} may be enough"
    further = f"next: megamoe reduce {case.id} --after"
    more = f"--seconds {more_seconds(seconds):g} {words}{options}"
    if count > MAX_ARGUMENTS:
        reason = f"  {finding.verdict.reason.partition(f'; {ALONE}')[0]}"
        return ["", late, headline, reason, f"{further} {more}"]
    return ["", late, headline, reason, reproduce, f"{further} --among {shlex.quote(names)} {more}"]


def after_what(finding: After, case: Case) -> str:
    """The cases after which a case is red, for a sentence."""
    earlier = finding.earlier
    if len(earlier) == 1:
        return "itself, in its second run" if earlier[0].id == case.id else earlier[0].id
    together = f"{quantity(len(earlier), 'case')} together"
    if not finding.is_least:
        return together
    many = len(earlier) > MAX_NAMES
    why = ", as where a count grows and is not reset" if many else f": {_ids(earlier)}"
    return f"{together} and after none of them alone{why}"


def _ids(cases: Sequence[Case]) -> str:
    return ", ".join(one.id for one in cases)
