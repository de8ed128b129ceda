"""The step of ``eager`` between the two products: the clamp, SwiGLU and its relatives.

The exponential and the hyperbolic tangent are computed in float64 and rounded: a vectorised fp32
function may differ in the last bit with the position of an element in the vector.
"""

from __future__ import annotations

import torch

from megamoe.backends.eager_combine import fma
from megamoe.spec.contract import Contract
from megamoe.spec.features import Activation

_SMALLEST_NORMAL = 2.0**-126


def activate(
    gate_up: torch.Tensor, routing: torch.Tensor, act: Activation, contract: Contract
) -> torch.Tensor:
    """``(gated * up) * routing`` in fp32: (R, 2I) and (R, 1) to (R, I).

    Gate and up are rounded to bfloat16 first, and clamped there.
    """
    gate, up = gate_up.to(torch.bfloat16).float().chunk(2, dim=-1)
    if contract.gate_up_order.value == "up-gate":
        gate, up = up, gate
    gate, up = _clamped(gate, up, act, contract)
    gated, up = (_situ if act.name == "situ" else _swiglu)(gate, up, act, contract)
    value = gated * up
    if contract.routing_weight.value == "activation":
        value = value * routing
    return value.to(torch.bfloat16).float() if contract.bf16_before_requant.value else value


def _clamped(
    gate: torch.Tensor, up: torch.Tensor, act: Activation, contract: Contract
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clamp, itself rounded to bfloat16: NaN becomes the bound that meets it first."""
    if act.clamp is None:
        return gate, up
    bound = torch.tensor(act.clamp, dtype=torch.bfloat16, device="cpu").float().item()
    nan = contract.clamp_drops_nan.value
    up = torch.where((up < -bound) | (up.isnan() & nan), -bound, up)
    up = torch.where(up > bound, bound, up)
    if act.name == "swiglustep":
        return gate, up
    if contract.gate_clamped_below.value:
        gate = torch.where((gate < -bound) | (gate.isnan() & nan), -bound, gate)
    return torch.where((gate > bound) | (gate.isnan() & nan), bound, gate), up


def _swiglu(
    gate: torch.Tensor, up: torch.Tensor, act: Activation, contract: Contract
) -> tuple[torch.Tensor, torch.Tensor]:
    argument = gate if act.alpha == 1 else gate * _fp32(act.alpha, gate)
    denominator = 1.0 + _exp(-argument)
    if act.fast_math:
        gated = gate * _reciprocal(denominator)
    elif contract.precise_silu.value == "g*(1/d)":
        gated = gate * (1.0 / denominator)
    else:
        gated = gate / denominator
    if act.name == "swiglustep" and act.clamp is not None:
        # fminf does the same: the bound replaces NaN and infinity.
        gated = torch.fmin(gated, _fp32(act.clamp, gate))
    return gated, up if act.beta == 0 else up + _fp32(act.beta, up)


def _situ(
    gate: torch.Tensor, up: torch.Tensor, act: Activation, contract: Contract
) -> tuple[torch.Tensor, torch.Tensor]:
    form, alpha, beta = contract.situ_tanh.value, _fp32(act.alpha, gate), _fp32(act.beta, up)
    if form == "sigmoid":
        tanh = _tanh_of_sigmoid(gate * (1.0 / alpha), act)
        gated = (tanh * alpha) * _sigmoid(gate, act)
        return gated, _tanh_of_sigmoid(up * (1.0 / beta), act) * beta
    if form == "quotient" and (act.alpha, act.beta) == (4.0, 25.0):
        t = _tanh(gate * 0.25)
        above = t + 1.0
        below = fma(t, t, torch.ones_like(t))
        gated = ((t + t) * (above * above)) / below
        quarter = up * _fp32(0.04, up) if act.fast_math else up / beta
        return gated, _tanh(quarter) * beta
    return (alpha * _tanh(gate / alpha)) * _sigmoid(gate, act), beta * _tanh(up / beta)


def _tanh_of_sigmoid(argument: torch.Tensor, act: Activation) -> torch.Tensor:
    return 2.0 * _sigmoid(2.0 * argument, act) - 1.0


def _sigmoid(argument: torch.Tensor, act: Activation) -> torch.Tensor:
    denominator = 1.0 + _exp(-argument)
    return _reciprocal(denominator) if act.fast_math else 1.0 / denominator


def _reciprocal(denominator: torch.Tensor) -> torch.Tensor:
    """The reciprocal as rcp.approx.ftz gives it: a subnormal result becomes zero."""
    reciprocal = 1.0 / denominator
    return torch.where(reciprocal < _SMALLEST_NORMAL, 0.0, reciprocal)


def _exp(argument: torch.Tensor) -> torch.Tensor:
    return argument.double().exp().float()


def _tanh(argument: torch.Tensor) -> torch.Tensor:
    return argument.double().tanh().float()


def _fp32(value: float, like: torch.Tensor) -> torch.Tensor:
    """A Python number would enter in double precision."""
    return torch.tensor(value, dtype=torch.float32, device=like.device)


__all__ = ["activate"]
