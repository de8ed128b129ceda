"""``eager`` with MXFP4 weights beside bfloat16: no step quantises hidden states or activations.

Accumulator class ``fp32-ordered``: float64 sums the 32 products of a block and adds them to the
fp32 sum, which rounds once a block. A product has 10 significant bits, so float64 sums a block
without an error as long as its products lie within 38 octaves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megamoe.backends.eager_combine import combine
from megamoe.spec.clauses import Contract
from megamoe.spec.dialects import Dialect, dialect_of
from megamoe.spec.features import Activation
from megamoe.spec.formats import E2M1_TABLE, GROUP
from megamoe.spec.problem import Problem

_SMALLEST_NORMAL = 2.0**-126


Product = Callable[[torch.Tensor, torch.Tensor, Dialect], torch.Tensor]
"""(R, K) bfloat16 and (N, K) float64 to (R, N) float32."""


def forward_w4a16(problem: Problem, contract: Contract) -> torch.Tensor:
    """``y`` (T, H) bfloat16. ``ValueError`` for a call that the contract does not know."""
    return forward_rows(problem, contract, lambda rows, weights, _: linear(rows, weights))


def forward_rows(problem: Problem, contract: Contract, product: Product) -> torch.Tensor:
    """The same with another ``product`` for both linears."""
    contract = dialect_of(problem, contract)
    ids, device = problem.topk_ids, problem.hidden_states.device
    weights = problem.topk_weights
    if contract.routing_type.value == "bf16":
        weights = weights.to(torch.bfloat16).float()
    slots = torch.zeros(*ids.shape, problem.hidden_size, dtype=torch.bfloat16, device=device)
    live = (ids >= 0) & (ids < problem.num_experts)
    for expert in ids[live].unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        w13 = decoded(problem.w13_weight[expert], problem.w13_weight_scale[expert])
        w2 = decoded(problem.w2_weight[expert], problem.w2_weight_scale[expert])
        gate_up = product(problem.hidden_states[token], w13, contract)
        down = product(activate(gate_up, problem.act, contract), w2, contract)
        if contract.routing_weight.value == "accumulator":
            down = down * weights[token, slot].unsqueeze(-1)
        slots[token, slot] = down.to(torch.bfloat16)
    return combine(slots, live, weights, contract)


def decoded(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``(N, K/2)`` bytes of two E2M1 numbers, (N, K/32) UE8M0 bytes to (N, K) float64, exact."""
    table = torch.from_numpy(E2M1_TABLE.copy()).double().to(packed.device)
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).int()
    powers = ((scale.long() + (1023 - 127)) << 52).view(torch.float64)
    return (table[codes].unflatten(-1, (-1, GROUP)) * powers.unsqueeze(-1)).flatten(-2)


def linear(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``(R, K)`` bfloat16 or E4M3 times (N, K) float64 to (R, N) float32."""
    x = rows.double()
    acc = torch.zeros(len(x), len(weights), dtype=torch.float32, device=x.device)
    for at in range(0, x.shape[1], GROUP):
        block = x[:, at : at + GROUP] @ weights[:, at : at + GROUP].T
        acc = (acc.double() + block).float()
    return acc


def activate(gate_up: torch.Tensor, act: Activation, contract: Dialect) -> torch.Tensor:
    """``silu(gate) * up`` in fp32, rounded once: (R, 2I) float32 to (R, I) bfloat16."""
    if contract.gate_up.value == "bf16":
        gate_up = gate_up.to(torch.bfloat16).float()
    gate, up = gate_up.chunk(2, dim=-1)
    if contract.gate_up_order.value == "up-gate":
        gate, up = up, gate
    if act.clamp is not None:
        bound = torch.tensor(act.clamp, dtype=torch.float32, device=gate.device)
        lower = -bound if contract.gate_clamped_below.value else torch.full_like(bound, -torch.inf)
        of_nan = bound if contract.clamp_nan.value == "upper" else -bound
        gate, up = _clamped(gate, lower, bound, bound), _clamped(up, -bound, bound, of_nan)
    denominator = 1.0 + (-gate).double().exp().float()
    sigmoid = 1.0 / denominator
    if act.fast_math:  # rcp.approx.ftz
        sigmoid = torch.where(sigmoid < _SMALLEST_NORMAL, 0.0, sigmoid)
    gated = gate / denominator if contract.precise_silu.value == "g/d" else gate * sigmoid
    if contract.silu_type.value == "bf16":
        gated = gated.to(torch.bfloat16).float()
    return (gated * up).to(torch.bfloat16)


def _clamped(
    value: torch.Tensor, low: torch.Tensor, high: torch.Tensor, of_nan: torch.Tensor
) -> torch.Tensor:
    """Both bounds, and the number that NaN becomes."""
    return torch.where(value.isnan(), of_nan, value.clamp(low, high))


__all__ = ["activate", "decoded", "forward_rows", "forward_w4a16", "linear"]
