"""``eager`` in FP8 blocks: E4M3 weights with an fp32 scale per 128 x 128, as on Hopper.

Accumulator class ``fp32-ordered``: the products of a run, the stretch of K with one scale on each
side, are summed exactly in float64 (two E4M3 values have 8 significant bits, 128 products 43) and
rounded to fp32 once. The run is then added by one fma with the product of the two scales.

Differences from the MXFP4 form: scales are fp32 numbers and come after the sum; gate and up stay
fp32; the clamp's bound is not rounded to bfloat16; activations have one scale per 64.
"""

from __future__ import annotations

import torch

from megamoe.backends.eager_combine import combine, fma
from megamoe.layer.staging import RECIP_448, e4m3_codes, ue8m0_ceil
from megamoe.spec.clauses import Contract
from megamoe.spec.dialects import Dialect, dialect_of
from megamoe.spec.features import Activation
from megamoe.spec.formats import BLOCK
from megamoe.spec.problem import Problem

_SMALLEST_NORMAL = 2.0**-126


def forward_fp8_block(problem: Problem, contract: Contract) -> torch.Tensor:
    """``y`` (T, H) bfloat16. ``ValueError`` for a call that the contract does not know."""
    contract = dialect_of(problem, contract)
    ids, device = problem.topk_ids, problem.hidden_states.device
    codes, scale = stage(problem.hidden_states, contract)
    slots = torch.zeros(*ids.shape, problem.hidden_size, dtype=torch.bfloat16, device=device)
    live = (ids >= 0) & (ids < problem.num_experts)
    for expert in ids[live].unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate_up = linear(
            codes[token], scale[token], problem.w13_weight[expert],
            problem.w13_weight_scale[expert],
        )  # fmt: skip
        routing = problem.topk_weights[token, slot].unsqueeze(-1)
        acts = activate(gate_up, routing, problem.act, contract)
        operand = requantise(acts, contract)
        down = linear(*operand, problem.w2_weight[expert], problem.w2_weight_scale[expert])
        slots[token, slot] = down.to(torch.bfloat16)
    return combine(slots, live, problem.topk_weights, contract)


def stage(hidden: torch.Tensor, contract: Dialect) -> tuple[torch.Tensor, torch.Tensor]:
    """``(T, H)`` bfloat16 to E4M3 bytes (T, H) and float32 scales (T, H/128)."""
    groups = hidden.float().unflatten(-1, (-1, contract.activation_group.value))
    floor = _fp32(contract.staging_amax_floor.value, groups)
    # A tensor: on CUDA torch divides by a Python number as a product with its reciprocal.
    scale = torch.maximum(_amax(groups), floor) / torch.full_like(floor, 448.0)
    quotient = contract.activation_scale.value == "quotient"
    codes = e4m3_codes(groups / scale if quotient else groups * (1.0 / scale), contract)
    return codes.flatten(-2), scale.squeeze(-1)


def requantise(acts: torch.Tensor, contract: Dialect) -> tuple[torch.Tensor, torch.Tensor]:
    """``(R, I)`` float32 to E4M3 bytes (R, I) and float32 scales (R, I/64)."""
    groups = acts.unflatten(-1, (-1, contract.requant_group.value))
    amax = torch.maximum(_amax(groups), _fp32(contract.requant_amax_floor.value, acts))
    scale = amax * RECIP_448.to(acts.device)
    if contract.requant_scale.value == "continuous":
        factor = 1.0 / scale
    else:
        byte = ue8m0_ceil(scale)
        scale, factor = _power(byte), _power(254 - byte)
    codes = e4m3_codes(groups * factor, contract)
    return codes.flatten(-2), scale.squeeze(-1)


def activate(
    gate_up: torch.Tensor, routing: torch.Tensor, act: Activation, contract: Dialect
) -> torch.Tensor:
    """``(silu(gate) * up) * routing`` in fp32: (R, 2I) and (R, 1) to (R, I)."""
    if contract.gate_up.value == "bf16":
        gate_up = gate_up.to(torch.bfloat16).float()
    gate, up = gate_up.chunk(2, dim=-1)
    if contract.gate_up_order.value == "up-gate":
        gate, up = up, gate
    if act.clamp is not None:
        bound = _fp32(act.clamp, gate)
        lower = -bound if contract.gate_clamped_below.value else _fp32(-torch.inf, gate)
        of_nan = bound if contract.clamp_nan.value == "upper" else -bound
        gate, up = _clamped(gate, lower, bound, bound), _clamped(up, -bound, bound, of_nan)
    denominator = 1.0 + (-gate).double().exp().float()
    sigmoid = 1.0 / denominator
    if act.fast_math:  # rcp.approx.ftz
        sigmoid = torch.where(sigmoid < _SMALLEST_NORMAL, 0.0, sigmoid)
    gated = gate / denominator if contract.precise_silu.value == "g/d" else gate * sigmoid
    value = gated * up
    if contract.routing_weight.value == "activation":
        value = value * routing
    return value.to(torch.bfloat16).float() if contract.bf16_before_requant.value else value


def linear(
    codes: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """``(R, K)`` E4M3 bytes, (R, K/run) float32, ``(N, K)`` bytes, (N/128, K/128) float32 to (R, N)
    float32."""
    run = codes.shape[1] // scale.shape[1]
    x, w = (t.view(torch.float8_e4m3fn).double() for t in (codes, weight.contiguous()))
    acc = torch.zeros(len(codes), len(weight), dtype=torch.float32, device=codes.device)
    for at in range(scale.shape[1]):
        here = slice(at * run, (at + 1) * run)
        total = (x[:, here] @ w[:, here].T).float()
        of_block = weight_scale[:, at * run // BLOCK].repeat_interleave(BLOCK)
        acc = fma(scale[:, at, None] * of_block, total, acc)
    return acc


def _clamped(
    value: torch.Tensor, low: torch.Tensor, high: torch.Tensor, of_nan: torch.Tensor
) -> torch.Tensor:
    """Both bounds, and the number that NaN becomes."""
    return torch.where(value.isnan(), of_nan, value.clamp(low, high))


def _amax(groups: torch.Tensor) -> torch.Tensor:
    """``(..., n)`` to (..., 1): the largest magnitude; NaN does not count."""
    size = groups.abs()
    return torch.where(size.isnan(), 0.0, size).amax(-1, keepdim=True)


def _power(byte: torch.Tensor) -> torch.Tensor:
    """The float32 with these exponent bits: byte 0 is zero."""
    return (byte << 23).view(torch.float32)


def _fp32(value: float, like: torch.Tensor) -> torch.Tensor:
    """A Python number would enter in double precision."""
    return torch.tensor(value, dtype=torch.float32, device=like.device)


__all__ = ["activate", "forward_fp8_block", "linear", "requantise", "stage"]
