"""Medians by CUDA events, of eager launches and of a CUDA graph's replays; and the cost of a
launch.

Caches are cold by the usual method: 256 MiB are written before each repeat. That leaves the
second-level cache full of lines that are dirty, so while the timed work reads its weights, these
lines are still written back, and take bandwidth from it. Nobody is spared: ours, the peers and the
stages are timed alike, and the floor counts none of it.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch

FLUSH_BYTES = 1 << 28
"""Written before every repeat: five times the second-level cache of an H100."""
AHEAD, FURTHEST = 4, 64
"""Times that they are written before a replay, at first and at most, so that the host is ahead."""


def events(step: Callable[[], object], repeats: int, *, ahead: bool = False) -> float:
    """Microseconds of ``step`` on the device, the median of ``repeats``, caches flushed.

    Includes GPU idle time spent waiting for the CPU, unless the host is to be ``ahead``. Then a
    repeat is discarded if the device began it before the CPU had submitted all of it; it is
    repeated with more work before it.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        step()
    flushes = AHEAD if ahead else 1
    took: list[float] = []
    while len(took) < repeats:
        for _ in range(flushes):
            flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        late = begin.query()
        torch.cuda.synchronize()
        if ahead and late and flushes < FURTHEST:
            flushes *= 2
        else:
            took.append(begin.elapsed_time(end) * 1e3)
    return median(took)


def host(step: Callable[[], object], repeats: int) -> float:
    """Microseconds until ``step`` returns, the median of ``repeats``, with an empty queue before.

    This is the host's cost of eager launches. A step that waits for the device includes that wait.
    """
    took = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = perf_counter()
        step()
        took.append((perf_counter() - begin) * 1e6)
    torch.cuda.synchronize()
    return median(took)


def graph(step: Callable[[], object], repeats: int) -> float:
    """:func:`events` for replays of a CUDA graph of ``step``, with the host ahead.

    Raises the errors of the capture.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    cuda_graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(cuda_graph):
        step()
    return events(cuda_graph.replay, repeats, ahead=True)
