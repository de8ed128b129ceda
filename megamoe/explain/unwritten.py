"""Rows of ``y`` that nobody may have written: those of tokens without a live slot."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from megamoe.explain.rules import Bools
from megamoe.printable import quantity
from megamoe.spec.problem import Problem


def zero_rows(problem: Problem) -> Bools:
    """``(T,)``: tokens whose ``y`` is zero whatever the values are: they have no live slot, no
    shared expert, and no output that is added."""
    if problem.shared_output is not None or problem.shared_weights:
        return np.zeros(problem.num_tokens, np.bool_)
    ids = problem.topk_ids.numpy()
    dead: Bools = ((ids >= 0) & (ids < problem.num_experts)).sum(axis=1) == 0
    return dead


def garbage(problem: Problem, y: npt.NDArray[Any]) -> Bools:
    """``(T,)``: those of :func:`zero_rows` that are not zero in ``y`` (T, H) bfloat16 bits."""
    rows: Bools = zero_rows(problem) & ((y & 0x7FFF) != 0).any(axis=1)
    return rows


def repeat_note(problem: Problem, y: npt.NDArray[Any], again: npt.NDArray[Any]) -> str:
    """What a second call with the same inputs shows of these rows; empty where it shows nothing.
    ``y`` and ``again``: (T, H) bfloat16 bits."""
    wrong = garbage(problem, y)
    changes = int((wrong & (y != again).any(axis=1)).sum())
    if not changes:
        return ""
    return (
        f"a second call gives other values at {changes} of {quantity(int(wrong.sum()), 'token')} "
        "without a live slot: it looks like memory that nobody wrote"
    )
