"""Numbers as classes: the edges where kernels change their method, and the ranges between them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
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
ROWS: Final = Ranges(
    _sorted(range(18), around(24, 32, 48, 64, 96, 128, 192, 256, 384), (512, 1024))
)
FEWER: Final = Ranges((*range(6), 7, 8, 9, 16, *around(32), 64, 65, 128, 256, 384, 512, *_LARGE))
"""Token counts of operations without tiles: staging and the remap."""
TILES: Final = (8, 16, 32, 64, 128)
CALLS: Final = Ranges((0, 1, 2, 3, 10, 100))


@dataclass(frozen=True)
class Bands:
    """Whole numbers from ``firsts[0]`` on, by the band that they lie in."""

    firsts: tuple[int, ...]
    """The first number of each band, ascending."""

    @property
    def classes(self) -> list[str]:
        """Every band."""
        return [self.of(first) for first in self.firsts]

    def of(self, number: int) -> str:
        """The band of ``number``; below all of them, itself."""
        at = bisect_right(self.firsts, number) - 1
        if at < 0:
            return str(number)
        if at + 1 == len(self.firsts):
            return f"{self.firsts[at]} and above"
        low, high = self.firsts[at], self.firsts[at + 1] - 1
        return str(low) if low == high else f"{low} to {high}"


MODEL_TOKENS: Final = Bands((1, 2, 3, 8, 64, 512, 1024, 4096, 8192))
