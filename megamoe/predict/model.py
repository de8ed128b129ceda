"""The models: which unit, in which order over K, with which silu, and how each is known.

A variant is a model with one change. :func:`variants` lists those that a difference between a
prediction and a machine is tried against.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from megamoe.oracle.linear import Columns, Rows
from megamoe.oracle.units import (
    ASCENDING,
    BLACKWELL_MX,
    F64,
    HOPPER_16BIT,
    INTERLEAVED,
    Unit,
    chain,
)
from megamoe.predict.tables import of_class
from megamoe.spec.formats import GROUP, U8


@dataclass(frozen=True)
class Model:
    """One kernel's arithmetic, as far as no contract says it."""

    name: str
    unit: Unit
    accumulator: str
    """Class that holds its results; a backend of that class is compared with its prediction."""
    silu: str
    """Recording of :mod:`megamoe.predict.tables`; '' for the oracle's reference."""
    fast: str
    precise: str
    """The names of the tables for fast and for precise silu."""
    evidence: str
    assumptions: str
    """The evidence for the model, and the assumptions that no machine has confirmed."""
    order: tuple[int, ...] = ASCENDING
    """The order in which the steps take the 32 values of a group."""
    folded: bool = False
    """Scale factors are multiplied into bfloat16 operands."""
    descending: bool = False
    """The groups of K from the last to the first."""
    apart: int = 0
    """The number of groups that are summed from zero, before fp32 adds the sums; 0: one chain."""

    def linear(self, codes: U8, sf: U8, weights: U8, weight_sf: U8) -> F64:
        """``(R, C)`` codes with ``(R, C/32)`` scale bytes by ``(N, ...)`` weights: ``(R, N)``.

        ``ValueError`` where an operand with its scale factor is no bfloat16 number and the model
        takes these.
        """
        groups = sf.shape[1]
        if self.descending:
            codes = codes.reshape(len(codes), groups, -1)[:, ::-1].reshape(codes.shape)
            weights = weights.reshape(len(weights), groups, -1)[:, ::-1].reshape(weights.shape)
            sf, weight_sf = sf[:, ::-1], weight_sf[:, ::-1]
        if not self.apart:
            return self._chain(codes, sf, weights, weight_sf)
        width = weights.shape[1] // groups
        total = np.zeros((len(codes), len(weights)), np.float32)
        for start in range(0, groups, self.apart):
            k, end = slice(start, start + self.apart), start + self.apart
            part = self._chain(
                codes[:, start * GROUP : end * GROUP], sf[:, k],
                weights[:, start * width : end * width], weight_sf[:, k],
            )  # fmt: skip
            with np.errstate(invalid="ignore", over="ignore"):
                total += part.astype(np.float32)
        return total.astype(np.float64)

    def _chain(self, codes: U8, sf: U8, weights: U8, weight_sf: U8) -> F64:
        operands = (np.ascontiguousarray(a) for a in (codes, sf, weights, weight_sf))
        codes, sf, weights, weight_sf = operands
        rows, columns = Rows.of(codes, sf), Columns.of(weights, weight_sf)
        return chain(self.unit, rows, columns, folded=self.folded, order=self.order)


_HOPPER_S: Final = "nvidia-h200-sm90"
_SM100_S: Final = of_class("sm100", _HOPPER_S)
SM100: Final = Model(
    "sm100", BLACKWELL_MX, "sm100-mxf8f6f4", _SM100_S, "fast", "precise",
    "DeepGEMM's sm100_fp8_fp4_mega_moe.cuh, read: tcgen05 kind::mxf8f6f4 takes 32 values of K and "
    "their scale bytes a step; one chain from zero over all of K, ascending; no promotion",
    "how the unit adds scaled products (MMA-Sim 2.1.1); that two CTAs add as one"
    + ("; that Blackwell's exponential and reciprocal are Hopper's" * (_SM100_S == _HOPPER_S)),
)  # fmt: skip
HOPPER_TRITON: Final = Model(
    "hopper-triton", HOPPER_16BIT, "fp32-ordered", _HOPPER_S, "triton_fast",
    "triton_precise",
    "this project's kernel on an H200: the bits of its forward cases, golden/recorded/triton",
    "nothing that these bits show",
    INTERLEAVED, True,
)  # fmt: skip
MODELS: Final = {m.name: m for m in (SM100, HOPPER_TRITON)}


def model(name: str) -> Model:
    """The model of that name, or ``ValueError``."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
    return MODELS[name]


def variants(base: Model) -> Iterator[tuple[str, Model]]:
    """Each single change of ``base`` that is tried, with what it is called."""

    def other(**numbers: Any) -> Model:
        return replace(base, unit=replace(base.unit, **numbers))

    unit = base.unit
    for bits in (unit.align_bits - 1, unit.align_bits + 1, unit.align_bits - 2):
        yield f"{bits} bits kept in the alignment, not {unit.align_bits}", other(align_bits=bits)
    yield f"{unit.result_bits - 1} bits of the sum kept", other(result_bits=unit.result_bits - 1)
    for step in (8, 16, 32):
        if step != unit.step:
            yield f"steps of {step} values, not {unit.step}", other(step=step)
    yield "K descending", replace(base, descending=True)
    for order, name in ((ASCENDING, "in order"), (INTERLEAVED, "by bit 2 of their index")):
        if order != base.order and unit.step < GROUP:
            yield f"the values of a group {name}", replace(base, order=order)
    for groups in (1, 4):
        yield (f"each {groups * GROUP} values summed from zero, then added in fp32",
               replace(base, apart=groups))  # fmt: skip
    yield "correctly rounded silu", replace(base, silu="")
    for fast, precise in (("triton_fast", "triton_precise"), ("fast", "precise")):
        if base.silu and fast != base.fast:
            yield f"the silu tables {fast} and {precise}", replace(base, fast=fast, precise=precise)
    yield "fast and precise silu exchanged", replace(base, fast=base.precise, precise=base.fast)


__all__ = ["HOPPER_TRITON", "MODELS", "SM100", "Model", "model", "variants"]
