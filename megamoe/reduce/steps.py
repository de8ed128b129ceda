"""The steps of a reduction: tokens, slots, experts, blocks of I and H, values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from megamoe.cases.stored import capacity_for, used_experts
from megamoe.golden import rows_of
from megamoe.reduce.core import Reduction, minimal
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import TENSORS
from megamoe.spec.weights import layout_of


def tokens(r: Reduction) -> None:
    """The worst token, and only the company that it needs to fail.

    A token's golden depends on that token alone, so the oracle answers once, and each try costs one
    run of the backend. If the worst token is unknown, each try is judged in full.
    """
    before, worst = r.problem, r.verdict.worst
    everybody = list(range(before.num_tokens))

    def some(p: Problem, rows: list[int]) -> Problem:
        return replace(rows_of(p, rows), max_num_tokens=capacity_for(len(rows)))

    if worst is None or worst.token is None:
        r.keep(everybody, some)
        return
    mine = worst.token
    if r.take(some(before, [mine])):
        return
    golden = r.golden_of(rows_of(before, [mine]))
    survivors = everybody

    def fails(others: list[int]) -> bool:
        nonlocal survivors
        rows = sorted({mine, *others})
        if r.row_fails(some(before, rows), rows.index(mine), golden):
            survivors = rows
            return True
        return False

    minimal([row for row in everybody if row != mine], fails, r.is_late, _company(before, mine))
    if len(survivors) < len(everybody) and not r.take(some(before, survivors)):
        r.keep(everybody, some)  # the others fail in another way, earlier: judge all of them


def _company(p: Problem, mine: int) -> list[list[int]]:
    """First guesses: one other token that shares an expert with this one, then those before it."""
    ids = p.topk_ids
    shares = [
        row for row in range(p.num_tokens)
        if row != mine and bool(torch.isin(ids[row], ids[mine][ids[mine] >= 0]).any())
    ]  # fmt: skip
    near = sorted(shares, key=lambda row: abs(row - mine))[:4]
    return [*([row] for row in near), list(range(mine))]


def guess(r: Reduction) -> None:
    """The two tries that most often succeed: one slot, and one expert for all slots."""
    p, worst = r.problem, r.verdict.worst
    if p.top_k > 1:
        only = worst.slot if worst is not None and worst.slot is not None else 0
        r.take(_with_slots(p, [only]))
    ids = r.problem.topk_ids
    if len(used_experts(r.problem)) > 1:
        one = worst.expert if worst is not None and worst.expert is not None else int(ids.max())
        r.take(replace(r.problem, topk_ids=torch.where(ids >= 0, one, ids)))


def slots(r: Reduction) -> None:
    """The fewest slots, the worst one's first."""

    worst = r.verdict.worst
    first = [worst.slot] if worst is not None and worst.slot is not None else []
    r.keep(range(r.problem.top_k), _with_slots, first)


def _with_slots(p: Problem, slots: list[int]) -> Problem:
    return replace(
        p,
        topk_ids=p.topk_ids[:, slots].contiguous(),
        topk_weights=p.topk_weights[:, slots].contiguous(),
    )


def experts(r: Reduction) -> None:
    """Only the experts that are used, then fewer: one's slots go to another."""
    r.take(_renumbered(r.problem))
    live = used_experts(r.problem).tolist()
    for source in live[1:]:
        for target in live:
            ids = r.problem.topk_ids
            if target != source and (ids == target).any() and (ids == source).any():
                candidate = replace(r.problem, topk_ids=torch.where(ids == source, target, ids))
                if r.take(_renumbered(candidate)) or r.take(candidate):
                    return experts(r)
    highest = max(live, default=0) + 1
    if highest < r.problem.num_experts:
        r.take(r.problem.at_experts(torch.arange(highest), r.problem.topk_ids))
    return None


def _renumbered(p: Problem) -> Problem:
    """Experts 0 .. n-1 are those that are used."""
    live = used_experts(p)
    if not len(live):
        return p
    place = torch.full((p.num_experts,), -1)
    place[live] = torch.arange(len(live))
    ids = torch.where(p.topk_ids >= 0, place[p.topk_ids.clamp_min(0)], -1)
    return p.at_experts(live, ids)


