"""One staging call as data: its inputs, and what a backend staged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.explain.sources import Token
from megamoe.spec.features import Activation
from megamoe.spec.formats import F32, U16
from megamoe.spec.tensors import OPERATIONS, TENSORS

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]
NAMES: Final = OPERATIONS["prepare"].returns
VALUES: Final = ("x", "x_sf")
"""What is computed; ids and weights are copied."""


@dataclass(frozen=True)
class Batch:
    """The inputs of one staging call; a source of tokens for the catalogue."""

    hidden: U16
    """(T, H) bfloat16 bits."""
    ids: Array
    """(T, K) int32 or int64."""
    weights: F32
    """(T, K)."""
    experts: int
    padding: Bools | None = None
    """(T,)."""

    @property
    def tokens(self) -> int:
        return len(self.hidden)

    @property
    def hidden_size(self) -> int:
        return self.hidden.shape[1]

    def token(self, at: int) -> Token:
        """Its row; the sizes of the layer behind it play no part."""
        act = Activation("swiglu", None, 1.0, 0.0, True)
        return Token(self.hidden[at], self.ids[at], self.weights[at], 0, self.experts, act)


@dataclass(frozen=True)
class StagedOutput:
    """What a backend staged."""

    tensors: Mapping[str, Array]
    """By name of ``NAMES``, as bits: the rows of the batch."""
    beyond: Mapping[str, Array]
    """The rows of the buffer after them; none where they are not known."""
    blank: int
    """The byte that stood everywhere before the call."""


def differs(name: str, actual: Array, expected: Array) -> Bools:
    """``(T, n)``: elements of other bits; NaN equals NaN."""
    tensor = TENSORS[name]
    form = tensor.form_of(actual)
    actual, expected = tensor.elements(actual), tensor.elements(expected)
    return (actual != expected) & ~(form.is_nan(actual) & form.is_nan(expected))


__all__ = ["NAMES", "VALUES", "Batch", "StagedOutput", "differs"]
