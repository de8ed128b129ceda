"""Deviations of the exponential in silu: its constant, its argument, and its format.

GPUs have an instruction for 2^v only, so a kernel multiplies the gate by log2(e) first. Here
silu is ``gate / (1 + 2^(-alpha * gate * log2(e)))``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np

from megamoe.explain.deviations.casts import in_half
from megamoe.explain.deviations.roundings import truncated
from megamoe.explain.deviations.sums import unrounded_gate
from megamoe.explain.life import Life
from megamoe.explain.ways import in_bf16
from megamoe.oracle.gates import form_of
from megamoe.spec.formats import F32, F64

_LOG2_E: Final = 1.4426950408889634
_ROUNDED: Final[Mapping[str, Callable[[F32], F32]]] = {
    "rounded to bfloat16": in_bf16, "truncated to bfloat16": truncated, "rounded to fp16": in_half,
}  # fmt: skip
_EXACT_GATE: Final = "exp takes the gate before it is rounded to bfloat16, the numerator after it"
Exp = Callable[[F64], F64]
"""``exp(v)`` of float64."""


def catalogue(life: Life) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and steps; none for an activation without silu."""
    form = form_of(life.token.act, life.contract)
    if form.name != "swiglu":
        return

    def silu(gate: F32, exp: Exp) -> F32:
        # A gate that is rounded already stays as it is.
        power = exp(-form.alpha * gate.astype(np.float64))
        value = (in_bf16(gate) / (1 + power)).astype(np.float32)
        return value if form.most is None else np.fmin(value, np.float32(form.most))

    for name, exp in _EXPONENTIALS.items():
        yield name, {"silu": lambda g, e=exp: silu(g, e)}
    yield _EXACT_GATE, {"silu": lambda g: silu(g, np.exp), "halves": unrounded_gate}


def _by_constant(rounded: Callable[[F32], F32]) -> Exp:
    factor = float(rounded(np.array([_LOG2_E], np.float32))[0])
    return lambda v: np.exp2(v * factor)


def _in_format(rounded: Callable[[F32], F32]) -> Exp:
    """2^v of an instruction that takes and gives a narrow format."""

    def exp(values: F64) -> F64:
        argument = rounded((values * _LOG2_E).astype(np.float32))
        return rounded(np.exp2(argument)).astype(np.float64)

    return exp


_EXPONENTIALS: Final[Mapping[str, Exp]] = {
    **{f"log2(e) is {how} in exp": _by_constant(rounded) for how, rounded in _ROUNDED.items()},
    "exp takes and gives bfloat16": _in_format(in_bf16),
    "exp takes and gives fp16": _in_format(in_half),
}
