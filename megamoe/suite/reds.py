"""The reds of a run by cause, at its end: one picture for each cause and kind."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.console import Console

from megamoe.judge import BAD, Cause, Verdict, causes, picture

PICTURES: Final = 20
"""Pictures that a run shows, and fails whose details it keeps for a report."""
NAMED: Final = 6
"""Cases of a cause that are named without a picture."""
_OF_VERDICT: Final = tuple(Verdict.__dataclass_fields__)


def show(report: Mapping[str, Any], console: Console, pictures: int = PICTURES) -> None:
    """Print the reds of ``report``, each cause once, with at most ``pictures`` pictures in all;
    then what was shortened, and how to see it. Nothing where nothing is red."""
    reds = [case for case in report["cases"] if case["status"] in BAD]
    if not reds:
        return
    found = causes(reds)
    _say(console, f"{len(reds)} red of {_count(found)}\n")
    left, shown = pictures, 0
    for cause in found:
        kinds = Counter(case["kind"] for case in cause.cases)
        _say(console, f"{cause.line}  [{', '.join(f'{k} {n}' for k, n in kinds.items())}]")
        here = cause.pictured[: max(0, left)]
        left, shown = left - len(here), shown + len(here)
        for case in here:
            _say(console, f"\n{_indented(_picture(report, case))}")
        others = [case["id"] for case in cause.cases if case not in here]
        if others:
            more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
            before = "\n  also " if here else "  "
            _say(console, f"{before}{', '.join(others[:NAMED])}{more}")
        _say(console, "")
    for line in shortened(report, found, len(reds) - shown, pictures):
        _say(console, line)


def _count(found: Sequence[Cause]) -> str:
    return f"{len(found)} causes" if len(found) != 1 else "one cause"


def _picture(report: Mapping[str, Any], case: Mapping[str, Any]) -> str:
    verdict = Verdict.from_dict({k: v for k, v in case.items() if k in (*_OF_VERDICT, "id")})
    return picture(verdict, report["backend"], report.get("options", ""))


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())


def shortened(
    report: Mapping[str, Any], found: Sequence[Cause], without: int, pictures: int
) -> list[str]:
    """What is not shown of the reds, and the commands that show it."""
    out = []
    if without:
        alone = f"megamoe check --backend {shlex.quote(report['backend'])} --case ID"
        alone += report.get("options", "")
        one = " One stands for each cause and kind, at most "
        out.append(
            f"shortened: {without} reds have no picture here."
            f"{f'{one}{pictures} (--pictures).' if pictures else ''} `{alone}` shows that of a case"
        )
    brief = [case for cause in found for case in cause.cases if case.get("shortened")]
    if brief:
        out.append(
            f"shortened: {len(brief)} fails came after the first {pictures}, so a report has no "
            f"map of them ({brief[0]['id']} is one); `--pictures N` keeps more"
        )
    return out


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
