"""A dimension of coverage, and its count: plain data, without NumPy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

EXAMPLES: Final = 2
"""Cases that are named for a class."""


@dataclass(frozen=True)
class Dimension:
    """One question about the cases, with its classes: which of them does a case enter?"""

    name: str
    unit: str
    """The thing that is divided into classes."""
    goal: Mapping[str, str]
    """The goal: class -> the fault that could hide if no case enters it. Classes without a key are
    counted too, and are no goal."""


def each(classes: Iterable[object], fault: str) -> dict[str, str]:
    """A goal of ``classes`` with one sentence, in which ``{}`` is the class."""
    return {str(c): fault.format(c) for c in classes}


@dataclass
class Tally:
    """Classes that some cases enter."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    """Dimension -> class -> cases that enter it."""
    examples: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    """Dimension and class -> up to :data:`EXAMPLES` of these cases."""

    def add(self, case: str, by_dimension: Mapping[str, Iterable[str]]) -> None:
        """Count one case, ``by_dimension`` being dimension -> classes."""
        for dimension, classes in by_dimension.items():
            counter = self.counts.setdefault(dimension, Counter())
            for one in set(classes):
                counter[one] += 1
                examples = self.examples.setdefault((dimension, one), [])
                if len(examples) < EXAMPLES:
                    examples.append(case)

    def of(self, dimension: Dimension) -> Counter[str]:
        """The number of cases that enter each of its classes, also of classes beyond the goal."""
        return self.counts.get(dimension.name, Counter())

    def holes(self, dimension: Dimension) -> list[str]:
        """Classes of the goal that no case enters, in the order of the goal."""
        counts = self.of(dimension)
        return [one for one in dimension.goal if not counts[one]]


def runs(classes: Iterable[str], order: Iterable[str]) -> Iterator[tuple[str, str]]:
    """First and last of each run of neighbours in ``order``."""
    members, run = set(classes), list[str]()
    for one in order:
        if one in members:
            run.append(one)
        elif run:
            yield run[0], run[-1]
            run = []
    if run:
        yield run[0], run[-1]


def brief(classes: Iterable[str], order: Iterable[str]) -> list[str]:
    """The classes with runs of neighbours as ``first..last``."""
    return [a if a == b else f"{a}..{b}" for a, b in runs(classes, order)]
