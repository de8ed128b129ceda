"""Merging the reports of shards: the proof that together they are one judgement.

What the reports judged is compared with the selection itself, and the reports with one another: in
:data:`DECIDES` they are equal, in :data:`MAY_DIFFER` they need not be, and a key that neither names
must be equal too.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from megamoe import schema
from megamoe.cases import Case
from megamoe.cases.shards import ShardError
from megamoe.judge.verdict import STATUSES
from megamoe.printable import printable, quantity
from megamoe.suite.shard_report import (
    DECIDES,
    LONGEST,
    MAY_DIFFER,
    Report,
    check_complete,
    check_end,
    check_form,
)

_PARTS: Final = {key.partition(".")[0] for key in (*DECIDES, *MAY_DIFFER) if "." in key}
_TWO_NUMBERS: Final = ("versions.python", "worker.python")
MODULES: Final = "modules_sha256"
"""Its files are compared one by one: which of them a shard loads may depend on its cases."""
OF_A_SHARD: Final = ("cases", "counts", "shard", "shards", "next")
"""Keys of a report that a merge computes anew."""


def merge(
    reports: Sequence[Report], selection: Sequence[Case], names: Sequence[str] | None = None
) -> dict[str, Any]:
    """One report of all shards, each case of ``selection`` once; ``names`` are of their files.

    Raises :class:`ShardError` for a report of another form or of a run that was stopped, where
    reports differ in what decides a result, and naming cases that are lost, doubled or foreign.
    """
    if not reports:
        raise ShardError("no reports to merge; name the JSON files of all shards")
    names = names or [f"report {at}" for at in range(1, len(reports) + 1)]
    for report, name in zip(reports, names, strict=True):
        check_form(report, name)
        check_end(report, name)
        check_complete(report, name)
    for report, name in zip(reports[1:], names[1:], strict=True):
        _alike(reports[0], report, names[0], name)
    modules = _modules(reports, names)
    cases = _each_once(reports, selection)
    counts = Counter(c["status"] for c in cases)
    return {
        **{k: v for k, v in reports[0].items() if k not in OF_A_SHARD},
        **modules,
        "seconds": sum(float(r["seconds"]) for r in reports),
        LONGEST: max(float(r.get(LONGEST, r["seconds"])) for r in reports),
        "counts": {status: counts[status] for status in STATUSES},
        "shards": [part for r in reports for part in r.get("shards", [r.get("shard")])],
        "cases": cases,
    }


def _alike(first: Report, other: Report, first_name: str, other_name: str) -> None:
    mine, theirs = dict(_leaves(first)), dict(_leaves(other))
    for key in sorted({*mine, *theirs} - set(MAY_DIFFER)):
        if mine.get(key) == theirs.get(key) or (key == MODULES and key in mine and key in theirs):
            continue
        why = DECIDES.get(key, "it may decide a result")
        raise ShardError(
            f"reports differ in {schema.plain(key)}: {_value(mine, key)} in {first_name}, "
            f"{_value(theirs, key)} in {other_name} ({why}); run them alike"
        )


def _modules(reports: Sequence[Report], names: Sequence[str]) -> dict[str, dict[str, str]]:
    """The modules of all reports, for each may have loaded others; a :class:`ShardError` that names
    the first file with two contents."""
    by_path: dict[str, tuple[str, str]] = {}
    for report, name in zip(reports, names, strict=True):
        for path, digest in sorted(report.get(MODULES, {}).items()):
            first, where = by_path.setdefault(path, (digest, name))
            if digest != first:
                raise ShardError(
                    f"reports differ in {MODULES}: {schema.preview(path, 200)[1:-1]} is "
                    f"{schema.plain(first[:12])} in {where}, {schema.plain(digest[:12])} in {name} "
                    "(a Python file that the kernel imported); run them alike"
                )
    if not any(MODULES in report for report in reports):
        return {}
    return {MODULES: {path: digest for path, (digest, _) in sorted(by_path.items())}}


def _leaves(report: Report) -> Iterator[tuple[str, Any]]:
    """Key path -> what is compared; of the keys that the tables divide, each part."""
    for key, value in report.items():
        if key not in _PARTS or not isinstance(value, Mapping):
            yield key, value
            continue
        for part, below in value.items():
            path = f"{key}.{part}"
            two = path in _TWO_NUMBERS and isinstance(below, str)
            yield path, ".".join(below.split(".")[:2]) if two else below


def _value(leaves: Mapping[str, Any], key: str) -> str:
    if key not in leaves:
        return "nothing"
    value = leaves[key]
    if key == MODULES:
        return quantity(len(value), "file")
    if isinstance(value, Mapping):  # a fingerprint
        pairs = sorted(value.items())
        return ", ".join(f"{schema.plain(k)} {schema.plain(v)}" for k, v in pairs) or "none"
    if isinstance(value, list):
        return schema.plain(", ".join(map(str, value))) or "none"
    return schema.plain(value)


def _each_once(reports: Sequence[Report], selection: Sequence[Case]) -> list[Mapping[str, Any]]:
    """The cases of all reports in the order of the selection."""
    counts = Counter(c["id"] for r in reports for c in r["cases"])
    target = {c.id for c in selection}
    for what, ids in (
        ("lost", sorted(target - set(counts))),
        ("judged twice", sorted(i for i, n in counts.items() if n > 1)),
        ("not in this selection", sorted(set(counts) - target)),
    ):
        if ids:
            more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
            examples = ", ".join(map(schema.plain, ids[:3]))
            mend = _shards(reports) or "run the shards again from one commit"
            raise ShardError(f"{quantity(len(ids), 'case')} {what}: {examples}{more}; {mend}")
    order = {c.id: at for at, c in enumerate(selection)}
    return sorted(_renumbered(reports), key=lambda c: order[c["id"]])


def _renumbered(reports: Sequence[Report]) -> Iterator[Mapping[str, Any]]:
    """The cases, with numbers of worker processes that no two reports share."""
    most = 0
    for report in reports:
        start = most
        for case in report["cases"]:
            if "process" not in case:
                yield case
                continue
            most = max(most, start + case["process"])
            yield {**case, "process": start + case["process"]}


def _shards(reports: Sequence[Report]) -> str:
    """The shards that came twice, and the first that has no report, with its command; empty where
    the reports name no shards of one division."""
    counts = Counter(str(report.get("shard")) for report in reports)
    pairs = [shard.partition("/") for shard in counts]
    if len({of for _, _, of in pairs}) != 1 or not all(f"{a}{b}".isdigit() for a, _, b in pairs):
        return ""
    whole = pairs[0][2]
    twice = [f"shard {schema.plain(shard)} came twice" for shard, n in counts.items() if n > 1]
    missing = [k for k in range(1, min(int(whole), 999) + 1) if f"{k}/{whole}" not in counts]
    if not missing:
        return "; ".join(twice)
    first = reports[0]
    options = "".join(
        f" --{name} {shlex.quote(str(first[name]))}"
        for name in ("tier", "kind", "case") if first.get(name)
    )  # fmt: skip
    lacks = ", ".join(f"{k}/{whole}" for k in missing[:8])
    command = printable(
        f"megamoe check --backend {shlex.quote(str(first['backend']))}"
        f"{first.get('options', '')}{options} --shard {missing[0]}/{whole} --json FILE"
    )
    return "; ".join([*twice, f"no report of shard {lacks}; run `{command}`"])
