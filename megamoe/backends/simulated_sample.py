"""A sample of what a simulated kernel computes of a problem that is too large to compute whole.

A class bounds each output alone, so a member may be the reference in any output and itself in the
others. A sample is such a kernel: it computes some groups of 32 intermediate channels, each with
its scale byte, and has the reference's codes everywhere else. From these mixed codes it computes
some channels of ``y``. All of it is judged as the output of any other kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from megamoe.backends.simulate import Kernel, Rng, combine, requantise, stage, swiglu
from megamoe.spec.formats import F64, GROUP, U8, U16, bf16_round
from megamoe.spec.forms import bits
from megamoe.spec.problem import Problem

I64 = npt.NDArray[np.int64]
Operands = tuple[U8, U8, U8, U8]
"""(R, C) codes, (R, C/32) scale bytes, (N, C/2) packed weights, (N, C/32) scale bytes."""

TOKENS: Final = 4
"""Rows of a sample at most."""
CHANNELS: Final = 16
"""Channels of ``y`` that a sample has before it takes a second row."""
TOGETHER: Final = 1 << 9
"""Sums of a call in which operands of several experts stand side by side: a kernel loops over K in
Python, so one call with some sums that nobody reads is faster than two calls."""


@dataclass(frozen=True)
class Sample:
    """Some rows of a problem, ``t`` of them, and some channels of ``y``, ``n`` of them."""

    tokens: I64
    """(t,) ascending."""
    channels: I64
    """(n,) ascending."""
    groups: I64
    """(g, 3): row of the sample, slot, and group of 32 channels; all else is the reference's."""
    codes: U8
    """(t, K, I)."""
    sf: U8
    """(t, K, I/32)."""
    y: U16
    """(t, n) bfloat16 bits."""


def sample_of(
    problem: Problem, kernel: Kernel, seed: int, codes: U8, sf: U8, products: int
) -> Sample:
    """The sample of ``seed`` that takes about ``products`` products, one half in each linear.

    ``codes`` ``(T, K, I)`` and ``sf`` ``(T, K, I/32)`` are the reference's for all rows of
    ``problem``. A sample has at least one group and one channel, whatever they cost.
    ``ValueError`` for a problem without a live slot.
    """
    rng = np.random.default_rng(seed)
    ids = problem.topk_ids.numpy()
    half, inter = products // 2, problem.intermediate_size
    rows = np.flatnonzero((ids >= 0).any(axis=1))
    if not len(rows):
        raise ValueError("no slot of the problem has an expert; there is nothing to sample")
    count = half // (CHANNELS * ids.shape[1] * inter)
    tokens = _some(rng, rows, min(TOKENS, count))
    live = np.argwhere(ids[tokens] >= 0)
    channels = _some(rng, np.arange(problem.hidden_size), half // (len(live) * inter))
    of_slots = inter // GROUP
    selection = _some(
        rng, np.arange(len(live) * of_slots), half // (2 * GROUP * problem.hidden_size)
    )
    groups = np.column_stack([live[selection // of_slots], selection % of_slots])
    codes, sf = codes[tokens].copy(), sf[tokens].copy()
    _first(problem, kernel, tokens, groups, codes, sf, rng)
    y = _second(problem, kernel, tokens, channels, codes, sf, rng)
    return Sample(tokens, channels, groups, codes, sf, y)


def _some(rng: Rng, of: I64, count: int) -> I64:
    """``count`` of them, at least one, at most all, in their order."""
    return np.sort(rng.choice(of, min(max(1, count), len(of)), replace=False))


def _first(
    problem: Problem, kernel: Kernel, tokens: I64, groups: I64, codes: U8, sf: U8, rng: Rng
) -> None:
    """Write the groups that the kernel computes into ``codes`` and ``sf``."""
    ids, inter = problem.topk_ids.numpy()[tokens], problem.intermediate_size
    x, x_sf = stage(bits(problem.hidden_states)[tokens])
    slots = np.unique(groups[:, :2], axis=0)
    of_slot = [groups[(groups[:, :2] == slot).all(axis=1), 2] for slot in slots]
    operands = []
    for (row, slot), at in zip(slots, of_slot, strict=True):
        gate = (at[:, None] * GROUP + np.arange(GROUP)).ravel()
        channels, expert = np.concatenate([gate, gate + inter]), ids[row, slot]
        weights = problem.w13_weight[expert].numpy(), problem.w13_weight_scale[expert].numpy()
        operands.append((x[row, None], x_sf[row, None], *(w[channels] for w in weights)))
    for (row, slot), at, sums in zip(slots, of_slot, linears(kernel, operands, rng), strict=True):
        weight = problem.topk_weights.numpy()[tokens[row], slot].reshape(1, 1)
        clamp, fast = problem.activation_clamp, problem.fast_math
        result = requantise(swiglu(sums, weight, clamp, fast, kernel.silu, rng))
        codes[row, slot].reshape(-1, GROUP)[at] = result[0].reshape(-1, GROUP)
        sf[row, slot, at] = result[1][0]


def _second(
    problem: Problem, kernel: Kernel, tokens: I64, channels: I64, codes: U8, sf: U8, rng: Rng
) -> U16:
    """``y`` at ``channels`` from the codes."""
    ids = problem.topk_ids.numpy()[tokens]
    slots = np.zeros((*ids.shape, len(channels)), np.uint16)
    experts = np.unique(ids[ids >= 0])
    places = [np.nonzero(ids == expert) for expert in experts]
    operands = [
        (codes[at], sf[at], problem.w2_weight[e].numpy()[channels],
         problem.w2_weight_scale[e].numpy()[channels])
        for e, at in zip(experts, places, strict=True)
    ]  # fmt: skip
    for at, sums in zip(places, linears(kernel, operands, rng), strict=True):
        slots[at] = bf16_round(sums)
    return combine(slots, ids >= 0)


def linears(kernel: Kernel, operands: Sequence[Operands], rng: Rng) -> list[F64]:
    """``kernel.linear`` of each, several at a time where that costs little."""
    out: list[F64] = []
    for batch in _batches(operands):
        codes, sf, packed, weight_sf = (np.concatenate(part) for part in zip(*batch, strict=True))
        together = kernel.linear(codes, sf, packed, weight_sf, rng)
        row = column = 0
        for one in batch:
            below, right = row + len(one[0]), column + len(one[2])
            out.append(together[row:below, column:right])
            row, column = below, right
    return out


def _batches(operands: Sequence[Operands]) -> Iterator[list[Operands]]:
    batch: list[Operands] = []
    for one in operands:
        rows, columns = (sum(len(o[part]) for o in [*batch, one]) for part in (0, 2))
        if batch and rows * columns > TOGETHER:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch
