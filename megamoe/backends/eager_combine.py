"""The combine of ``eager``: slot rows to one row a token, in fp32, slot by slot, from +0."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from megamoe.layer.staging import RECIP_448, e4m3_codes, group_amax, ue8m0_ceil
from megamoe.spec.contract import Contract
from megamoe.spec.formats import FP8_COMBINE_GROUP

_ELEMENTS_AT_ONCE: Final = 1 << 20
"""Of a summand: so that what a step of the sum takes stays in the cache."""


def combine(
    slots: torch.Tensor, live: torch.Tensor, weights: torch.Tensor, contract: Contract,
    *, shared: torch.Tensor | None = None, dtype: str = "bf16",
    output: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """``(T, K, H)`` bfloat16 slot rows, (T, K) bool and float32 weights to (T, H) bfloat16.

    By a fused multiply-add where the contract applies the weight here. ``shared`` (T, H) bfloat16
    is the row of a fused shared expert, of weight 1; ``output`` (T, H) bfloat16 is added to the
    result. ``dtype`` 'fp8' quantises the rows first.
    """
    tokens, top_k, hidden = slots.shape
    y = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=slots.device)
    order = list(range(top_k))
    if contract.combine_order.value != "ascending-slot":
        order.reverse()
    step = max(1, _ELEMENTS_AT_ONCE // hidden)
    for first in range(0, tokens, step):
        here = slice(first, first + step)
        rows = [_Row(slots[here, k], weights[here, k] if weights is not None else None,
                     live[here, k]) for k in order]  # fmt: skip
        if shared is not None:
            one = torch.ones(len(shared[here]), dtype=torch.float32, device=shared.device)
            at = 0 if contract.shared_expert.value == "first" else top_k
            rows.insert(at, _Row(shared[here], one, one.bool()))
        y[here] = _sum(rows, contract, dtype).to(torch.bfloat16)
    return y if output is None else y + output


class _Row(NamedTuple):
    """One summand of some tokens."""

    values: torch.Tensor
    """(T, H) bfloat16."""
    weight: torch.Tensor | None
    """(T,) float32."""
    live: torch.Tensor
    """(T,) bool: the tokens that have this summand."""


def _sum(rows: list[_Row], contract: Contract, dtype: str) -> torch.Tensor:
    """(T, H) float32: the summands in their order."""
    weighted = contract.routing_weight.value == "combine"
    acc = torch.zeros_like(rows[0].values, dtype=torch.float32)
    for row in rows:
        at = row.live.nonzero().squeeze(-1)
        before, values = acc[at], row.values[at]
        if dtype == "fp8":
            acc[at] = fma(*_fp8(values, contract), before)
        elif weighted:
            assert row.weight is not None
            acc[at] = fma(values.float(), row.weight[at].unsqueeze(-1), before)
        else:
            acc[at] = before + values.float()
    return acc


def _fp8(row: torch.Tensor, contract: Contract) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 values of a row (T, H) and the scale of each, both float32."""
    groups = row.float().unflatten(-1, (-1, FP8_COMBINE_GROUP))
    byte = ue8m0_ceil(group_amax(groups, contract) * RECIP_448.to(row.device)).unsqueeze(-1)
    # 2**(127 - e) by its bits, as the kernel has it: -inf for an infinite amax.
    factor = torch.where(byte == 255, -torch.inf, torch.exp2(127.0 - byte.double()))
    codes = e4m3_codes((groups.double() * factor).float(), contract)
    values = codes.view(torch.float8_e4m3fn).float()
    scale = torch.where(byte == 255, torch.inf, torch.exp2(byte.double() - 127.0)).float()
    scale = torch.where(byte == 0, 0.0, scale).expand_as(values)
    return values.flatten(-2), scale.flatten(-2)


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """``a * b + c`` of float32 tensors, rounded once.

    The product is exact in float64. Their sum may not be: then its last bit is set, as rounding to
    odd does, and rounding that to fp32 is one rounding.
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(torch.int64)
    inexact = (error != 0) & total.isfinite()
    beyond = inexact & ((error > 0) != (total > 0))  # rounded away from zero: one step back
    return ((bits - beyond.long()) | inexact.long()).view(torch.float64).float()


__all__ = ["combine", "fma"]
