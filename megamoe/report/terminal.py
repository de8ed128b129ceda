"""The report in the terminal: the same views, drawn with characters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megamoe.judge import TO_CATCH
from megamoe.printable import part, quantity
from megamoe.report import compared, draw, read, views
from megamoe.report.read import View

MOST: Final = 20
"""Failures that are shown in full, each for all of its symptom; the rest get a line each."""
CASES_AT_MOST: Final = 8
"""Further cases of one symptom that are named."""
SHADES: Final = ".1248▒▓±N"
"""A map's characters: the first ULPs of :data:`draw.STEPS`' bins, then shades, sign and NaN."""
BAR: Final = 32


def show(kind: str, result: read.Result, console: Console) -> None:
    """Print the report of a result of this kind."""
    {"run": _run, "ab": _ab, "bisect": _bisect}[kind](result, console)


def _say(console: Console, text: str = "") -> None:
    console.print(Text(text), soft_wrap=True)


def _run(result: Mapping[str, Any], console: Console) -> None:
    view = views.view(result)
    _say(console, view["verdict"])
    for line in view["warnings"]:
        _say(console, f"note: {line}")
    for name, pairs in view["facts"]:
        _say(console, f"\n{name}")
        for key, value in pairs:
            _say(console, f"  {key:<26} {value}")
    if view["recorded"]:
        _say(console, view["recorded"])
    grid = view["grid"]
    table = Table("shape", *grid["kinds"], title="kinds and shapes", title_justify="left")
    for row in grid["rows"]:
        cells = ("\n".join(f"{c['label']} {c['text']}".strip() for c in cell)
                 for cell in row["cells"])  # fmt: skip
        table.add_row(row["name"], *(Text(cell) for cell in cells))
    if grid["rows"]:
        _say(console)
        console.print(table)
    for failure in view["failures"][:MOST]:
        _failure(failure, console)
    for failure in view["failures"][MOST:]:
        many = f" and {len(failure['same'])} more" if failure["same"] else ""
        _say(console, f"{failure['status'].upper()} {failure['id']}{many}: {failure['reason']}")
    if len(view["failures"]) > MOST:
        _say(console, f"the first {MOST} are shown in full; `-o FILE.html` draws more")
    for count, status, reason in view["reasons"]:
        _say(console, f"{status} x {count}: {reason}")
    if view["failures"] or view["reasons"]:
        _say(console, view["verdict"])
    for step in view["next"]:
        _say(console, _step(step))


def _failure(failure: View, console: Console) -> None:
    _say(console, f"\n{failure['status'].upper()} {failure['id']}: {failure['reason']}")
    if failure["breaks"]:
        _say(console, f"  {TO_CATCH}: {failure['breaks']}")
    for stage in failure["stages"]:
        share = f" ({stage['share']})" if stage["share"] else ""
        count = f"{stage['outside']} of {quantity(stage['total'], 'element')} {stage['wrong']}"
        _say(console, f"\n{stage['name']}: {count}{share}")
        if stage["worst"]:
            _say(console, f"  worst   {stage['worst']}")
        for rank in stage["ranks"]:
            counts = ", ".join(f"{name}: {n}" for name, n in rank["shown"])
            more = f", and {rank['left']} more" if rank["left"] else ""
            _say(console, f"  {rank['name']:<7} {counts}{more}{rank['note']}")
        if stage["detail"]:
            _histogram(stage["detail"], console)
            if stage["widths"]:
                _say(console, f"  {stage['widths']}")
        if stage["map"]:
            _say(console, f"  map     {stage['map']['caption']}")
            for line in stage["map"]["cells"]:
                _say(console, "          " + "".join(SHADES[c] for c in line))
    if failure["same"]:
        names = ", ".join(failure["same"][:CASES_AT_MOST])
        rest = len(failure["same"]) - CASES_AT_MOST
        more = f" and {rest} more" if rest > 0 else ""
        _say(console, f"\nalso {names}{more}: {failure['symptom']}")
    if failure["shortened"]:
        _say(console, "\nthe run kept the maps of its first fails only (--pictures N)")
    if failure["how"]:
        _say(console, f"\njudged: {failure['how']}")
    if failure["history"]:
        _say(console, f"ran in: {failure['history']}")
    _say(console, f"alone:  {failure['command']}")
    if failure["next"]:
        _say(console, _step(failure["next"]))


def _step(step: View) -> str:
    """What to do next, in one line."""
    return f"{step['words']} {step['command']}".strip()


def _histogram(detail: Mapping[str, Any], console: Console) -> None:
    """A line a bin; lengths are logarithmic, as the page's heights."""
    _say(console, f"  elements by distance; {draw.SCALE}")
    bins = draw.bars(detail)
    middle = next(i for i, bar in enumerate(bins) if bar[0] == "in")
    top = max(1, *(n.bit_length() for _, _, n in bins))
    for i, (kind, label, n) in enumerate(bins):
        side = ("below" if i < middle else "above") if kind == "out" else ""
        bar = "█" * round(BAR * n.bit_length() / top)
        _say(console, f"  {f'{label} ULP {side}' if side else label:<18} {bar} {n}")


