"""Laws of the layer: changes of a problem that must not change a bit of the output.

Each token's output depends on that token alone and the K order of every dot product is fixed
(``docs/numerics.md``); every law follows. A law compares a backend with itself, so it needs no
golden and holds for every accumulator class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy.typing as npt
import torch

from megamoe.judge import CALLS, IN_LAW, Finding, bitwise, place_of
from megamoe.printable import quantity
from megamoe.spec.forms import BF16
from megamoe.spec.problem import Problem
from megamoe.worker.outcomes import BackendFailure

Forward = Callable[[Problem], npt.NDArray[Any]]
"""A backend's ``y`` of a problem: (T, H) bits of bfloat16, uint16, in memory of their own."""

PIECE: Final = 16
"""Tokens of a small batch. Each token is tried in one: another order shows in few outputs only."""
MANY_REPLICAS: Final = 16
"""Replicas of each expert: enough to reach a kernel's own path for few rows an expert."""
MANY_PADDING: Final = 200
"""Padding rows: enough to reach a kernel's own path for many rows an expert."""


@dataclass(frozen=True)
class Variant:
    """A changed problem, and where the rows of the original are found in its output."""

    label: str
    problem: Problem
    rows: list[int]
    """Row of the variant for each of ``of``."""
    of: list[int]
    """Rows of the original."""
    before: Problem | None = None
    """Run first, for its side effects; its output is not looked at."""


def findings(y_of: Forward, problem: Problem, law: str) -> list[Finding]:
    """Run ``problem`` and every variant of the law; one finding each, in the order of variants."""
    ids = problem.topk_ids.numpy()
    base = y_of(problem)
    out = []
    for variant in variants(problem, law):
        with in_law(law, variant.label):
            if variant.before is not None:
                y_of(variant.before)
            actual = y_of(variant.problem)
        place = place_of("y", variant.of, ids[variant.of])
        finding = bitwise("y", BF16, actual[variant.rows], base[variant.of], place)
        out.append(relabel(law, variant.label, finding))
    return out


def relabel(law: str, label: str, finding: Finding) -> Finding:
    """A bad finding, with the law and the variant for words."""
    if not finding.bad:
        return finding
    text = f"{law}: {label} changes {finding.outside} of {finding.total} outputs"
    return replace(finding, text=text, sides=CALLS)


@contextmanager
def in_law(law: str, label: str = "") -> Iterator[None]:
    """An exception of the backend says that a variant of the law raised it: an ordinary forward
    did not."""
    try:
        yield
    except BackendFailure as raised:
        variant = f": {label}" if label else ""
        raise BackendFailure(f"{raised}{IN_LAW}{law}{variant}") from raised


def variants(problem: Problem, law: str) -> Iterator[Variant]:
    """The variants of a law. ``ValueError`` for an unknown one."""
    if law not in LAWS:
        raise ValueError(f"unknown law {law!r}; known: {', '.join(LAWS)}")
    yield from LAWS[law](problem)


def _take(problem: Problem, rows: list[int]) -> Problem:
    index = torch.tensor(rows, dtype=torch.long, device=problem.topk_ids.device)
    capacity = max(problem.max_num_tokens, len(rows))
    return replace(problem.at_rows(index), max_num_tokens=capacity)


def _all(problem: Problem) -> list[int]:
    return list(range(problem.num_tokens))


def _repeat(problem: Problem) -> Iterator[Variant]:
    for turn in ("second", "third"):
        yield Variant(f"a {turn} run", problem, _all(problem), _all(problem))


MANY_CALLS: Final = 155
"""A row that is wrong in 3 % of calls, each time by itself, is missed with 0.97 ** 155 < 0.9 %."""


def _many_calls(problem: Problem) -> Iterator[Variant]:
    for turn in range(1, MANY_CALLS):
        yield Variant(f"call {turn + 1} of {MANY_CALLS}", problem, _all(problem), _all(problem))


def _other_weights(problem: Problem) -> Iterator[Variant]:
    """Layers of one shape: data that a kernel keeps of one layer's weights must not serve another
    layer.

    The second layer has the experts in another order under other ids, so it must have the same
    bits; then the first layer runs again.
    """
    count = problem.num_experts
    rows, ids = _all(problem), problem.topk_ids
    order = torch.arange(count, device=ids.device).flip(0)
    new_ids = torch.where(ids >= 0, count - 1 - ids, ids)
    other = problem.at_experts(order, new_ids)
    for turn in ("second", "fourth"):
        yield Variant(f"other weights of the same shape, in the {turn} call", other, rows, rows)
        yield Variant("the first weights again", problem, rows, rows)


