"""The combine of ``eager``: slot rows to one row a token, in fp32, slot by slot, from +0."""

from __future__ import annotations

from typing import Final

import torch

from megamoe.layer.staging import RECIP_448, e4m3_codes, group_amax, ue8m0_ceil
from megamoe.spec.contract import Contract
from megamoe.spec.formats import FP8_COMBINE_GROUP

_ELEMENTS_AT_ONCE: Final = 1 << 20
"""Elements of a summand that are added together: few enough for the cache."""


def combine(
    slots: torch.Tensor, live: torch.Tensor, weights: torch.Tensor | None, contract: Contract,
    *, shared: torch.Tensor | None = None, dtype: str = "bf16",
    output: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """``(T, K, H)`` bfloat16 slot rows, (T, K) bool and float32 weights to (T, H) bfloat16.

    By a fused multiply-add where the contract applies the weight here. ``shared`` (T, H) bfloat16
    is the row of a fused shared expert, of weight 1; ``output`` (T, H) bfloat16 is added to the
    result. ``dtype`` 'fp8' quantises the rows first.
    """
    # A GPU has no such cache to spare, and each part costs it a few launches a slot.
    step = max(1, len(slots) if slots.is_cuda else _ELEMENTS_AT_ONCE // slots.shape[2])
    parts = []
    for first in range(0, max(1, len(slots)), step):
        here = slice(first, first + step)
        beside = [t if t is None else t[here] for t in (weights, shared, output)]
        parts.append(_combine(slots[here], live[here], *beside, contract=contract, dtype=dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _combine(
    slots: torch.Tensor, live: torch.Tensor, weights: torch.Tensor | None,
    shared: torch.Tensor | None, output: torch.Tensor | None, *, contract: Contract, dtype: str,
) -> torch.Tensor:  # fmt: skip
    """As :func:`combine`, for a few rows."""
    order = list(range(slots.shape[1]))
    if contract.combine_order.value != "ascending-slot":
        order.reverse()
    rows = [(slots[:, k], weights[:, k, None] if weights is not None else None, live[:, k, None])
            for k in order]  # fmt: skip
    if shared is not None:
        one = torch.ones(len(shared), 1, dtype=torch.float32, device=shared.device)
        at = 0 if contract.shared_expert.value == "first" else len(rows)
        rows.insert(at, (shared, one, one.bool()))
    weighted = contract.routing_weight.value in ("combine", "row")
    acc = torch.zeros(slots.shape[0], slots.shape[2], dtype=torch.float32, device=slots.device)
    for row, weight, takes_part in rows:
        if not takes_part.is_cuda and not takes_part.any():  # on a GPU to ask is to wait
            continue
        if dtype == "fp8":
            total = fma(*_fp8(row, contract), acc)
        elif weighted:
            assert weight is not None
            total = fma(row.float(), weight, acc)
        else:
            total = acc + row  # as fp32: torch widens the bf16 row, which is exact
        acc = torch.where(takes_part, total, acc)
    y = acc.to(torch.bfloat16)
    return y if output is None else y + output


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
