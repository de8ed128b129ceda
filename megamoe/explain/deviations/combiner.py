"""The combine of one token in steps that a deviation can replace one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from megamoe.explain.deviations import fp8_rows, orders
from megamoe.explain.deviations.fp8_rows import Read
from megamoe.explain.life import Life, combine_of
from megamoe.explain.ways import Rows
from megamoe.spec.formats import F32, F64, U16, bf16_decode, bf16_round


@dataclass(frozen=True)
class Combiner:
    """One combine in steps: rows as they are read, their sum from zero, and what follows it."""

    life: Life
    read: Read
    finish: Callable[[F32], U16]

    def __call__(self, sums: Callable[[orders.Terms], F32], rows: Rows) -> U16:
        """``sums`` takes the rows by slot, in the contract's order, and adds them."""
        slots = len(self.life.token.ids)
        order = combine_of(self.life.token, self.life.channels, self.life.contract).order(
            slots, slots in rows
        )
        every = [slots if k is None else k for k in order]
        terms = {k: self.read(rows[k]).astype(np.float32) for k in every if k in rows}
        return self.finish(sums(terms) if terms else np.zeros(len(self.life.channels), np.float32))

    @classmethod
    def of(cls, life: Life) -> Combiner:
        """The contract's steps; a product of an E4M3 value and its scale is exact in fp32."""
        reads = fp8_rows.read() if life.token.dtype == "fp8" else as_it_is
        return cls(life, reads, partial(y_of_sum, life, bf16_round))


def as_it_is(row: F32) -> F64:
    """A row that is read as the bfloat16 that it is."""
    return row.astype(np.float64)


def y_of_sum(life: Life, rounded: Callable[[F32], U16], total: F32) -> U16:
    """``y`` of the sum: rounded, then with the output that the call adds."""
    y = rounded(total)
    return y if life.token.output is None else bf16_round(bf16_decode(y) + output_of(life))


def output_of(life: Life) -> F32:
    """``(n,)`` output that the call adds after the combine; there must be one."""
    assert life.token.output is not None
    return bf16_decode(life.token.output[life.channels])
