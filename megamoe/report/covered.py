"""What a report says of ``megamoe coverage``: plain data for the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from megamoe.printable import part, quantity, verb
from megamoe.report import read
from megamoe.report.read import View

RUN: Final = 3
"""Neighbours of one state from which on they are one chip."""


def view(result: Mapping[str, Any]) -> View:
    """The head, a row and the classes of each dimension, and what captured calls enter besides."""
    every = [_dimension(d) for d in read.objects(result, "dimensions")]
    new, known_holes = (sum(d[key] for d in every) for key in ("new", "known"))
    goal, hits = (sum(d[key] for d in every) for key in ("goal", "reached"))
    summary = f"{part(hits, goal, 'class', 'classes')} {verb(hits)} entered, "
    summary += quantity(known_holes, "is a known hole", "are known holes")
    selection = ", ".join(f"{k} {v}" for k, v in read.mapping(result, "selection").items())
    cases = quantity(read.count(result, "cases"), "case")
    return {
        "verdict": quantity(new, "new hole") if new else "No new hole",
        "colour": "red" if new else "green",
        "summary": f"{cases}{' of ' + selection if selection else ''} under "
        f"contract {read.text(result, 'contract', '?')}: {summary}",
        "dimensions": every,
        "traffic": _traffic(read.mapping(result, "traffic")),
    }


def _dimension(d: Mapping[str, Any]) -> View:
    classes = [_class(c) for c in read.objects(d, "classes")]
    states = [c["state"] for c in classes]
    return {
        "name": read.text(d, "name", "?"),
        "anchor": f"d-{read.text(d, 'name', 'unknown')}",
        "unit": read.text(d, "unit"),
        "goal": len(classes),
        "reached": states.count("pass"),
        "known": states.count("known"),
        "new": states.count("bad"),
        "classes": _chips(classes),
        "holes": _join(classes),
    }


def _class(c: Mapping[str, Any]) -> View:
    name, cases, reason = read.text(c, "class", "?"), read.count(c, "cases"), read.text(c, "known")
    examples = ", ".join(str(e) for e in read.items(c, "examples"))
    fault = read.text(c, "fault")
    return {
        "name": name,
        "state": "pass" if cases else "known" if reason else "bad",
        "title": f"{quantity(cases, 'case')}: {examples}" if cases else fault,
        "fault": fault,
        "known": reason,
    }


def _chips(classes: list[View]) -> list[View]:
    """A chip a class, or one for a run of neighbours of one state."""
    out: list[View] = []
    for run in _runs(classes, lambda c: c["state"]):
        if len(run) < RUN:
            out += [{**c, "text": c["name"]} for c in run]
        else:
            text = f"{run[0]['name']}..{run[-1]['name']}"
            out.append({**run[0], "text": text})
    return out


def _join(classes: list[View]) -> list[View]:
    """Neighbouring holes of one reason in a line, with the fault of the first."""
    out = []
    for run in _runs(classes, lambda c: (c["state"], c["known"])):
        if run[0]["state"] == "pass":
            continue
        text = run[0]["name"] if len(run) == 1 else f"{run[0]['name']}..{run[-1]['name']}"
        out.append({"text": text, "fault": run[0]["fault"], "known": run[0]["known"]})
    return out


def _runs(classes: list[View], key: Any) -> list[list[View]]:
    runs: list[list[View]] = []
    for c in classes:
        if runs and key(runs[-1][-1]) == key(c):
            runs[-1].append(c)
        else:
            runs.append([c])
    return runs


def _traffic(data: Mapping[str, Any]) -> View:
    """Nothing where no calls were given."""
    if not data:
        return {}
    rows = [
        {"name": read.text(d, "name", "?"), "text": str(one), "files": ", ".join(map(str, files))}
        for d in read.objects(data, "dimensions")
        for one, files in read.mapping(d, "missing").items()
    ]
    hits = sum(read.count(d, "entered") for d in read.objects(data, "dimensions"))
    calls = quantity(read.count(data, "calls"), "captured call enters", "captured calls enter")
    classes = quantity(hits, "class", "classes")
    summary = f"{calls} {classes}; {len(rows)} of these no case enters"
    return {"summary": summary, "rows": rows}
