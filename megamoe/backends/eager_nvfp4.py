"""``eager`` with NVFP4 weights: E2M1 codes with an E4M3 scale per 16, on both sides of a product.

Accumulator class ``fp32-ordered``, in ascending blocks of 16 with one fp32 addition each. A block
is exact: 16 products of two E2M1 numbers are multiples of 1/4 up to 576, and times two scales of
four significant bits they have 20 bits at most.

Further differences from the FP8 form: staging has one fp32 scale a token and divides twice; the
accumulators are scaled before they are rounded to bfloat16; requantisation has one scale for the
layer and multiplies by a reciprocal; the routing weight comes in the combine.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megamoe.backends.eager_activation import activate
from megamoe.backends.eager_combine import combine
from megamoe.spec.contract import Clause, Contract
from megamoe.spec.features import nvfp4_fault
from megamoe.spec.formats import NVFP4_GROUP
from megamoe.spec.problem import Problem

_LEAST, _MOST = 2.0**-9, 448.0
_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NAN_BECOMES = 6.0


def forward_nvfp4(problem: Problem, contract: Contract) -> torch.Tensor:
    """``y`` (T, H) bfloat16. ``ValueError`` for a call of another format."""
    scale = problem.l2_activation_scale
    fault = nvfp4_fault(
        problem.features, problem.hidden_size, problem.intermediate_size, scale
    )  # fmt: skip
    if fault:
        raise ValueError(fault)
    where = "vLLM 0.33, sm100_nvfp4_mega_moe.cuh"
    contract = replace(
        contract, routing_weight=Clause("combine", where), bf16_before_requant=Clause(False, where)
    )
    ids, device = problem.topk_ids, problem.hidden_states.device
    codes, sf, x_scale = stage(problem.hidden_states)
    layer_scale = torch.tensor(scale, dtype=torch.float32, device=device)
    slots = torch.zeros(*ids.shape, problem.hidden_size, dtype=torch.bfloat16, device=device)
    live = (ids >= 0) & (ids < problem.num_experts)
    factor_13, factor_2 = problem.expert_factors.values()
    for expert in ids[live].unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate_up = linear(
            codes[token], sf[token], problem.w13_weight[expert], problem.w13_weight_scale[expert]
        )
        gate_up *= x_scale[token] * factor_13[expert]
        # The weight, which this contract applies in the combine, is not read here.
        acts = activate(gate_up, x_scale[token], problem.act, contract)
        operand = requantise(acts, layer_scale)
        down = linear(*operand, problem.w2_weight[expert], problem.w2_weight_scale[expert])
        slots[token, slot] = (down * (factor_2[expert] * layer_scale)).to(torch.bfloat16)
    return combine(slots, live, problem.topk_weights, contract)


def stage(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(T, H)`` bfloat16 to E2M1 numbers (T, H), scales (T, H/16) and (T, 1), all float32."""
    value = hidden.float()
    x_scale = _amax(value).clamp_min(_fp32(1e-12, value)) * _fp32(1 / 2688, value)
    groups = (value / x_scale).unflatten(-1, (-1, NVFP4_GROUP))
    sf = _e4m3(_amax(groups) * _fp32(1 / 6, value))
    numbers = e2m1(groups / sf).nan_to_num(nan=0.0)
    return numbers.flatten(-2), sf.squeeze(-1), x_scale


def requantise(acts: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(R, I)`` float32 to E2M1 numbers (R, I) and scales (R, I/16), float32."""
    groups = acts.unflatten(-1, (-1, NVFP4_GROUP))
    divisor = scale * 6.0
    sf = _e4m3(torch.minimum(_amax(groups), divisor * _MOST) / divisor)
    numbers = e2m1(groups * (1.0 / (sf * scale))).nan_to_num(nan=_NAN_BECOMES)
    return numbers.flatten(-2), sf.squeeze(-1)


def linear(
    numbers: torch.Tensor, sf: torch.Tensor, packed: torch.Tensor, weight_sf: torch.Tensor
) -> torch.Tensor:
    """``(R, K)`` numbers, (R, K/16) scales, ``(N, K/2)`` and (N, K/16) bytes to (R, N) float32."""
    table = _table(packed)
    nibbles = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).long()
    weights = table[nibbles].unflatten(-1, (-1, NVFP4_GROUP)).permute(1, 2, 0)
    scales = weight_sf.contiguous().view(torch.float8_e4m3fn).double()
    rows = numbers.double().unflatten(-1, (-1, NVFP4_GROUP)).transpose(0, 1)
    acc = torch.zeros(len(numbers), len(packed), dtype=torch.float32, device=packed.device)
    for group in range(sf.shape[1]):
        both = sf[:, group, None].double() * scales[:, group]
        acc += ((rows[group] @ weights[group]) * both).float()
    return acc


def e2m1(values: torch.Tensor) -> torch.Tensor:
    """Nearest E2M1 number of float32 ones, ties to the even code, 6 beyond; NaN stays NaN."""
    numbers = torch.tensor(_NUMBERS, dtype=torch.float32, device=values.device)
    between = (numbers[1:] + numbers[:-1]) / 2
    size = values.abs()
    below, above = (torch.bucketize(size, between, right=side) for side in (False, True))
    code = torch.where(below % 2 == 0, below, above)  # the two differ in a tie only
    return torch.where(values.isnan(), torch.nan, numbers[code].copysign(values))


def _table(like: torch.Tensor) -> torch.Tensor:
    numbers = torch.tensor(_NUMBERS, dtype=torch.float64, device=like.device)
    return torch.cat([numbers, -numbers])


def _amax(values: torch.Tensor) -> torch.Tensor:
    """``(..., n)`` to (..., 1): the largest magnitude; NaN does not count."""
    size = values.abs()
    return torch.where(size.isnan(), 0.0, size).amax(-1, keepdim=True)


def _e4m3(quotient: torch.Tensor) -> torch.Tensor:
    in_range = quotient.clamp(_LEAST, _MOST)
    return in_range.to(torch.float8_e4m3fn).float()


def _fp32(value: float, like: torch.Tensor) -> torch.Tensor:
    """A Python number would enter in double precision."""
    return torch.tensor(value, dtype=torch.float32, device=like.device)


__all__ = ["forward_nvfp4"]
