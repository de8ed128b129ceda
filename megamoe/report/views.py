"""What a report says of a run: plain data for the page and for the terminal."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from megamoe.cases import KINDS
from megamoe.judge import BAD, JUDGED_SIDES, STATUSES, WORDS, distance, symptom_of
from megamoe.report import draw, read
from megamoe.suite.earlier import line_of
from megamoe.suite.results import exit_code, recorded_line, verdict_line

View = dict[str, Any]

MOST: Final = 8
"""Rows, experts or tiles that are ranked; the rest are counted."""
SIGN: Final[Mapping[str, str]] = {"pass": "✓", "fail": "✗", "error": "!"}
"""Never colour alone; anything else is a dash."""


def view(result: Mapping[str, Any]) -> View:
    """The whole report of a run; failures in the order of the result, fails before errors, those
    of one symptom as one."""
    cases = [c for c in read.objects(result, "cases") if read.text(c, "id")]
    totals = mapping_of_counts(result, cases)
    bad = sorted(filter(is_bad, cases), key=lambda c: c.get("status") != "fail")
    folds = fold_failures(bad)
    anchors = {
        read.text(c, "id"): f"f{i + 1}" for i, fold in enumerate(folds) for c in fold
    }  # fmt: skip
    code = exit_code(totals["counts"])
    return {
        "verdict": verdict_line(totals),
        "colour": ("green", "red", "grey")[code],
        "counts": [(s, WORDS.get(s, s), totals["counts"].get(s, 0)) for s in STATUSES],
        "warnings": warnings(result, cases, totals["counts"]),
        "facts": facts(result),
        "recorded": recorded_line(totals),
        "grid": grid(cases, anchors),
        "failing": len(bad),
        "next": [str(line) for line in read.items(result, "next")],
        "failures": [
            {
                **failure(result, fold[0], f"f{i + 1}"),
                "history": line_of(fold[0], cases),
                "same": [read.text(c, "id") for c in fold[1:]],
                "symptom": symptom(fold[0]),
            }
            for i, fold in enumerate(folds)
        ],
        "reasons": reasons(cases),
        "cases": [
            {
                "id": read.text(c, "id"),
                "status": read.text(c, "status", "unknown"),
                "word": WORDS.get(read.text(c, "status"), read.text(c, "status", "unknown")),
                "sign": SIGN.get(read.text(c, "status"), "–"),
                "seconds": read.number(c, "seconds"),
                "how": ", ".join(map(str, read.items(c, "how"))),
                "anchor": anchors.get(read.text(c, "id")),
            }
            for c in cases
        ],
    }


def symptom(case: Mapping[str, Any]) -> str:
    """What other cases with the same fault share."""
    return symptom_of(*(read.text(case, name) for name in ("id", "status", "reason")))


def fold_failures(bad: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Failures of one kind, status and symptom together, in the order of the first of each; a case
    whose map was kept stands first."""
    folds: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for case in bad:
        key = (read.text(case, "kind"), read.text(case, "status"), symptom(case))
        folds.setdefault(key, []).append(case)
    return [sorted(fold, key=lambda c: c.get("shortened") is True) for fold in folds.values()]


def is_bad(case: Mapping[str, Any]) -> bool:
    """A fail, an error, or a status that nobody knows: never taken for a pass."""
    return case.get("status") in BAD or case.get("status") not in STATUSES


def mapping_of_counts(result: Mapping[str, Any], cases: Sequence[View]) -> View:
    """What the suite's own lines need, whatever the result lacks."""
    counts = {s: read.count(read.mapping(result, "counts"), s) for s in STATUSES}
    if cases:  # the cases are the evidence, the counts a convenience
        statuses = Counter(c["status"] if c.get("status") in STATUSES else "error" for c in cases)
        counts = {s: statuses.get(s, 0) for s in STATUSES}
    out: View = {"counts": counts, "recorded": read.mapping(result, "recorded")}
    out["cases"] = [{"recorded": read.text(c, "recorded")} for c in cases]
    seconds = read.number(result, "seconds")
    return out if seconds is None else {**out, "seconds": seconds}


def warnings(
    result: Mapping[str, Any], cases: Sequence[View], counts: Mapping[str, int]
) -> list[str]:
    """What keeps the verdict from being the last word."""
    out = []
    own_counts = {s: read.count(read.mapping(result, "counts"), s) for s in STATUSES}
    if own_counts != counts:
        out.append(
            f"The result's counts say {sum(own_counts.values())} cases, its list has {len(cases)}: "
            "the verdict is of the list."
        )
    if read.text(result, "shard"):
        out.append(
            f"This is shard {read.text(result, 'shard')} only; `megamoe merge` proves that the "
            "shards together lost no case."
        )
    unknown = {read.text(c, "status", "none") for c in cases} - set(STATUSES)
    if unknown:
        out.append(f"Unknown status, counted as error: {', '.join(sorted(unknown))}.")
    return out


