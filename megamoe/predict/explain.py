"""Which single change of a model gives what a machine showed, where the model itself does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from megamoe.golden.predicted import observable
from megamoe.golden.store import canonical
from megamoe.judge.judgements import RESULTS
from megamoe.predict.forward import predict
from megamoe.predict.model import Model, variants
from megamoe.spec.contract import Contract
from megamoe.spec.problem import Problem

Array = npt.NDArray[Any]
ROWS: Final = 4
"""Rows that are tried, of those that differ: each is a forward of its own."""


@dataclass(frozen=True)
class Trial:
    """What was shown against one model: elements that differ, by stage."""

    name: str
    apart: Mapping[str, int]

    @property
    def count(self) -> int:
        """All of them."""
        return sum(self.apart.values())

    def line(self) -> str:
        """In a few words."""
        counts = ", ".join(f"{n} {count}" for n, count in self.apart.items() if count)
        return f"{self.name}: {counts or 'nothing'} differs"


def explain(
    problem: Problem, actual: Mapping[str, Array], model: Model, contract: Contract
) -> list[Trial]:
    """The model itself, then every single change of it, the nearest first.

    ``actual`` are the stages of all rows of ``problem``, of which the first :data:`ROWS` that
    differ are tried. A change that leaves nothing explains them. Changes for which the model has no
    word are left out.
    """
    ids = problem.topk_ids.numpy()
    own = predict(problem, model, contract).stages
    whole = Trial(model.name, differences(actual, own, ids))
    rows = _rows(actual, own, ids)[:ROWS]
    if not len(rows):
        return [whole]
    part = problem.at_rows(torch.from_numpy(rows))
    some = {name: actual[name][rows] for name in RESULTS if name in actual}
    trials = []
    for name, other in variants(model):
        try:
            stages = predict(part, other, contract).stages
        except ValueError:
            continue
        trials.append(Trial(name, differences(some, stages, ids[rows])))
    return [whole, *sorted(trials, key=lambda t: t.count)]


def differences(actual: Mapping[str, Array], expected: Mapping[str, Array], ids: Array) -> Any:
    """Elements that differ in each stage that is shown, in the order of computation."""
    return {name: int(apart.sum()) for name, apart in _apart(actual, expected, ids).items()}


def _apart(actual: Mapping[str, Array], expected: Mapping[str, Array], ids: Array) -> Any:
    one, other = observable(actual), observable(expected)
    out = {}
    for name in RESULTS:
        if name in one and name in other:
            apart = canonical(name, one[name]) != canonical(name, other[name])
            out[name] = apart if name == "y" else apart & (ids >= 0)[:, :, None]
    return out


def _rows(actual: Mapping[str, Array], expected: Mapping[str, Array], ids: Array) -> Array:
    masks = [a.reshape(len(ids), -1).any(axis=1) for a in _apart(actual, expected, ids).values()]
    return np.flatnonzero(np.logical_or.reduce(masks))


def describe(trials: list[Trial]) -> str:
    """One line: the changes that explain what was shown, or the nearest."""
    whole, *others = trials
    fit = [t.name for t in others if not t.count]
    if fit:
        return f"{whole.line()}; {' or '.join(fit)} would explain it"
    if not others:
        return whole.line()
    return f"{whole.line()}; no single change explains it, the nearest is {others[0].line()}"


__all__ = ["Trial", "describe", "differences", "explain"]
