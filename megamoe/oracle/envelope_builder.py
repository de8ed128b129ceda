"""The envelope of a problem under one class, filled in expert by expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megamoe.oracle import swiglu
from megamoe.oracle.combine import Combine
from megamoe.oracle.envelope import Envelope
from megamoe.spec.formats import GROUP, U8, U16


@dataclass(frozen=True)
class EnvelopeBuilder:
    """The envelope of one class, filled in expert by expert."""

    rows_lo: U16
    rows_hi: U16
    sf_lo: U8
    sf_hi: U8
    key_lo: npt.NDArray[np.int16]
    key_hi: npt.NDArray[np.int16]
    open_groups: list[tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]]

    @classmethod
    def empty(cls, tokens: int, slots: int, hidden: int, intermediate: int) -> EnvelopeBuilder:
        rows = (tokens, slots, hidden)
        acts = (tokens, slots, intermediate)
        groups = (tokens, slots, intermediate // GROUP)
        return cls(
            np.zeros(rows, np.uint16),
            np.zeros(rows, np.uint16),
            np.zeros(groups, np.uint8),
            np.zeros(groups, np.uint8),
            np.zeros(acts, np.int16),
            np.zeros(acts, np.int16),
            [],
        )

    def take(
        self, at: tuple[Any, Any], acts: swiglu.Activations, rows_lo: U16, rows_hi: U16
    ) -> None:
        """Record codes, exponents and rows of some slots."""
        self.rows_lo[at], self.rows_hi[at] = rows_lo, rows_hi
        first, last = acts.exponents()
        self.sf_lo[at], self.sf_hi[at] = first, last
        self.key_lo[at], self.key_hi[at] = acts.code_keys(first)
        row, group = np.nonzero(first != last)
        if row.size:
            shape = (*self.sf_lo.shape,)
            flat = np.ravel_multi_index((at[0][row], at[1][row], group), shape)
            low, high = (end.reshape(len(first), -1, GROUP)[row, group] for end in acts.open_ends())
            self.open_groups.append((flat, low, high))

    def envelope(self, combine: Combine, shared: tuple[U16, U16] | None) -> Envelope:
        """The envelope of all stages and of ``y``."""
        flat, low, high = (
            (np.concatenate(part) for part in zip(*self.open_groups, strict=True))
            if self.open_groups
            else (np.zeros(0), np.zeros((0, GROUP)), np.zeros((0, GROUP)))
        )
        order = np.argsort(flat, kind="stable")
        return Envelope(
            *combine.ends(self.rows_lo, self.rows_hi, shared),
            self.sf_lo,
            self.sf_hi,
            self.key_lo,
            self.key_hi,
            flat[order].astype(np.uint32),
            low[order].astype(np.float32),
            high[order].astype(np.float32),
            combine.contract,
        )
