"""The classes that captured calls enter and the suite does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megamoe.cases.stored import load
from megamoe.coverage.counting import classes_of_problem
from megamoe.coverage.dimension import Dimension, Tally
from megamoe.spec.contract import Contract


@dataclass(frozen=True)
class Beyond:
    """One dimension of the traffic."""

    dimension: str
    count: int
    """Classes that the traffic enters."""
    missing: dict[str, list[str]]
    """Class that no case enters -> files that do, some of them."""


def files(folder: Path) -> list[Path]:
    """The stored problems of a folder. ``ValueError`` if there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: is no directory; name one with files of `megamoe capture`")
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{folder}: holds no .safetensors file; `megamoe capture` writes them")
    return paths


def count(paths: Sequence[Path], contract: Contract, on_file: Callable[[Path], None]) -> Tally:
    """The classes that the calls of these files enter. ``ValueError`` for a file that is no stored
    problem."""
    out = Tally()
    for path in paths:
        out.add(path.name, classes_of_problem(load(path).problem, contract))
        on_file(path)
    return out


def beyond(traffic: Tally, suite: Tally, dimensions: Sequence[Dimension]) -> list[Beyond]:
    """Dimension by dimension; classes that are no goal count as well."""
    out = []
    for d in dimensions:
        mine, theirs = traffic.of(d), suite.of(d)
        order = {one: at for at, one in enumerate(d.goal)}
        missing = sorted((one for one in mine if not theirs[one]),
                         key=lambda one: (order.get(one, len(order)), one))  # fmt: skip
        if mine:
            examples = {one: traffic.examples[d.name, one] for one in missing}
            out.append(Beyond(d.name, len(mine), examples))
    return out
