"""What a report says of a case that did not pass: plain data for the page and for the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Final

from megamoe.judge import JUDGED_SIDES, distance, experts_note
from megamoe.printable import quantity
from megamoe.report import draw, read
from megamoe.report.read import View
from megamoe.suite import next_command

MOST: Final = 8
"""Rows, experts or tiles that are ranked; the rest are counted."""


def failure(result: Mapping[str, Any], case: Mapping[str, Any], anchor: str) -> View:
    """One case that did not pass."""
    name = read.text(case, "id")
    details = read.objects(case, "details")
    sizes = read.mapping(case, "sizes")
    return {
        "anchor": anchor,
        "id": name,
        "status": read.text(case, "status", "error"),
        "reason": read.text(case, "reason").removeprefix(f"case {name}: "),
        "breaks": read.text(case, "breaks"),
        "sizes": [(k.replace("_", "-"), read.text(sizes, k)) for k in sizes],
        "how": ", ".join(map(str, read.items(case, "how"))),
        "seconds": read.number(case, "seconds"),
        "command": command(result, name),
        "next": next_step(result, case),
        "shortened": case.get("shortened") is True,
        "stages": [
            stage(finding, details) for finding in read.objects(case, "findings")
            if read.count(finding, "outside")
        ],
    }  # fmt: skip


def command(result: Mapping[str, Any], case_id: str) -> str:
    """What runs one case of the result alone."""
    backend = shlex.quote(_backend(result))
    return f"megamoe check --backend {backend} --case {shlex.quote(case_id)}{_options(result)}"


def _backend(result: Mapping[str, Any]) -> str:
    return read.text(result, "backend", "BACKEND")


def _options(result: Mapping[str, Any]) -> str:
    device = read.text(result, "device")
    return read.text(result, "options") or (f" --device {device}" if device == "cuda" else "")


def next_step(result: Mapping[str, Any], case: Mapping[str, Any]) -> View:
    """The words and the command of the line that ``check`` would end with, had it judged this case
    alone: ``explain`` where that can name a cause. Empty for a status that nobody knows."""
    findings = [
        {
            "stage": read.text(finding, "stage"), "text": read.text(finding, "text"),
            "outside": read.count(finding, "outside"),
            "rows": {row: n for row, n in read.tally(finding, "rows") if row.isdecimal()},
        }
        for finding in read.objects(case, "findings")
    ]  # fmt: skip
    texts = {name: read.text(case, name) for name in ("id", "kind", "status", "reason")}
    alone = {
        "backend": _backend(result), "options": _options(result),
        "callables": read.items(result, "callables"), "cases": [{**texts, "findings": findings}],
    }  # fmt: skip
    lines = next_command.lines_of(alone, (), {})
    return split(" ".join(lines)) if lines else {}


def split(line: str) -> View:
    """A line that ends in a command of megamoe: the words before it, and the command."""
    words, mark, rest = line.rpartition(": megamoe ")
    if not mark:
        return {"words": line, "command": ""}
    return {"words": f"{words}:", "command": f"megamoe {rest}"}


def stage(finding: Mapping[str, Any], details: Sequence[Mapping[str, Any]]) -> View:
    """One tensor of a failure, with its pictures where the result holds what they need."""
    name, outside = read.text(finding, "stage", "?"), read.count(finding, "outside")
    detail = next(
        (d for d in details if d.get("stage") == name and d.get("outside") == outside), None
    )
    total = read.count(finding, "total")
    axis = read.text(read.mapping(detail, "map"), "axis", "row")
    names = {"rows": f"{axis}s", "experts": "experts", "tiles": "tiles of 128 channels"}
    return {
        "name": name,
        "outside": outside,
        "total": total,
        "wrong": "outside" if _sides(finding) == JUDGED_SIDES else "with other bits",
        "share": f"{100 * outside / total:.3g}%" if total else "",
        "text": read.text(finding, "text"),
        "worst": worst_line(read.mapping(finding, "worst"), _sides(finding)),
        "detail": detail,
        "map": _map(finding, detail),
        "widths": _widths(detail),
        "ranks": [
            {
                "name": names[kind], "shown": ranking[:MOST], "left": max(0, len(ranking) - MOST),
                "note": experts_note(name, outside, dict(ranking)) if kind == "experts" else "",
            }
            for kind in names
            if (ranking := read.tally(finding, kind))
        ],
    }  # fmt: skip


def _sides(finding: Mapping[str, Any]) -> tuple[str, str]:
    """Words for what is compared with what."""
    names = [str(word) for word in read.items(finding, "sides")]
    return (names[0], names[1]) if len(names) == 2 else JUDGED_SIDES


def worst_line(worst: Mapping[str, Any], sides: tuple[str, str] = JUDGED_SIDES) -> str:
    """The farthest element in one line, as the judge writes it; empty where there is none."""
    if not worst:
        return ""
    names = ("token", "slot", "expert", "channel")
    where = " ".join(f"{n} {worst[n]}" for n in names if read.number(worst, n) is not None)
    where = where or read.sentence(read.items(worst, "index"))
    pair = "..".join(dict.fromkeys(map(str, read.items(worst, "expected_bits"))))
    ulps = read.number(worst, "ulps")
    texts = [read.text(worst, name) for name in ("expected", "actual", "actual_bits")]
    far = distance(ulps, texts[0], pair.rpartition("..")[2], texts[1], texts[2], sides)
    return f"{where}: {sides[0]} {texts[0]} ({pair}), {sides[1]} {texts[1]} ({texts[2]}), {far}"


def _map(finding: Mapping[str, Any], detail: Mapping[str, Any] | None) -> View | None:
    """Palette entries and the words around them; None where the tensor is one cell."""
    picture = read.mapping(detail, "map")
    if picture:
        cells = draw.level_rows(read.items(picture, "cells"))
        axis, rows = read.text(picture, "axis", "row"), read.count(picture, "rows")
        channels = read.count(picture, "channels")
        steps = read.count(picture, "row_step"), read.count(picture, "channel_step")
        labels = [str(v) for v in read.items(picture, "labels")]
        measure = "its worst distance in ULPs"
    else:
        shape = [v for v in read.items(finding, "shape") if type(v) is int]
        if len(shape) != 2:
            return None
        cells = draw.share_rows(read.items(finding, "grid"), shape[0], shape[1])
        axis, rows, channels = "row", shape[0], shape[1] * 128
        steps = -(-rows // max(1, len(cells))), 128
        labels = [str(v) for v in read.items(finding, "tokens")[:: steps[0]]]
        measure = "how many elements are outside"
    if not cells or not cells[0] or len(cells) * len(cells[0]) < (2 if picture else 4):
        return None
    size = f"{quantity(rows, axis)} down"
    size += f", {channels} channels across" if channels > 1 else ""
    one = f"{steps[0]} × {steps[1]}" if channels > 1 else f"{steps[0]}"
    first, last = (labels[0], labels[-1]) if labels else ("0", str(max(0, rows - 1)))
    return {
        "cells": cells, "first": first, "last": last, "channels": channels,
        "caption": f"{size}; a cell is {one}, shaded by {measure}",
    }  # fmt: skip


def _widths(detail: Mapping[str, Any] | None) -> str:
    """How wide the envelope is where the elements lie."""
    lengths = {int(k): n for k, n in read.tally(detail, "widths") if k.isdecimal()}
    if not lengths:
        return ""
    if set(lengths) == {0}:
        return "The envelope is one value for every element."
    most = max(lengths)
    top = "1 ULP" if most == 1 else f"{1 << (most - 1)} to {(1 << most) - 1} ULP"
    return (
        f"The envelope is one value for {lengths.get(0, 0)} of {sum(lengths.values())} elements, "
        f"at its widest {top}."
    )