def intermediate(r: Reduction) -> None:
    """The fewest blocks of intermediate channels: rows of w13 in pairs, columns of w2."""
    size = layout_of(r.problem.weight_format).multiple

    def some(p: Problem, blocks: list[int]) -> Problem:
        halves = [*blocks, *(b + p.intermediate_size // size for b in blocks)]
        return replace(p, **_rows_of(p, "w13", halves, size), **_columns_of(p, "w2", blocks, size))

    r.keep(range(r.problem.intermediate_size // size), some, _at(r, "I", size))


def hidden(r: Reduction) -> None:
    """The fewest blocks of hidden channels: columns of w13, rows of w2."""
    size = layout_of(r.problem.weight_format).multiple

    def some(p: Problem, blocks: list[int]) -> Problem:
        states = _parts(p.hidden_states, -1, blocks, size)
        weights = _columns_of(p, "w13", blocks, size) | _rows_of(p, "w2", blocks, size)
        return replace(p, hidden_states=states, **weights)

    r.keep(range(r.problem.hidden_size // size), some, _at(r, "H", size))


def _rows_of(p: Problem, matrix: str, blocks: list[int], size: int) -> dict[str, Any]:
    """``matrix`` w13 or w2 and its scale factors with these blocks of ``size`` rows."""
    layout = layout_of(p.weight_format)
    codes, scale = getattr(p, f"{matrix}_weight"), getattr(p, f"{matrix}_weight_scale")
    return {
        f"{matrix}_weight": _parts(codes, 1, blocks, size),
        f"{matrix}_weight_scale": _parts(scale, 1, blocks, size // layout.scale_rows),
    }


def _columns_of(p: Problem, matrix: str, blocks: list[int], size: int) -> dict[str, Any]:
    """The same with these blocks of ``size`` columns."""
    layout = layout_of(p.weight_format)
    codes, scale = getattr(p, f"{matrix}_weight"), getattr(p, f"{matrix}_weight_scale")
    return {
        f"{matrix}_weight": _parts(codes, -1, blocks, size // layout.per_byte),
        f"{matrix}_weight_scale": _parts(scale, -1, blocks, size // layout.scale_columns),
    }


def _parts(tensor: torch.Tensor, axis: int, blocks: list[int], size: int) -> torch.Tensor:
    return torch.cat([tensor.narrow(axis, b * size, size) for b in blocks], axis).contiguous()


def _at(r: Reduction, letter: str, size: int) -> list[int]:
    """The block of ``size`` channels with the worst element, where those are of this letter."""
    worst = r.verdict.worst
    if worst is None or worst.channel is None or worst.stage not in TENSORS:
        return []
    if not TENSORS[worst.stage].shape[-1].startswith(letter):
        return []
    return [worst.channel // size]


# --- values -----------------------------------------------------------------------------------


def values(r: Reduction) -> None:
    """Plainer scalars, then as many zeros as it takes, then plainer numbers. Of a crash or a hang,
    which depends on values seldom, each tensor is tried as zeros once."""
    r.take(replace(r.problem, activation_clamp=None))
    r.take(replace(r.problem, topk_weights=torch.ones_like(r.problem.topk_weights)))
    if r.failure.is_crash or r.failure.is_hang:
        for name in ("hidden_states", "w2_weight", "w13_weight"):
            zeros = torch.zeros_like(getattr(r.problem, name))
            r.take(replace(r.problem, **dict[str, Any]({name: zeros})))
        return
    for name, axis, size in (
        ("hidden_states", 1, 32), ("w2_weight", 1, 8), ("w2_weight", 2, 16),
        ("w13_weight", 2, 16), ("w13_weight", 1, 8),
    ):  # fmt: skip
        tensor: torch.Tensor = getattr(r.problem, name)
        if not r.is_late():
            r.keep(range(tensor.shape[axis] // size), _zeroing(name, axis, size))
    ones = torch.ones_like(r.problem.hidden_states)
    there = r.problem.hidden_states != 0
    for plain in (torch.where(there, ones, 0.0), _power_of_two(r.problem.hidden_states)):
        if r.take(replace(r.problem, hidden_states=plain.to(torch.bfloat16))):
            break
    for name in ("w13_weight_scale", "w2_weight_scale"):
        scale = getattr(r.problem, name)
        level = scale.float().median().to(scale.dtype).expand_as(scale).contiguous()
        r.take(replace(r.problem, **dict[str, Any]({name: level})))


def _zeroing(name: str, axis: int, size: int) -> Callable[[Problem, list[int]], Problem]:
    """Only these parts of a tensor keep their values; the rest is zero."""

    def some(p: Problem, parts: list[int]) -> Problem:
        tensor: torch.Tensor = getattr(p, name)
        result = torch.zeros_like(tensor)
        for part in parts:
            at = (slice(None),) * axis + (slice(part * size, (part + 1) * size),)
            result[at] = tensor[at]
        return replace(p, **dict[str, Any]({name: result}))

    return some


def _power_of_two(values: torch.Tensor) -> torch.Tensor:
    """bfloat16 without its fraction bits."""
    return (values.view(torch.int16) & -128).view(torch.bfloat16)
