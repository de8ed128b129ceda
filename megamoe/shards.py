"""Shards: one selection of cases spread over hosts, and the proof that nothing got lost.

``--shard I/N`` is a pure function of the selection and of recorded durations, so hosts need not
talk to each other. Merging compares what the reports judged with the selection itself.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from megamoe.cases import Case

DEFAULT_SECONDS: Final = 1.0
"""Assumed for a case without a recorded duration."""


class ShardError(ValueError):
    """A shard or a set of reports does not fit; the message is one line and says how to mend."""


def parse(text: str) -> tuple[int, int]:
    """``"I/N"`` to (I, N), 1 <= I <= N."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ShardError(f"shard {text!r}: write I/N with 1 <= I <= N, for example 2/4")
    return int(match[1]), int(match[2])


def durations(root: Path) -> dict[str, float]:
    """Recorded seconds by case id; empty where none were recorded."""
    path = root / "durations.json"
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ShardError(f"{path}: cannot be read: {error}; restore it or delete it") from error
    return {str(case): float(seconds) for case, seconds in data.items()}


def longest_first(cases: Sequence[Case], seconds: Mapping[str, float]) -> list[Case]:
    """By falling duration; ties by id, so that the order is the same everywhere."""
    return sorted(cases, key=lambda c: (-seconds.get(c.id, DEFAULT_SECONDS), c.id))


def shard(
    cases: Sequence[Case], index: int, count: int, seconds: Mapping[str, float]
) -> list[Case]:
    """The cases of shard ``index`` of ``count``: longest first to the least loaded shard."""
    loads = [0.0] * count
    mine: list[Case] = []
    for case in longest_first(cases, seconds):
        target = min(range(count), key=lambda i: (loads[i], i))
        loads[target] += seconds.get(case.id, DEFAULT_SECONDS)
        if target == index - 1:
            mine.append(case)
    return mine


def merge(reports: Sequence[Mapping[str, Any]], selection: Sequence[Case]) -> dict[str, Any]:
    """One report of all shards, each case of ``selection`` once.

    Raises :class:`ShardError` naming cases that are lost, doubled or foreign, and where reports
    are of different backends, tiers or contracts.
    """
    if not reports:
        raise ShardError("no reports to merge; name the JSON files of all shards")
    for key in ("backend", "tier", "contract"):
        values = sorted({str(r.get(key)) for r in reports})
        if len(values) > 1:
            raise ShardError(f"reports differ in {key}: {', '.join(values)}; run them alike")
    seen = Counter(str(c["id"]) for r in reports for c in r["cases"])
    wanted = {c.id for c in selection}
    for what, ids in (
        ("lost", sorted(wanted - set(seen))),
        ("judged twice", sorted(i for i, n in seen.items() if n > 1)),
        ("not in this selection", sorted(set(seen) - wanted)),
    ):
        if ids:
            more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
            raise ShardError(f"{len(ids)} cases {what}: {', '.join(ids[:3])}{more}; run the shards "
                             "again from one commit")  # fmt: skip
    order = {c.id: at for at, c in enumerate(selection)}
    cases = sorted((c for r in reports for c in r["cases"]), key=lambda c: order[c["id"]])
    counts = Counter(c["status"] for c in cases)
    return {
        **{k: v for k, v in reports[0].items() if k not in ("cases", "counts", "shard")},
        "seconds": sum(float(r.get("seconds", 0.0)) for r in reports),
        "counts": dict(counts),
        "shards": [r.get("shard") for r in reports],
        "cases": cases,
    }