def _batch_invariance(problem: Problem) -> Iterator[Variant]:
    rows = _all(problem)
    for row in rows[:: max(1, len(rows) // 4)]:
        yield Variant(f"token {row} alone", _take(problem, [row]), [0], [row])
    if len(rows) > PIECE:
        for start in range(0, len(rows), PIECE):
            piece = rows[start : start + PIECE]
            label = f"a batch of tokens {piece[0]} to {piece[-1]}"
            yield Variant(label, _take(problem, piece), list(range(len(piece))), piece)
    half = rows[: (len(rows) + 1) // 2]
    yield Variant("the first half of the batch", _take(problem, half), half, half)
    label = f"the batch appended to itself ({quantity(2 * len(rows), 'token')})"
    yield Variant(label, _take(problem, rows + rows), [r + len(rows) for r in rows], rows)


def _token_permutation(problem: Problem) -> Iterator[Variant]:
    rows = _all(problem)
    rotation = rows[len(rows) // 3 :] + rows[: len(rows) // 3]
    for label, order in (("reversing the tokens", rows[::-1]), ("rotating the tokens", rotation)):
        yield Variant(label, _take(problem, order), [order.index(r) for r in rows], rows)


def _replica_choice(problem: Problem) -> Iterator[Variant]:
    count = problem.num_experts
    ids = problem.topk_ids
    row = torch.arange(problem.num_tokens, device=ids.device).unsqueeze(-1)
    turn = row + torch.arange(problem.top_k, device=ids.device)
    for label, replicas, choice in (
        ("the second replica for every slot", 2, torch.ones_like(ids)),
        ("alternating replicas", 2, turn % 2),
        (f"{MANY_REPLICAS} replicas in turn", MANY_REPLICAS, turn % MANY_REPLICAS),
    ):
        order = torch.arange(count, device=ids.device).repeat(replicas)
        new_ids = torch.where(ids >= 0, ids + choice * count, ids)
        yield Variant(label, problem.at_experts(order, new_ids), _all(problem), _all(problem))


def _ep_size(problem: Problem) -> Iterator[Variant]:
    """Other numbers of ranks: each expert has another local index and other neighbours."""
    count = problem.num_experts
    device = problem.topk_ids.device
    ids = problem.topk_ids
    rotation = torch.arange(count, device=device).roll(1)
    new_ids = torch.where(ids >= 0, (ids + 1) % count, ids)
    yield Variant(
        "numbering the experts from another one", problem.at_experts(rotation, new_ids),
        _all(problem), _all(problem),
    )  # fmt: skip
    experts = ids[ids >= 0].unique()
    if 0 < len(experts) < count:
        dense = torch.where(ids >= 0, torch.searchsorted(experts, ids.clamp_min(0)), ids)
        yield Variant(
            "only the experts that are used", problem.at_experts(experts, dense.contiguous()),
            _all(problem), _all(problem),
        )  # fmt: skip


def _capacity(problem: Problem) -> Iterator[Variant]:
    for more in (384, 384 * 21):
        larger = replace(problem, max_num_tokens=problem.max_num_tokens + more)
        yield Variant(f"{more} more rows of capacity", larger, _all(problem), _all(problem))


def _stale_buffer(problem: Problem) -> Iterator[Variant]:
    garbage = replace(
        problem,
        hidden_states=torch.full_like(problem.hidden_states, float("nan")),
        topk_weights=torch.full_like(problem.topk_weights, float("nan")),
    )
    large = replace(problem, hidden_states=torch.full_like(problem.hidden_states, -(2.0**100)))
    for label, before in (("NaN", garbage), ("large numbers", large)):
        yield Variant(
            f"an earlier call with {label}", problem, _all(problem), _all(problem), before
        )


def _padding_rows(problem: Problem) -> Iterator[Variant]:
    rows = _all(problem)
    for count in (1, 7, MANY_PADDING):

        def padded(tensor: torch.Tensor, value: float, count: int = count) -> torch.Tensor:
            rest = torch.full((count, tensor.shape[1]), value, dtype=tensor.dtype)
            return torch.cat([tensor, rest.to(tensor.device)])

        apart = problem.shared_output
        variant = replace(
            problem,
            shared_output=None if apart is None else padded(apart, 0.0),
            hidden_states=padded(problem.hidden_states, float("nan")),
            topk_ids=padded(problem.topk_ids, -1),
            topk_weights=padded(problem.topk_weights, float("nan")),
            max_num_tokens=max(problem.max_num_tokens, problem.num_tokens + count),
        )
        yield Variant(f"{quantity(count, 'padding row')} of NaN", variant, rows, rows)


def _masked_slots(problem: Problem) -> Iterator[Variant]:
    ids, weights = problem.topk_ids, problem.topk_weights
    dead = torch.where(ids < 0, torch.full_like(weights, float("nan")), weights)
    rows = _all(problem)
    yield Variant("NaN weights in masked slots", replace(problem, topk_weights=dead), rows, rows)
    for at in (0, problem.top_k):
        extra_ids = torch.cat([ids[:, :at], torch.full_like(ids[:, :1], -1), ids[:, at:]], 1)
        extra = torch.cat([weights[:, :at], torch.ones_like(weights[:, :1]), weights[:, at:]], 1)
        variant = replace(problem, topk_ids=extra_ids, topk_weights=extra)
        yield Variant(f"a masked slot put in at {at}", variant, rows, rows)


LAWS: dict[str, Callable[[Problem], Iterator[Variant]]] = {
    "repeat": _repeat,
    "many-calls": _many_calls,
    "other-weights": _other_weights,
    "batch-invariance": _batch_invariance,
    "token-permutation": _token_permutation,
    "replica-choice": _replica_choice,
    "ep-size": _ep_size,
    "capacity": _capacity,
    "stale-buffer": _stale_buffer,
    "padding-rows": _padding_rows,
    "masked-slots": _masked_slots,
}

__all__ = ["LAWS", "Forward", "Variant", "findings", "in_law", "relabel", "variants"]