def _ab(result: Mapping[str, Any], console: Console) -> None:
    view = compared.ab(result)
    _say(console, view["verdict"])
    if view["summary"] != view["verdict"]:
        _say(console, view["summary"])
    for name, pairs in view["sides"]:
        text = ", ".join(f"{k} {v}".strip() for k, v in pairs)
        _say(console, f"{name:<6} {text}")
    _stage_table(view["cases"], console)
    same = sum(c["status"] == "identical" for c in view["cases"])
    _say(console, f"identical: {part(same, len(view['cases']), 'case')}")


def _stage_table(cases: list[View], console: Console) -> None:
    """A line for each stage of each case that is not identical."""
    table = Table("case", "stage")
    for name in ("moved", "of", "most ULPs apart", "wrong left", "wrong right"):
        table.add_column(name, justify="right")
    for case in cases:
        if case["status"] == "identical":
            continue
        head = "\n".join(
            filter(None, [f"{case['sign']} {case['id']} {case['word']}", case["reason"],
                          *case["more"]])
        )  # fmt: skip
        for stage in case["stages"] or [{}]:
            mark = " *" if stage and stage["name"] == case["first"] else ""
            cells = [f"{stage['name']}{mark}"] if stage else [""]
            cells += [str(stage.get(k, "")) for k in ("moved", "elements", "ulps", "left", "right")]
            table.add_row(Text(head), *(Text(cell) for cell in cells))
            head = ""
    if table.row_count:
        console.print(table)
        _say(console, "* the first stage that differs")


def _bisect(result: Mapping[str, Any], console: Console) -> None:
    view = compared.bisect(result)
    _say(console, view["verdict"])
    _say(console, view["summary"])
    marks = {"good": "o", "bad": "#", "skip": "-", "flaky": "~"}
    places, _ = draw.order(read.objects(result, "steps"))
    _say(console, "\nolder" + " " * 39 + "newer   o good  # bad  - skipped  ~ flaky")
    for i, (step, place) in enumerate(zip(view["steps"], places, strict=True)):
        at = round(place * 48)
        track = "·" * at + marks.get(step["verdict"], "?") + "·" * (48 - at)
        why = f" ({step['reason']})" if step["reason"] else ""
        text = f"{step['word']:<7} {step['rev'][:12]} {step['subject']}{why}"
        _say(console, f"{track} {i + 1:>3} {text}")
    _stage_table(view["moved"], console)
    for name, value in view["found"]:
        _say(console, f"{name}: {value or 'not found'}")
    for name, pairs in view["facts"]:
        text = ", ".join(f"{k} {v}".strip() for k, v in pairs)
        _say(console, f"{name}: {text}")
