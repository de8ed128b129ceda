"""Is y as near to the oracle as correct kernels are? A test with a stated false-alarm rate.

The certified interval of class ``fp32`` is wide, because it allows every order at its worst. Real
correct kernels lie far inside it. This test measures how far ``y`` deviates from the oracle in
units large enough to average over (a row, the rows of an expert, 128 channels of a row) and
compares with what simulated correct kernels of the class showed (``statistic.json``, made once by
``tools/calibrate.py``, which also says how the tail was extrapolated).

Two statistics of a unit, with d = y - oracle: the *size* ``|d| / |oracle|`` and the *bias*
``<d, oracle> / <oracle, oracle>``, the factor by which the unit is too large or too small.

The effect of one flipped FP8 code on y shrinks with the number of codes in the sum of y. So
thresholds depend on that number: live slots times intermediate size. ``docs/numerics.md``, section
Statistic, says what the test cannot detect: in short, a fault that is no larger in its unit than a
few flipped codes, and anything in a case whose data is unlike the calibrated kinds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

from megamoe.spec.formats import F64, U16, bf16_decode

TILE = 128
FALSE_ALARMS = 1e-9
"""Per case, over all of its units and both statistics."""
GROUPS = {
    "fp32": "fp32",
    "fp32-ordered": "fp32",
    "sm100-mxf8f6f4": "fp32",
    "sm90-e4m3": "sm90-e4m3",
    "sm90-e4m3-k32": "sm90-e4m3-k32",
}
"""Accumulator class to calibrated group: three classes keep 24 bits or more, and share one."""
ROWS_OF_EXPERT = (32, 8)
"""Numbers of rows for which the statistic of an expert was calibrated, in some strata."""


@dataclass(frozen=True)
class Finding:
    """One unit whose deviation exceeds that of correct kernels."""

    unit: str
    """row, expert or tile."""
    index: tuple[int, ...]
    """(token,), (expert,) or (token, tile of 128 channels)."""
    statistic: str
    """size or bias."""
    value: float
    threshold: float

    def __str__(self) -> str:
        """One line for a report."""
        at = ", ".join(str(i) for i in self.index)
        return f"{self.unit} {at}: {self.statistic} {self.value:.3g}, allowed {self.threshold:.3g}"


@dataclass(frozen=True)
class Energies:
    """Sums over each tile, ``(T, H/128)``: d squared, d times oracle, oracle squared."""

    square: F64
    along: F64
    reference: F64

    @classmethod
    def of(cls, actual: U16, reference: U16) -> Energies:
        """The deviations from ``(T, H)`` bfloat16 bits, without elements where both are not
        finite."""
        with np.errstate(invalid="ignore"):
            y, ref = (bf16_decode(bits).astype(np.float64) for bits in (actual, reference))
            out = ~np.isfinite(y) & ~np.isfinite(ref)
            y, ref = np.where(out, 0.0, y), np.where(out, 0.0, ref)
            shape = len(y), y.shape[1] // TILE, TILE
            d, r = (y - ref).reshape(shape), ref.reshape(shape)
            return cls((d * d).sum(-1), (d * r).sum(-1), (r * r).sum(-1))

    def rows(self) -> Energies:
        """Summed over channels, ``(T,)``."""
        return Energies(self.square.sum(-1), self.along.sum(-1), self.reference.sum(-1))

    def over(self, rows: npt.NDArray[Any]) -> Energies:
        """Summed over some rows (of :meth:`rows`)."""
        return Energies(self.square[rows].sum(), self.along[rows].sum(), self.reference[rows].sum())

    def statistics(self) -> dict[str, F64]:
        """Size and (absolute) bias; any deviation of a unit that should be zero is infinite."""
        with np.errstate(divide="ignore", invalid="ignore"):
            size = np.sqrt(self.square / self.reference)
            bias = np.abs(self.along) / self.reference
        still = self.square == 0
        size = np.where(still, 0.0, np.where(np.isnan(size), np.inf, size))
        bias = np.where(still, 0.0, np.where(np.isnan(bias), np.inf, bias))
        return {"size": size, "bias": bias}


@cache
def calibration() -> dict[str, Any]:
    """The stored calibration, with its provenance."""
    text = resources.files("megamoe.judge").joinpath("statistic.json").read_text("utf-8")
    return dict(json.loads(text))


def threshold(group: str, terms: int, unit: str, statistic: str, alarms: float) -> float:
    """Level exceeded by one unit of a correct kernel with probability at most ``alarms``.

    From the calibrated number of terms at or below ``terms``; infinite if there is none.
    ``unit`` is tile, row or expert-N (N rows, of :func:`expert_unit`).
    """
    table = calibration()
    stratum = _stratum(group, terms)
    if stratum is None:
        return float("inf")
    fits = stratum[unit][statistic]
    return max(tail_level(fit, alarms / table["pooled"]) for fit in fits) * table["safety"]


def _stratum(group: str, terms: int) -> dict[str, Any] | None:
    """The calibration of the largest number of terms at or below ``terms``."""
    strata = calibration()["groups"][group]
    sizes = [int(n) for n in strata if int(n) <= terms]
    return dict(strata[str(max(sizes))]) if sizes else None


def expert_unit(group: str | None, terms: int, rows: int) -> str:
    """The limit for an expert of ``rows`` rows: that of the most rows that the stratum knows.

    Fewer rows than its own can only widen the limit, since deviations average out over more rows.
    It is the limit of a single row if the stratum has no more.
    """
    stratum = (_stratum(group, terms) if group else None) or {}
    for size in ROWS_OF_EXPERT:
        if size <= rows and f"expert-{size}" in stratum:
            return f"expert-{size}"
    return "row"


def tail_level(fit: dict[str, Any], alarms: float) -> float:
    """Peaks over threshold: ``x**2`` beyond ``u`` has an exponential tail with mean ``beta``.

    The largest of several starts ``u`` of the tail, and never below the largest value seen.
    """
    best = float(fit["largest"])
    for u, beta, share in fit["tail"]:
        if share > alarms:
            best = max(best, float(np.sqrt(u + beta * np.log(share / alarms))))
    return best


def check(
    actual: U16,
    reference: U16,
    topk_ids: npt.NDArray[np.int64],
    intermediate_size: int,
    class_name: str,
    *,
    false_alarms: float = FALSE_ALARMS,
    tokens: Sequence[int] | None = None,
) -> list[Finding]:
    """Units of ``actual`` that deviate from ``reference`` more than correct kernels do.

    ``actual`` and ``reference`` ``(T, H)`` bfloat16 bits, ``topk_ids`` ``(T, K)``. For class
    ``exact`` any deviation is a finding. ``tokens`` are the case's tokens of the rows, where these
    are not 0, 1, ...: findings name tokens. Worst first. ``ValueError`` for an unknown class.
    """
    if class_name != "exact" and class_name not in GROUPS:
        raise ValueError(f"no calibration for class {class_name!r}; known: {', '.join(GROUPS)}")
    tiles = Energies.of(actual, reference)
    rows = tiles.rows()
    live = (topk_ids >= 0).sum(axis=1)
    experts = [int(e) for e in np.unique(topk_ids[topk_ids >= 0])]
    units = tiles.square.size + len(rows.square) + len(experts)
    alarms = false_alarms / (2 * max(1, units))
    fewest = int(live[live > 0].min()) if (live > 0).any() else 0
    terms = intermediate_size * fewest
    findings: list[Finding] = []

    def examine(unit: str, kind: str, index: Any, energies: Energies) -> None:
        for name, values in energies.statistics().items():
            group = GROUPS.get(class_name)
            limit = threshold(group, terms, kind, name, alarms) if group and terms else 0.0
            for at in np.argwhere(np.atleast_1d(values) > limit):
                where = tuple(int(i) for i in (index if index is not None else at))
                if tokens is not None and index is None:
                    where = tokens[where[0]], *where[1:]
                value = float(np.atleast_1d(values)[tuple(at)])
                findings.append(Finding(unit, where, name, value, limit))

    examine("tile", "tile", None, tiles)
    examine("row", "row", None, rows)
    for expert in experts:
        routed = np.flatnonzero((topk_ids == expert).any(axis=1))
        kind = expert_unit(GROUPS.get(class_name), terms, len(routed))
        examine("expert", kind, (expert,), rows.over(routed))
    return sorted(findings, key=lambda f: -f.value / f.threshold if f.threshold else -np.inf)
