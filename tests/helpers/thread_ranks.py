"""Ranks as threads: the collective of :mod:`megamoe.layer.messages` over a barrier.

A process group costs a process a rank and seconds of start. What decides rows and bits stands above
the collective, so most tests of expert parallelism need no more than this. The real groups run in
``tests/test_ep.py`` and in the cases of kind ``ep``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

PATIENCE = 20.0


@dataclass
class World:
    """``ranks`` threads that exchange tensors."""

    ranks: int
    parts: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.ranks)


@dataclass(frozen=True)
class Group:
    """The process group as one rank sees it."""

    world: World
    at: int

    def size(self) -> int:
        return self.world.ranks

    def rank(self) -> int:
        return self.at


def all_to_all(
    rows: torch.Tensor, out: list[int] | None, into: list[int] | None, group: Any
) -> torch.Tensor:
    """As the real one; a rank that never comes is a ``RuntimeError`` on the others."""
    world, sizes = group.world, [1] * group.size() if out is None else out
    assert len(rows) == sum(sizes), "the counts do not fit the rows"
    try:
        world.parts[group.at] = list(rows.split(sizes))
        world.barrier.wait(PATIENCE)
        came = torch.cat([world.parts[r][group.at] for r in range(world.ranks)])
        world.barrier.wait(PATIENCE)
    except threading.BrokenBarrierError:
        raise RuntimeError("a rank did not come") from None
    assert into is None or len(came) == sum(into), "another number of rows came"
    return came.clone()


def over_ranks(ranks: int, call: Callable[[Group], Any]) -> list[Any]:
    """The result of ``call`` on each rank; its exception in place of one that raised."""
    world = World(ranks)

    def one(rank: int) -> Any:
        try:
            return call(Group(world, rank))
        except Exception as error:
            return error

    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(one, range(ranks)))
