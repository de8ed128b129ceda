"""What was counted last: ``golden/coverage.json``, for a quick test and for drawing rare classes.

It holds how many cases enter each class, a few cases that together enter all of them (the
*witnesses*), and a digest of the cases that were counted. A test runs the witnesses anew and
believes no number of the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from megamoe.cases import Case
    from megamoe.coverage.dimension import Dimension

FILE: Final = "coverage.json"
"""Under golden/."""
AGAIN: Final = "run `megamoe coverage --record`"

Counts = dict[str, dict[str, int]]


def read(root: Path) -> dict[str, Any]:
    """The file's content. ``ValueError`` of one line where it is missing or another thing."""
    path = root / FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}); {AGAIN}") from error
    kinds = {"contract": str, "cases": str, "witnesses": list, "counts": dict}
    wrong = [key for key, kind in kinds.items()
             if not isinstance(data, dict) or not isinstance(data.get(key), kind)]  # fmt: skip
    if wrong:
        raise ValueError(f"{path}: its {wrong[0]!r} is missing or of a wrong type; {AGAIN}")
    return dict(data)


def counts(root: Path) -> Counts:
    """Dimension -> class of its goal -> cases that enter it, 0 for a hole; as recorded."""
    return {str(name): dict(table) for name, table in read(root)["counts"].items()}


def digest(cases: Iterable[Case]) -> str:
    """sha256 over ids and definitions."""
    lines = sorted(f"{case.id} {case.definition()}" for case in cases)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def content(
    contract: str, cases: Sequence[Case], entered: Mapping[str, Mapping[str, set[str]]],
    costs: Mapping[str, float], dimensions: Sequence[Dimension], numbers: Counts,
) -> bytes:  # fmt: skip
    """The file: ``entered`` is case id -> dimension -> classes, ``costs`` are their seconds."""
    made = {
        "contract": contract,
        "cases": digest(cases),
        "witnesses": witnesses(entered, costs, dimensions),
        "counts": numbers,
    }
    return (json.dumps(made, indent=1) + "\n").encode()


def witnesses(
    entered: Mapping[str, Mapping[str, set[str]]], costs: Mapping[str, float],
    dimensions: Sequence[Dimension],
) -> list[str]:  # fmt: skip
    """Few and cheap cases that together enter every class of a goal that any case enters.

    Greedy: the case with the most new classes for its seconds comes next; then those go that the
    others make needless.
    """
    goals = {d.name: set(d.goal) for d in dimensions}
    own = {
        case: {(name, one) for name, classes in found.items()
               for one in classes & goals.get(name, set())}
        for case, found in entered.items()
    }  # fmt: skip
    left = set().union(*own.values()) if own else set()
    chosen: list[str] = []
    while left:
        best = max(own, key=lambda case: (len(own[case] & left) / costs[case], case))
        chosen.append(best)
        left -= own[best]
    for case in sorted(chosen, key=lambda case: -costs[case]):
        rest = set().union(*(own[other] for other in chosen if other != case))
        if own[case] <= rest:
            chosen.remove(case)
    return sorted(chosen)
