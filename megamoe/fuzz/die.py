"""Choices that are the same everywhere: integers from a key and a word, no state."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from megamoe.cases.counter import key

STREAM: Final = 0x46555A5A
"""The stream of all dice; no number of :mod:`megamoe.cases.streams`, so no recipe has the same
bits."""
T = TypeVar("T")


@dataclass(frozen=True)
class Die:
    """The die of one problem. Each word has a throw of its own, whatever else is thrown."""

    seed: int
    number: int

    def key(self, word: str) -> int:
        """A 64-bit key of this problem and this word."""
        return key(self.seed, STREAM, self.number, zlib.crc32(word.encode()))

    def below(self, word: str, bound: int) -> int:
        """An integer in [0, bound), ``bound`` from 1 to 2**32."""
        return ((self.key(word) >> 32) * bound) >> 32

    def within(self, word: str, low: int, high: int) -> int:
        """An integer from ``low`` to ``high``, both included."""
        return low + self.below(word, high - low + 1)

    def one_in(self, word: str, count: int) -> bool:
        """True once in ``count`` throws."""
        return self.below(word, count) == 0

    def of(self, word: str, options: Sequence[T]) -> T:
        """One of ``options``, with equal probability."""
        return options[self.below(word, len(options))]

    def by_weight(self, word: str, options: Sequence[tuple[int, T]]) -> T:
        """One of ``options``, pairs ``(weight, value)``, with a probability in proportion to its
        weight."""
        rest = self.below(word, sum(weight for weight, _ in options))
        for weight, value in options:
            rest -= weight
            if rest < 0:
                return value
        raise AssertionError("a throw is below the sum of the weights")
