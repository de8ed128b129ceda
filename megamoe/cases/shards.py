"""Shards: one selection of cases, spread over hosts.

``--shard I/N`` is a pure function of the selection and of recorded durations, so hosts need not
talk to each other. :mod:`megamoe.suite.merge` proves that their reports are one judgement.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from megamoe import schema
from megamoe.cases.kind import Case
from megamoe.files import DURATIONS_LIMIT, read_json

DEFAULT_SECONDS: Final = 1.0
"""Assumed for a case without a recorded duration."""
SMALL_SECONDS: Final = 0.5
"""Up to this a case is small: it may run before the long ones at no loss."""


class ShardError(ValueError):
    """A shard or a set of reports does not fit; the message is one line and says how to mend."""


def parse(text: str) -> tuple[int, int]:
    """``"I/N"`` to (I, N), 1 <= I <= N."""
    match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ShardError(
            f"shard {schema.preview(text)}: write I/N with 1 <= I <= N, for example 2/4"
        )
    return int(match[1]), int(match[2])


def durations(root: Path) -> dict[str, float]:
    """Recorded seconds by case id; empty where none were recorded."""
    path = root / "durations.json"
    try:
        data = read_json(path, DURATIONS_LIMIT)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ShardError(f"{path}: cannot be read: {error}; restore it or delete it") from error
    if fault := schema.fault(data, schema.Each(schema.seconds)):
        raise ShardError(f"{path}: {fault}; restore it or delete it")
    return {case: float(seconds) for case, seconds in data.items()}


def longest_first(cases: Sequence[Case], seconds: Mapping[str, float]) -> list[Case]:
    """Sort by falling duration, then by id, so that the order is the same everywhere."""
    return sorted(cases, key=lambda c: (-seconds.get(c.id, DEFAULT_SECONDS), c.id))


def small_first(cases: Sequence[Case], seconds: Mapping[str, float]) -> list[Case]:
    """The order of a run: small cases, one of each kind in turn, so that a fault shows within
    seconds; then the others, the longest first, so that none of them is left over at the end."""
    turns: dict[str, int] = {}
    small, rest = [], []
    for case in sorted(cases, key=lambda c: (seconds.get(c.id, DEFAULT_SECONDS), c.id)):
        if seconds.get(case.id, DEFAULT_SECONDS) > SMALL_SECONDS:
            rest.append(case)
            continue
        turns[case.kind] = turns.get(case.kind, 0) + 1
        small.append((turns[case.kind], case))
    small.sort(key=lambda pair: pair[0])  # stable: of one turn, the smallest first
    return [case for _, case in small] + longest_first(rest, seconds)


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
