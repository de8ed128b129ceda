"""A red for the terminal: where the error sits, the worst element, and how to see it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Final

from megamoe.judge.verdict import Finding, Verdict
from megamoe.printable import counted
from megamoe.spec.stages import STAGES

SHADES: Final = ".:+*#@"
"""Nothing outside, then ever larger shares of a cell's elements."""
MAX_LINES: Final = 24
MAX_COLUMNS: Final = 72


def picture(verdict: Verdict, backend: str, options: str = "", brief: bool = False) -> str:
    """Several lines; ``options`` are further options of the command that shows it alone.
    ``brief``: of the wrong stages only the first; the first line names all."""
    reason = verdict.reason.removeprefix(f"case {verdict.case_id}: ")
    lines = [f"{verdict.status.upper()} {verdict.case_id}: {reason}"]
    wrong = [finding for finding in verdict.findings if finding.outside]
    for finding in wrong[:1] if brief else wrong:
        lines += ["", *_finding(finding)]
    if verdict.how:
        lines += ["", f"judged: {', '.join(verdict.how)}"]
    command = f"megamoe check --backend {shlex.quote(backend)} --case {verdict.case_id}{options}"
    return "\n".join([*lines, f"alone:  {command}"])


def _finding(finding: Finding) -> list[str]:
    has_tokens = finding.stage in STAGES or getattr(finding.worst, "token", None) is not None
    of = ", counted over all tokens" if has_tokens else ""
    out = [f"{finding.stage}: {finding.outside} of {finding.total} elements outside{of}"]
    if finding.worst:
        out.append(f"  worst   {finding.worst.line()}")
    tallies = (("rows", finding.rows), ("experts", finding.experts), ("tiles", finding.tiles))
    out += [f"  {name:<7} {_tally(tally)}" for name, tally in tallies if tally]
    return out + _map(finding)


def _tally(tally: Mapping[int, int], most: int = 8) -> str:
    shown = [f"{key}: {count}" for key, count in list(tally.items())[:most]]
    more = f", and {len(tally) - most} more" if len(tally) > most else ""
    return ", ".join(shown) + more


def _map(finding: Finding) -> list[str]:
    """Rows down, 128-channel tiles across; cells are joined where there are too many."""
    rows, tiles = finding.shape
    if rows * tiles <= 1 or not finding.grid:
        return []
    down, across = -(-rows // MAX_LINES), -(-tiles // MAX_COLUMNS)
    cells: dict[tuple[int, int], int] = {}
    for row, tile, count in finding.grid:
        key = (row // down, tile // across)
        cells[key] = cells.get(key, 0) + count
    most = max(cells.values())
    head = f"  map     {counted(rows, 'row')} x {counted(tiles, 'tile')} of 128 channels"
    if down > 1 or across > 1:
        head += f", one character for {down} x {across}"
    out = [f"{head}; {SHADES[-1]} is {counted(most, 'element')}"]
    for line in range(-(-rows // down)):
        shades = "".join(
            _shade(cells.get((line, column), 0), most) for column in range(-(-tiles // across))
        )
        out.append(f"  {line * down:>7} {shades}")
    return out


def _shade(count: int, most: int) -> str:
    if not count:
        return SHADES[0]
    return SHADES[1 + (count * (len(SHADES) - 2)) // most]
