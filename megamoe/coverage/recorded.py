"""The last count, ``golden/coverage.json``, for a quick test and for drawing rare classes.

It holds the number of cases that enter each class; the *witnesses*, which are cases that together
enter all of them; and a digest of the cases of the count. For a shallow witness only the sizes and
the routing count. A test counts the witnesses again and trusts no number of the file.
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
"""The file, relative to golden/."""
AGAIN: Final = "run `megamoe coverage --record`"

Counts = dict[str, dict[str, int]]
ClassesByCase = Mapping[str, Mapping[str, set[str]]]


def read(root: Path) -> dict[str, Any]:
    """The file's content. ``ValueError`` of one line where it is missing or another thing."""
    path = root / FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}); {AGAIN}") from error
    kinds = {"contract": str, "cases": str, "witnesses": list, "shallow": list, "counts": dict}
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
    contract: str, cases: Sequence[Case], by_case: ClassesByCase, costs: Mapping[str, float],
    dimensions: Sequence[Dimension], shallow: Sequence[str], numbers: Counts,
) -> bytes:  # fmt: skip
    """The file: ``by_case`` is case id -> dimension -> classes, ``costs`` are their seconds,
    ``shallow`` names dimensions that a shallow count gives."""
    deep = [d for d in dimensions if d.name not in shallow]
    selection = witnesses(by_case, costs, deep)
    forward = {c: e for c, e in by_case.items() if c.partition("/")[0] in ("forward", "property")}
    document = {
        "contract": contract,
        "cases": digest(cases),
        "witnesses": selection,
        "shallow": witnesses(
            forward, dict.fromkeys(forward, 1.0), [d for d in dimensions if d.name in shallow],
            selection,
        ),
        "counts": numbers,
    }  # fmt: skip
    return (json.dumps(document, indent=1) + "\n").encode()


def witnesses(
    by_case: ClassesByCase, costs: Mapping[str, float], dimensions: Sequence[Dimension],
    before: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """Few and cheap cases that with ``before`` enter every class of a goal that any case enters.

    Greedy: the case with the most new classes for its seconds comes next; then those go that the
    others make needless.
    """
    goals = {d.name: set(d.goal) for d in dimensions}
    own = {
        case: {(name, one) for name, classes in classes_of.items()
               for one in set(classes) & goals.get(name, set())}
        for case, classes_of in by_case.items()
    }  # fmt: skip
    base = set[tuple[str, str]]().union(*(own.get(case, set()) for case in before))
    missing = set[tuple[str, str]]().union(*own.values()) - base
    selection: list[str] = []
    while missing:
        best = max(own, key=lambda case: (len(own[case] & missing) / costs[case], case))
        selection.append(best)
        missing -= own[best]
    for case in sorted(selection, key=lambda case: -costs[case]):
        rest = base.union(*(own[other] for other in selection if other != case))
        if own[case] <= rest:
            selection.remove(case)
    return sorted(selection)
