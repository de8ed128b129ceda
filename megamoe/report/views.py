"""What a report says of a run: plain data for the page and for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from megamoe.cases import KINDS
from megamoe.judge import BAD, STATUSES, WORDS, symptom_of
from megamoe.printable import quantity
from megamoe.report import read, words
from megamoe.report.failures import failure, split
from megamoe.report.read import View
from megamoe.suite.earlier import line_of
from megamoe.suite.results import exit_code
from megamoe.suite.shard_report import LONGEST
from megamoe.suite.summary import recorded_line, verdict_line

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
        "next": [split(str(line)) for line in read.items(result, "next")],
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
    times = {name: read.number(result, name) for name in ("seconds", LONGEST)}
    return out | {name: seconds for name, seconds in times.items() if seconds is not None}


def warnings(
    result: Mapping[str, Any], cases: Sequence[View], counts: Mapping[str, int]
) -> list[str]:
    """What keeps the verdict from being the last word."""
    out = []
    own_counts = {s: read.count(read.mapping(result, "counts"), s) for s in STATUSES}
    if own_counts != counts:
        out.append(
            f"The result's counts say {quantity(sum(own_counts.values()), 'case')}, its list has "
            f"{len(cases)}: "
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
    backend = [(words.of(k), read.text(result, k)) for k in ("backend", "accumulator", "device")]
    if result.get("batch_invariant") is False:
        backend.append(("batch-invariant", "no, by its own word"))
    build_of = [(f"fingerprint of {k}", read.text(build, k)) for k in ("sources", "options")]
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
                *((words.of(k), read.text(read.mapping(result, "versions"), k))
                  for k in read.mapping(result, "versions")),
                *((words.of(k), read.text(machine, k)) for k in machine if k != "capability"),
                ("capability", capability),
                ("machine class", read.text(record, "machine_class")),
            ],
        ),
        (
            "Judged by",
            [
                ("contract", read.text(result, "contract")),
                ("reason for the contract", read.text(result, "contract_why")),
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
        return (1, *pair, f"{pair[0]} → {quantity(pair[1], 'expert')}"), 0
    return (2, 0, 0, "no shape"), 0


def _chip(inter: int, cases: Sequence[View], anchors: Mapping[str, str]) -> View:
    counts = Counter(read.text(c, "status") for c in cases)
    bad = sum(map(is_bad, cases))
    state = "bad" if bad else "pass" if counts["pass"] else "none"
    title = ", ".join(f"{n} {WORDS.get(s, s)}" for s, n in counts.most_common())
    sign = "✓" if counts["pass"] else "–"
    return {
        "label": f"I {inter}" if inter else "",
        "state": state,
        "text": f"✗ {bad}/{len(cases)}" if bad else f"{sign} {len(cases)}",
        "title": title,
        "anchor": next((anchors[c["id"]] for c in cases if c.get("id") in anchors), None),
    }


def reasons(cases: Sequence[Mapping[str, Any]]) -> list[tuple[int, str, str]]:
    """(count, status, reason) of what was not judged, the most frequent first."""
    counts = Counter(
        (read.text(c, "status"), read.text(c, "reason"))
        for c in cases if c.get("status") in ("skip", "not-provided")
    )  # fmt: skip
    return [(n, WORDS[status], reason) for (status, reason), n in counts.most_common()]
