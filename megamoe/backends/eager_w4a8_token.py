"""``eager`` with MXFP4 weights and E4M3 rows that have one fp32 scale each.

:mod:`megamoe.backends.eager_w4a16` with a quantisation before each linear and a product with the
row's scale after it. A block of 32 products of E4M3 and E2M1 numbers is exact in float64.
"""

from __future__ import annotations

import torch

from megamoe.backends.eager_w4a16 import forward_rows, linear
from megamoe.layer.staging import e4m3_codes
from megamoe.spec.clauses import Contract
from megamoe.spec.dialects import Dialect
from megamoe.spec.problem import Problem


def forward_w4a8_token(problem: Problem, contract: Contract) -> torch.Tensor:
    """``y`` (T, H) bfloat16. ``ValueError`` for a call that the contract does not know."""
    return forward_rows(problem, contract, product)


def product(rows: torch.Tensor, weights: torch.Tensor, contract: Dialect) -> torch.Tensor:
    """``(R, K)`` bfloat16 times (N, K) float64 to (R, N) float32."""
    codes, scale = quantise(rows, contract)
    return linear(codes.view(torch.float8_e4m3fn), weights) * scale


def quantise(rows: torch.Tensor, contract: Dialect) -> tuple[torch.Tensor, torch.Tensor]:
    """``(R, K)`` bfloat16 to E4M3 bytes (R, K) and float32 scales (R, 1)."""
    values = rows.float()
    floor = torch.tensor(contract.token_scale_floor.value, device=rows.device)
    amax = values.abs().nan_to_num(0.0, torch.inf).amax(-1, keepdim=True)
    # A tensor: on CUDA torch divides by a Python number as a product with its reciprocal.
    scale = torch.maximum(amax / torch.full_like(floor, 448.0), floor)
    quotient = contract.token_codes.value == "quotient"
    return e4m3_codes(values / scale if quotient else values * (1.0 / scale), contract), scale


__all__ = ["forward_w4a8_token", "product", "quantise"]
