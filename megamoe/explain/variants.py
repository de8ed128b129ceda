"""Other layers that a wrong ``y`` could be of, for formats of which ``y`` alone is judged.

A *variant* changes one clause of the contract, or one thing in the operands of one token. The
oracle computes the envelope of each, so a variant fits if a correct kernel of the accumulator class
could return the token's whole row under it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Final

import torch

from megamoe.spec.contract import Contract
from megamoe.spec.problem import Problem
from megamoe.spec.weights import Layout, layout_of

VALUES: Final[dict[str, tuple[Any, ...]]] = {
    "staging_amax_floor": (0.0, 1e-10, 1e-4),
    "activation_scale": ("reciprocal", "quotient"),
    "activation_group": (32, 64, 128),
    "token_scale_floor": (0.0, 1e-30, 1e-10),
    "token_codes": ("reciprocal", "quotient"),
    "gate_up": ("fp32", "bf16"),
    "gate_up_order": ("gate-up", "up-gate"),
    "gate_clamped_below": (False, True),
    "clamp_nan": ("upper", "first"),
    "silu_type": ("fp32", "bf16"),
    "routing_type": ("fp32", "bf16"),
    "bf16_before_requant": (False, True),
    "requant_group": (32, 64, 128),
    "requant_scale": ("continuous", "product"),
    "requant_amax_floor": (0.0, 1e-10, 1e-4),
    "combine_order": ("ascending-slot", "descending-slot"),
}
"""Values of clauses that a kernel may have by mistake."""
ROUTING: Final = {
    "fp8-block": ("activation", "combine"), "w4a16": ("row", "accumulator"),
    "w4a8-token": ("row", "accumulator"),
}  # fmt: skip
"""Places of the routing weight for which the oracle has a rule, by format."""
MOST_EXPERTS: Final = 8
"""Other experts that are tried for a slot."""


@dataclass(frozen=True)
class Variant:
    """A layer, or operands of one token, other than the right ones."""

    what: str
    problem: Problem
    """One token; of the experts only those that the variant needs."""
    contract: Contract


def variants(problem: Problem, token: int, contract: Contract) -> Iterator[Variant]:
    """The right layer first, then each variant of row ``token``; the likelier ones stand first."""
    one = _alone(problem.at_rows(torch.tensor([token])))
    yield Variant("", one, contract)
    values = {**VALUES, "routing_weight": ROUTING.get(problem.weight_format, ())}
    for name, clause in contract.clauses.items():
        for value in values.get(name, ()):
            if value != clause.value:
                other = contract.variant("variant", "a variant", **{name: value})
                what = f"clause {name} is {value} in place of {clause.value}"
                yield Variant(what, one, other)
    operands = (
        _of_slots(problem, token), _of_scalars(one), _of_weights(one), _of_tokens(problem, token),
    )  # fmt: skip
    for what, layer in chain.from_iterable(operands):
        yield Variant(what, layer, contract)


Problems = Iterator[tuple[str, Problem]]


def _alone(p: Problem) -> Problem:
    """The problem with the weights of its own experts alone."""
    ids = p.topk_ids
    live = (ids >= 0) & (ids < p.num_experts)
    used_experts = ids[live].unique()
    if not len(used_experts):
        return p
    place = torch.searchsorted(used_experts, ids.clamp(0, p.num_experts - 1))
    return p.at_experts(used_experts, torch.where(live, place, -1))


def _of_slots(problem: Problem, token: int) -> Problems:
    """A slot that is lost, or that another expert computes."""
    row = problem.at_rows(torch.tensor([token]))
    ids = row.topk_ids
    live_ids = problem.topk_ids[(problem.topk_ids >= 0) & (problem.topk_ids < problem.num_experts)]
    for k in range(problem.top_k):
        own = int(ids[0, k])
        if not 0 <= own < problem.num_experts:
            continue
        yield (
            f"slot {k} (expert {own}) is lost",
            _alone(replace(row, topk_ids=_with_id(ids, k, -1))),
        )
    for k in range(problem.top_k):
        own = int(ids[0, k])
        for other in live_ids.unique().tolist()[:MOST_EXPERTS]:
            if own != other and 0 <= own < problem.num_experts:
                what = f"slot {k} is computed by expert {other} and not by {own}"
                yield what, _alone(replace(row, topk_ids=_with_id(ids, k, other)))


def _with_id(ids: torch.Tensor, k: int, value: int) -> torch.Tensor:
    out = ids.clone()
    out[0, k] = value
    return out


def _of_scalars(one: Problem) -> Problems:
    """Routing weights, and the scalars of the call."""
    w = one.topk_weights
    yield "every routing weight is 1", replace(one, topk_weights=torch.ones_like(w))
    if one.top_k > 1:
        what = "each slot has the routing weight of the next one"
        yield what, replace(one, topk_weights=w.roll(-1, 1).contiguous())
    if one.activation_clamp is not None:
        yield "nothing is clamped", replace(one, activation_clamp=None)
    if one.l2_activation_scale is not None:
        yield "the scale of linear 2's activations is 1", replace(one, l2_activation_scale=1.0)
    for name, factor in one.expert_factors.items():
        yield f"{name} is 1", _with(one, name, torch.ones_like(factor))
        if len(factor) > 1:
            yield f"{name} is that of the expert beside", _with(one, name, factor.roll(1))


def _of_weights(one: Problem) -> Problems:
    """Weights and scale factors that are read at a wrong place."""
    layout = layout_of(one.weight_format)
    for matrix in ("w13", "w2"):
        name = f"{matrix}_weight_scale"
        scale: torch.Tensor = getattr(one, name)
        for axis, where in ((2, "along K"), (1, "along the rows")):
            if scale.shape[axis] > 1:
                for by, side in ((1, "before"), (-1, "after")):
                    what = f"a scale factor of {matrix} is the one {side} it {where}"
                    yield what, _with(one, name, scale.roll(by, axis).contiguous())
        if matrix == "w13":
            half = scale.shape[1] // 2
            what = "the scale factors of gate and up are exchanged"
            yield what, _with(one, name, scale.roll(half, 1).contiguous())
        codes: torch.Tensor = getattr(one, f"{matrix}_weight")
        if layout.per_byte == 2:
            swap = (codes << 4) | (codes >> 4)
            yield (
                f"the two codes of a byte of {matrix} are exchanged",
                _with(one, f"{matrix}_weight", swap),
            )
        yield from _without_end(one, matrix, codes, layout)


def _without_end(one: Problem, matrix: str, codes: torch.Tensor, layout: Layout) -> Problems:
    """The end of K is left out of a product."""
    linear = {"w13": "linear 1", "w2": "linear 2"}[matrix]
    whole = codes.shape[2] * layout.per_byte
    for size in (32, 64, 128):
        if size < whole:
            short = codes.clone()
            short[..., -size // layout.per_byte :] = 0
            yield f"{linear} leaves out the last {size} of K", _with(one, f"{matrix}_weight", short)


def _of_tokens(problem: Problem, token: int) -> Problems:
    """Inputs of the tokens beside."""
    for other in (token - 1, token + 1):
        if 0 <= other < problem.num_tokens:
            both = problem.at_rows(torch.tensor([token, other]))
            for name in ("hidden_states", "topk_weights", "topk_ids"):
                tensor: torch.Tensor = getattr(both, name)
                swap = replace(both, **dict[str, Any]({name: tensor.flip(0).contiguous()}))
                what = f"{_NOUNS[name]} are those of token {other}"
                yield what, _alone(swap.at_rows(torch.tensor([0])))


_NOUNS: Final = {
    "hidden_states": "the hidden states", "topk_weights": "the routing weights",
    "topk_ids": "the experts",
}  # fmt: skip


def _with(p: Problem, name: str, value: torch.Tensor) -> Problem:
    return replace(p, **dict[str, Any]({name: value}))


__all__ = ["Variant", "variants"]
