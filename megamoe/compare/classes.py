"""What a change of bits means: within what the class allows, another contract, or a fault.

Two sides' bits are held to the goldens of every contract. Bits that are right under one contract
both before and after have moved within the accumulator class. Bits that were right under one and
are right under another now have changed contract, which somebody may have meant to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.cases import Case, kind_of
from megamoe.compare.stages import unsigned
from megamoe.golden import GoldenError, Store, digest_of, make, rows_of
from megamoe.judge import BadOutput, GoldenLacks, judge_forward
from megamoe.spec.contract import REVISIONS
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import TENSORS

Array = npt.NDArray[Any]

SAME: Final = "same bits"
WITHIN: Final = "other bits within the class"
CONTRACT: Final = "other contract"
OUTSIDE: Final = "outside"
CLASSES: Final = (SAME, WITHIN, CONTRACT, OUTSIDE)
"""The harmless first."""


class Contracts:
    """Which contracts the bits of a case are right under."""

    def __init__(self, root: Path) -> None:
        self._store = Store(root, make)

    def right_under(
        self, case: Case, given: Mapping[str, Any], bits: Mapping[str, Array], accumulator: str
    ) -> list[str]:
        """Revisions, the oldest first; none where the bits are wrong or cannot be judged.

        ``bits``: integers by stage, as a side kept them. Goldens that two revisions share are
        compared once.
        """
        digest, known, out = digest_of(given), dict[str, bool](), []
        plain = {name: _unsigned(name, array) for name, array in bits.items()}
        for name in case.revisions:
            store = self._store.under(REVISIONS[name])
            try:
                key = store.key(case)
                if key not in known:
                    golden = store.load(case, digest)
                    golden.brief = True
                    known[key] = _is_right(case, given, plain, golden, accumulator)
            except (GoldenError, GoldenLacks, BadOutput, KeyError, ValueError):
                continue
            if known[key]:
                out.append(name)
        return out


def of_step(before: Sequence[str], after: Sequence[str]) -> str:
    """The class of bits that moved, from the contracts that they are right under."""
    if not after:
        return OUTSIDE
    return WITHIN if not before or set(before) & set(after) else CONTRACT


def worst(classes: Iterable[str]) -> str:
    """The one to look at; :data:`SAME` for none."""
    return max(classes, key=CLASSES.index, default=SAME)


def said(name: str, before: Sequence[str], after: Sequence[str]) -> str:
    """``other contract: right under 2026-06 before, under 2026-09 now``."""
    if name != CONTRACT:
        return name
    return f"{name}: right under {', '.join(before)} before, under {', '.join(after)} now"


def _unsigned(name: str, array: Array) -> Array:
    """A stage's bits as goldens have them."""
    form = TENSORS[name].form if name in TENSORS else None
    signed = form is None or not (form.signed_zero or form.width == 8)
    return array if signed else unsigned(array)


def _is_right(
    case: Case, given: Mapping[str, Any], bits: Mapping[str, Array], golden: Any, accumulator: str
) -> bool:
    if kind_of(case.kind).is_forward:
        narrowed = rows_of(Problem(**given), case.rows)
        mine = {n: a if case.rows is None else a[case.rows] for n, a in bits.items()}
        judged = judge_forward(mine, golden, accumulator, narrowed, case.rows)
        return not any(found.bad for found in judged.findings)
    names = [name for name in golden.names() if name in bits]
    return bool(names) and all(
        golden.matches(name, bits[name])
        or (name in golden.full and np.array_equal(bits[name], golden.full[name]))
        for name in names
    )
