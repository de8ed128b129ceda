"""The channels of a stage that are wrong, where they follow a pattern: tiles, or every n-th."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_TILES: Final = (256, 128, 64, 32)
"""Channels of a tile, the largest first."""
_STEPS: Final = (2, 4, 8, 16, 32)
FEWEST: Final = 8
"""Fewer wrong channels than this follow a pattern by chance."""
MOST: Final = 4
"""Tiles that are named."""


def pattern(wrong: Array, first: int = 0) -> str:
    """Where the ``wrong`` channels ``(n,)`` are, from channel ``first`` on; else empty.

    A pattern leaves out half of the channels at least, and half of the channels that it names at
    least are wrong. As "tiles 4 and 5 of 128 channels" or "channels n with n modulo 4 = 1".
    """
    at = np.flatnonzero(wrong)
    if len(at) < FEWEST or len(at) > len(wrong) // 2:
        return ""
    at += first
    candidates: list[tuple[float, str]] = []
    for size in _TILES:
        tiles = np.unique(at // size)
        if len(tiles) <= MOST:
            candidates.append((len(tiles) * size, in_words(tiles.tolist(), size)))
    for step in _STEPS:
        rests = np.unique(at % step)
        text = f"channels n with n modulo {step} = {_join(rests.tolist(), 'or')}"
        candidates.append((len(rests) * len(wrong) / step, text))
    width, text = min(candidates, key=lambda one: one[0])  # the first of several as narrow
    return text if width <= min(len(wrong) // 2, 2 * len(at)) else ""


def in_words(tiles: list[int], size: int) -> str:
    """As "tiles 4 and 5 of 128 channels"."""
    return f"{'tiles' if len(tiles) > 1 else 'tile'} {_join(tiles)} of {size} channels"


def _join(numbers: list[int], last: str = "and") -> str:
    *head, tail = map(str, numbers)
    return f"{', '.join(head)} {last} {tail}" if head else tail
