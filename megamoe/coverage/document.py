"""A count as plain data, for ``--json``, the page and the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megamoe.coverage.dimension import Dimension, Seen
from megamoe.coverage.holes import Reasons
from megamoe.coverage.traffic import Beyond


def document(
    contract: str, cases: int, selection: Mapping[str, str], dimensions: Sequence[Dimension],
    seen: Seen, known: Reasons,
) -> dict[str, Any]:  # fmt: skip
    """Dimensions with all classes of their goals, and the classes that are entered besides."""
    return {
        "kind": "coverage",
        "contract": contract,
        "cases": cases,
        "selection": dict(selection),
        "dimensions": [_dimension(d, seen, known) for d in dimensions],
    }


def _dimension(d: Dimension, seen: Seen, known: Reasons) -> dict[str, Any]:
    found = seen.of(d)
    classes: list[dict[str, Any]] = [
        {
            "class": one, "cases": found[one], "examples": seen.examples.get((d.name, one), []),
            "fault": fault, "known": known.get((d.name, one)),
        }
        for one, fault in d.goal.items()
    ]  # fmt: skip
    besides = {one: found[one] for one in sorted(found) if one not in d.goal}
    reached = sum(1 for one in classes if one["cases"])
    return {"name": d.name, "unit": d.unit, "goal": len(classes), "reached": reached,
            "classes": classes, "besides": besides}  # fmt: skip


def with_traffic(made: dict[str, Any], calls: int, found: Sequence[Beyond]) -> dict[str, Any]:
    """The same with the classes that a directory of captured calls enters beyond the cases."""
    rows = [{"name": b.dimension, "entered": b.entered, "missing": b.missing} for b in found]
    return {**made, "traffic": {"calls": calls, "dimensions": rows}}
