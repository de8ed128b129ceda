"""Coverage: which codes, branches, sizes and patterns the cases enter, and which none enters.

``dimension`` defines a dimension, ``dimensions`` lists all with their goals; ``calls``, ``values``,
``places`` and ``kinds`` say what a case enters; ``counting`` counts over all cases; ``holes`` reads
the known holes, ``recorded`` the last count. The package itself imports nothing that is slow, so
that another tool can ask for rare classes.
"""

from __future__ import annotations

from pathlib import Path

from megamoe.coverage import recorded


def rare(root: Path, most: int = 0) -> list[tuple[str, str, int]]:
    """Dimension, class and number of cases, for classes of a goal that at most ``most`` cases
    enter.

    The default gives the holes. ``root`` is the directory golden/; the numbers are those of the
    last ``megamoe coverage --record``. ``ValueError`` if there are none.
    """
    return [
        (dimension, one, number)
        for dimension, classes in recorded.counts(root).items()
        for one, number in classes.items() if number <= most
    ]  # fmt: skip


__all__ = ["rare"]