def facts(result: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Groups of (name, value): what was judged, what ran it, and what it was held to."""
    machine, build = read.mapping(result, "machine"), read.mapping(result, "fingerprint")
    selection = [(k, read.text(result, k)) for k in ("tier", "kind", "case", "shard")]
    shards = ", ".join(map(str, read.items(result, "shards")))
    backend = [(k, read.text(result, k)) for k in ("backend", "accumulator", "device")]
    if result.get("batch_invariant") is False:
        backend.append(("batch-invariant", "no, by its own word"))
    build_of = [(k, read.text(build, k)) for k in ("sources", "options")]
    if not build:
        build_of = [("fingerprint", "the backend has none: this report names no build of a kernel")]
    if digest := read.text(result, "file_sha256"):
        build_of.append(("sha256 of its file", digest))
    modules = read.mapping(result, "modules_sha256")
    build_of += [(f"sha256 of {name}", read.text(modules, name)) for name in modules]
    capability = ".".join(map(str, read.items(machine, "capability")))
    record = read.mapping(result, "recorded")
    groups = [
        ("Backend", [*backend, *build_of]),
        (
            "Toolchain",
            [
                *((k, read.text(read.mapping(result, "versions"), k))
                  for k in read.mapping(result, "versions")),
                *((k, read.text(machine, k)) for k in machine if k != "capability"),
                ("capability", capability),
                ("machine class", read.text(record, "machine_class")),
            ],
        ),
        (
            "Judged by",
            [
                ("contract", read.text(result, "contract")),
                ("chosen, because", read.text(result, "contract_why")),
                ("goldens (manifest sha256)",
                 read.text(read.mapping(result, "goldens"), "manifest_sha256")),
                ("recorded bits", read.text(record, "file")),
                *selection,
                ("shards", shards),
            ],
        ),
    ]  # fmt: skip
    return [(name, [pair for pair in pairs if pair[1]]) for name, pairs in groups]


def grid(cases: Sequence[View], anchors: Mapping[str, str]) -> View:
    """Kinds across, hidden sizes down; a cell has a chip for each intermediate size."""
    kinds = [k for k in KINDS if any(c.get("kind") == k for c in cases)]
    kinds += sorted({read.text(c, "kind", "?") for c in cases} - set(kinds))
    rows: dict[tuple[Any, ...], dict[str, dict[int, list[View]]]] = {}
    for case in cases:
        key, inter = _shape(read.mapping(case, "sizes"))
        cell = rows.setdefault(key, {}).setdefault(read.text(case, "kind", "?"), {})
        cell.setdefault(inter, []).append(case)
    return {
        "kinds": kinds,
        "rows": [
            {
                "name": key[-1],
                "cells": [
                    [_chip(inter, cell[inter], anchors) for inter in sorted(cell)]
                    for cell in (rows[key].get(kind, {}) for kind in kinds)
                ],
            }
            for key in sorted(rows, key=lambda k: k[:-1])
        ],
    }


def _shape(sizes: Mapping[str, Any]) -> tuple[tuple[Any, ...], int]:
    """Sort key ending in the row's name, and the intermediate size (0: none)."""
    if read.count(sizes, "hidden"):
        hidden = read.count(sizes, "hidden")
        return (0, hidden, 0, f"H {hidden}"), read.count(sizes, "intermediate")
    if read.count(sizes, "physical"):
        pair = read.count(sizes, "logical"), read.count(sizes, "physical")
        return (1, *pair, f"{pair[0]} → {pair[1]} experts"), 0
    return (2, 0, 0, "no shape"), 0


def _chip(inter: int, cases: Sequence[View], anchors: Mapping[str, str]) -> View:
    counts = Counter(read.text(c, "status") for c in cases)
    bad = sum(map(is_bad, cases))
    state = "bad" if bad else "pass" if counts["pass"] else "none"
    title = ", ".join(f"{n} {s}" for s, n in counts.most_common())
    sign = "✓" if counts["pass"] else "–"
    return {
        "label": f"I {inter}" if inter else "",
        "state": state,
        "text": f"✗ {bad}/{len(cases)}" if bad else f"{sign} {len(cases)}",
        "title": title,
        "anchor": next((anchors[c["id"]] for c in cases if c.get("id") in anchors), None),
    }


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
        "shortened": case.get("shortened") is True,
        "stages": [
            stage(finding, details) for finding in read.objects(case, "findings")
            if read.count(finding, "outside")
        ],
    }  # fmt: skip


def command(result: Mapping[str, Any], case_id: str) -> str:
    """What runs one case of the result alone."""
    device = read.text(result, "device")
    options = read.text(result, "options") or (f" --device {device}" if device == "cuda" else "")
    backend = shlex.quote(read.text(result, "backend", "BACKEND"))
    return f"megamoe check --backend {backend} --case {shlex.quote(case_id)}{options}"


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
            {"name": names[kind], "shown": ranking[:MOST], "left": max(0, len(ranking) - MOST)}
            for kind in names
            if (ranking := read.tally(finding, kind))
        ],
    }


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
    size = f"{rows} {axis}{'s' * (rows != 1)} down"
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


def reasons(cases: Sequence[Mapping[str, Any]]) -> list[tuple[int, str, str]]:
    """(count, status, reason) of what was not judged, the most frequent first."""
    counts = Counter(
        (read.text(c, "status"), read.text(c, "reason"))
        for c in cases if c.get("status") in ("skip", "not-provided")
    )  # fmt: skip
    return [(n, WORDS[status], reason) for (status, reason), n in counts.most_common()]
