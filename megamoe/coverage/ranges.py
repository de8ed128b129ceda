"""Numbers as classes: the edges where kernels change their ways, and what lies between them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Ranges:
    """Whole numbers from 0 on, each in one class: an edge by itself, or the numbers between two."""

    edges: tuple[int, ...]
    """Ascending from 0."""

    @property
    def classes(self) -> list[str]:
        """Every class, ascending."""
        out = []
        for at, edge in enumerate(self.edges):
            out.append(str(edge))
            if at + 1 == len(self.edges):
                out.append(f"above {edge}")
            elif self.edges[at + 1] > edge + 1:
                out.append(self.of(edge + 1))
        return out

    def of(self, number: int) -> str:
        """The class of ``number``, from 0 on."""
        at = bisect_right(self.edges, number) - 1
        if self.edges[at] == number:
            return str(number)
        if at + 1 == len(self.edges):
            return f"above {self.edges[at]}"
        low, high = self.edges[at] + 1, self.edges[at + 1] - 1
        return str(low) if low == high else f"{low} to {high}"


def around(*tiles: int) -> Iterable[int]:
    """Each tile's height, one less and one more."""
    return (tile + step for tile in tiles for step in (-1, 0, 1))


def _sorted(*parts: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted({n for part in parts for n in part}))


_LARGE: Final = (1024, 2048, 4096, 8192)
TOKENS: Final = Ranges(_sorted(range(10), around(16, 32, 64, 128, 192, 256, 384, 512), _LARGE))
"""Tokens of a call, and rows of an expert: the edges of tiles, and powers of two above."""
ROWS: Final = Ranges(_sorted(range(18), around(24, 32, 48, 64, 96, 128, 192, 256, 384), (512, 1024)))
MODEL_TOKENS: Final = Ranges((0, 1, 2, 3, 8, 64, 512, 1024, 4096, 8192))
TILES: Final = (8, 16, 32, 64, 128)
CALLS: Final = Ranges((0, 1, 2, 3, 10, 100))


def powers(beyond: Sequence[int], size: int, what: str) -> list[str]:
    """``what`` beyond which of the powers of two the last of ``size`` things lies."""
    return [f"{what} beyond 2^{n}" for n in beyond if size > 1 << n]
