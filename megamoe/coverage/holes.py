"""Holes that are known: ``golden/holes.toml``, a table a dimension, a line a hole with its reason.

    [tokens]
    "511..513" = "No case yet."

A key is a class of the dimension's goal, or the first and the last of neighbours in its order.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from megamoe.coverage.dimension import Dimension, Tally, runs

FILE: Final = "holes.toml"
"""The file, relative to golden/."""
HEAD: Final = """\
# Classes that no case enters (`megamoe coverage`), each with the reason: docs/coverage.md.
# "first..last" are neighbours in the order of the goal. `megamoe coverage --record` drops what a
# case has closed; a new hole must be written by hand.
"""

Reasons = dict[tuple[str, str], str]
"""Dimension and class -> why no case enters it."""


class HolesError(ValueError):
    """The file of known holes is not as it must be; one line that says how to mend it."""


@dataclass(frozen=True)
class Comparison:
    """The holes of today against those that are known."""

    new: list[tuple[str, str]]
    """Dimension and class without a reason."""
    closed: list[tuple[str, str]]
    """Listed, but a case enters it."""


def read(root: Path, dimensions: Sequence[Dimension]) -> Reasons:
    """The known holes of ``root``; none where there is no file. :class:`HolesError`."""
    path = root / FILE
    if not path.exists():
        return {}
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise HolesError(f"{path.name}: cannot be read as TOML: {error}") from error
    by_name = {d.name: d for d in dimensions}
    out: Reasons = {}
    for name, table in data.items():
        if name not in by_name or not isinstance(table, dict):
            raise HolesError(f"{path.name}: no dimension {name!r}; `megamoe coverage` shows all")
        for key, reason in table.items():
            if not isinstance(reason, str) or not reason.strip():
                raise HolesError(f"{path.name}: {name} {key!r} has no reason; say in one sentence "
                                 "why no case enters it")  # fmt: skip
            for one in _classes(path, by_name[name], key):
                if (name, one) in out:
                    raise HolesError(f"{path.name}: {name} {one!r} is listed twice; drop one")
                out[name, one] = reason
    return out


def _classes(path: Path, dimension: Dimension, key: str) -> list[str]:
    """The classes that a key names."""
    order = list(dimension.goal)
    first, dots, last = key.partition("..")
    ends = (first, last if dots else first)
    for one in ends:
        if one not in dimension.goal:
            raise HolesError(f"{path.name}: {dimension.name} has no class {one!r} in its goal; "
                             f"see --dimension {dimension.name}")  # fmt: skip
    low, high = (order.index(one) for one in ends)
    if low > high:
        raise HolesError(f"{path.name}: {dimension.name} {key!r}: the first comes after the last")
    return order[low : high + 1]


def compare(tally: Tally, dimensions: Iterable[Dimension], reasons: Reasons) -> Comparison:
    """The holes that the file lacks, and the entries that it should no longer have."""
    today = {(d.name, one) for d in dimensions for one in tally.holes(d)}
    order = [(d.name, one) for d in dimensions for one in d.goal]
    return Comparison(
        [hole for hole in order if hole in today and hole not in reasons],
        [hole for hole in order if hole in reasons and hole not in today],
    )


def text(reasons: Mapping[tuple[str, str], str], dimensions: Iterable[Dimension]) -> str:
    """The file's content: neighbours of one reason in one line."""
    out = [HEAD]
    for d in dimensions:
        lines = []
        mine = {one: reason for (name, one), reason in reasons.items() if name == d.name}
        for reason in dict.fromkeys(mine.values()):
            same = [one for one in mine if mine[one] == reason]
            for first, last in runs(same, d.goal):
                key = first if first == last else f"{first}..{last}"
                lines.append((list(d.goal).index(first), key, reason))
        if lines:
            out.append(f"\n[{d.name}]\n")
            out += [f"{_quoted(key)} = {_quoted(reason)}\n" for _, key, reason in sorted(lines)]
    return "".join(out)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)  # a basic string of TOML is written the same
