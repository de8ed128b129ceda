"""A red for the terminal: where the error sits, the worst element, and how to see it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any, Final

from megamoe.judge.verdict import JUDGED_SIDES, Finding, Verdict
from megamoe.printable import quantity
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
    wrong = "outside"
    if finding.sides != JUDGED_SIDES:  # there is no envelope to lie outside of
        wrong = f"have other bits than the {finding.sides[0]}"
    out = [
        f"{finding.stage}: {finding.outside} of {quantity(finding.total, 'element')} {wrong}{of}"
    ]
    if finding.worst:
        out.append(f"  worst   {finding.worst.line(finding.sides)}")
    tallies = (("rows", finding.rows), ("experts", finding.experts), ("tiles", finding.tiles))
    note = experts_note(finding.stage, finding.outside, finding.experts)
    out += [
        f"  {name:<7} {_tally(tally)}{note if name == 'experts' else ''}"
        for name, tally in tallies if tally
    ]  # fmt: skip
    return out + _map(finding)


def experts_note(stage: str, outside: int, experts: Mapping[Any, int]) -> str:
    """Why the counts by expert add up to more than the elements ``outside``; empty if they do not.
    An element of y is a sum over the experts of its token: each of them may be the wrong one."""
    more = sum(experts.values()) > outside
    return f"; an element of {stage} counts for each expert of its token" if more else ""


def _tally(tally: Mapping[int, int], most: int = 8) -> str:
    parts = [f"{key}: {count}" for key, count in list(tally.items())[:most]]
    more = f", and {len(tally) - most} more" if len(tally) > most else ""
    return ", ".join(parts) + more


def _map(finding: Finding) -> list[str]:
    """Rows down, 128-channel tiles across. Three rows or more that look alike and follow each other
    are one line; where these lines are too many, several rows are one character."""
    rows, tiles = finding.shape
    if rows * tiles <= 1 or not finding.grid:
        return []
    across = -(-tiles // MAX_COLUMNS)
    lines, most, down = *_lines(finding, 1, across), 1
    if len(lines) > MAX_LINES:
        down = -(-rows // MAX_LINES)
        lines, most = _lines(finding, down, across)
    head = f"  map     {quantity(rows, 'row')} x {quantity(tiles, 'tile')} of 128 channels"
    if down > 1 or across > 1:
        head += f", one character for {down} x {across}"
    out = [f"{head}; {SHADES[-1]} is {quantity(most, 'element')}"]
    names = finding.tokens or range(rows)  # as in the other lines: tokens, not places in the tensor
    for first, after, shades in lines:
        many = after - first
        if many <= 2 * down:
            out += [f"  {names[row]:>7} {shades}" for row in range(first, after, down)]
        else:
            alike = f"{many} rows alike: {names[first]} to {names[after - 1]}"
            out.append(f"  {names[first]:>7} {shades}  {alike}")
    return out


def _lines(finding: Finding, down: int, across: int) -> tuple[list[tuple[int, int, str]], int]:
    """Runs of rows of one look, as first row, row after the last and characters; and the most
    elements of a cell of ``down`` rows and ``across`` tiles."""
    rows, tiles = finding.shape
    cells: dict[int, dict[int, int]] = {}
    for row, tile, count in finding.grid:
        of_row = cells.setdefault(row // down, {})
        of_row[tile // across] = of_row.get(tile // across, 0) + count
    most = max(max(of_row.values()) for of_row in cells.values())
    columns = -(-tiles // across)
    right = SHADES[0] * columns
    runs: list[tuple[int, int, str]] = []
    for line in range(-(-rows // down)):
        of_row = cells.get(line, {})
        shades = right
        if of_row:
            shades = "".join(_shade(of_row.get(column, 0), most) for column in range(columns))
        first, after = line * down, min(rows, (line + 1) * down)
        if rows > MAX_LINES and runs and runs[-1][2] == shades:
            first = runs.pop()[0]
        runs.append((first, after, shades))
    return runs, most


def _shade(count: int, most: int) -> str:
    if not count:
        return SHADES[0]
    return SHADES[1 + (count * (len(SHADES) - 2)) // most]
