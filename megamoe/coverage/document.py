"""A count as plain data, for ``--json``, the page and the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megamoe.coverage.dimension import Dimension, Tally
from megamoe.coverage.holes import Reasons
from megamoe.coverage.traffic import Beyond


def document(
    contract: str, cases: int, selection: Mapping[str, str], dimensions: Sequence[Dimension],
    tally: Tally, reasons: Reasons,
) -> dict[str, Any]:  # fmt: skip
    """Dimensions with all classes of their goals, and the classes that are entered besides."""
    return {
        "kind": "coverage",
        "contract": contract,
        "cases": cases,
        "selection": dict(selection),
        "dimensions": [_dimension(d, tally, reasons) for d in dimensions],
    }


def _dimension(d: Dimension, tally: Tally, reasons: Reasons) -> dict[str, Any]:
    counts = tally.of(d)
    classes: list[dict[str, Any]] = [
        {
            "class": one, "cases": counts[one], "examples": tally.examples.get((d.name, one), []),
            "fault": fault, "known": reasons.get((d.name, one)),
        }
        for one, fault in d.goal.items()
    ]  # fmt: skip
    besides = {one: counts[one] for one in sorted(counts) if one not in d.goal}
    hits = sum(1 for one in classes if one["cases"])
    return {"name": d.name, "unit": d.unit, "goal": len(classes), "reached": hits,
            "classes": classes, "besides": besides}  # fmt: skip


def with_traffic(report: dict[str, Any], calls: int, beyond: Sequence[Beyond]) -> dict[str, Any]:
    """The same with the classes that a directory of captured calls enters beyond the cases."""
    rows = [{"name": b.dimension, "entered": b.count, "missing": b.missing} for b in beyond]
    return {**report, "traffic": {"calls": calls, "dimensions": rows}}
