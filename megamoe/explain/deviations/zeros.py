"""Sums or activations that are zero: what a row of zeros gives, as a padding row is.

Their scale bytes are those of the contract's floor. Where it has none, these are the codes and
bytes of a slot that is left out (:data:`megamoe.explain.places.ZERO_SLOT`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from megamoe.explain.life import Life
from megamoe.explain.ways import Way, right

SUMS: Final = "all sums are zero"
ACTIVATIONS: Final = "all activations are zero"


def catalogue(life: Life) -> Iterator[Way]:
    """Zeros from linear 1 on; and from the activations on, where a routing weight of infinity or
    NaN makes that something else."""
    own = right(life)
    if own.exponent(np.zeros(1, np.float32))[0]:
        yield own.variant(SUMS, "linear 1", total=lambda blocks: np.zeros(blocks.shape[1:]))
        if not np.isfinite([slot.weight for slot in life.slots]).all():
            yield own.variant(ACTIVATIONS, "requantise", values=np.zeros_like)
