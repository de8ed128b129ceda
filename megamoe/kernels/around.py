"""What this project adds around two foreign products, so that they become a forward.

A library of grouped products has no layer: somebody must sort the slots by expert, compute the
activation between the products, and add the rows of the slots. This module does that in plain
torch, by the contract ``w4a16``: products give bfloat16 rows; the activation is computed in fp32
and rounded to bfloat16 once; the routing weight comes in the combine, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from megamoe.spec.formats import E2M1_TABLE, GROUP
from megamoe.spec.problem import Problem

E4M3_MAX: Final = 448.0
SCALE_FLOOR: Final = 1e-30
LIFT: Final = 6
"""The power of two of a folded group with the largest scale byte: 6 becomes 384, below 448."""
SPREAD: Final = 14
"""A scale byte is at most this far below the largest: 0.5 becomes 2**-9, E4M3's smallest number."""


@dataclass(frozen=True)
class Routes:
    """The live slots of a problem, sorted by expert. ``N`` live slots, ``E`` experts."""

    token: torch.Tensor
    """(N,) int64."""
    slot: torch.Tensor
    """(N,) int64."""
    expert: torch.Tensor
    """(N,) int64, ascending."""
    ends: torch.Tensor
    """(E,) int32: the end of each expert's rows."""

    @classmethod
    def of(cls, ids: torch.Tensor, experts: int) -> Routes:
        """The routes of ``ids`` (T, K) int64; an id outside ``[0, E)`` takes no part."""
        live = (ids >= 0) & (ids < experts)
        token, slot = live.nonzero(as_tuple=True)
        order = ids[token, slot].argsort(stable=True)
        token, slot = token[order], slot[order]
        expert = ids[token, slot]
        ends = torch.bincount(expert, minlength=experts).cumsum(0).to(torch.int32)
        return cls(token, slot, expert, ends)


Product = Callable[[torch.Tensor], torch.Tensor]
"""Rows (N, K) sorted by expert to rows (N, M), both bfloat16."""


def forward(p: Problem, routes: Routes, first: Product, second: Product) -> torch.Tensor:
    """``y`` (T, H) bfloat16 from two grouped products."""
    slots = torch.zeros(*p.topk_ids.shape, p.hidden_size, dtype=torch.float32,
                        device=p.hidden_states.device)  # fmt: skip
    if len(routes.token):
        gate_up = first(p.hidden_states[routes.token].contiguous())
        rows = second(swiglu(gate_up, p.activation_clamp))
        weight = p.topk_weights[routes.token, routes.slot].unsqueeze(-1)
        slots[routes.token, routes.slot] = rows.float() * weight
    out = torch.zeros_like(slots[:, 0])
    for slot in range(slots.shape[1]):  # ascending, one fp32 addition each
        out += slots[:, slot]
    return out.to(torch.bfloat16)


def swiglu(gate_up: torch.Tensor, clamp: float | None) -> torch.Tensor:
    """``(N, 2I)`` bfloat16, gate before up, to (N, I) bfloat16: fp32 between."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    if clamp is not None:
        bound = torch.full_like(gate[:1, :1], clamp)
        gate, up = gate.fmin(bound), up.fmin(bound).fmax(-bound)  # NaN becomes the bound
    return (gate / (1 + (-gate).exp()) * up).to(torch.bfloat16)


def decoded(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """MXFP4 to bfloat16, exactly: ``(E, N, K/2)`` and ``(E, N, K/32)`` bytes to (E, N, K).

    A value has two significant bits, so only the range can be short. ``NotImplementedError`` for a
    scale byte with which a value is no normal bfloat16: below 2, above 251. A group of zeros may
    have any byte; it gives NaN with 255, which is NaN in UE8M0.
    """
    byte = scale[_some(packed)]
    if len(byte) and (int(byte.min()) < 2 or int(byte.max()) > 251):
        raise NotImplementedError(
            f"scale bytes from {int(byte.min())} to {int(byte.max())}: bfloat16 holds the weights "
            "exactly for bytes from 2 to 251"
        )
    factor = (scale.int() << 23).view(torch.float32).repeat_interleave(GROUP, dim=-1)
    return (_numbers(packed) * factor).to(torch.bfloat16)


def folded(packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """MXFP4 to E4M3 with one power of two an expert, exactly.

    ``(E, N, K/2)`` and ``(E, N, K/32)`` bytes give E4M3 (E, N, K) and float32 (E,): a weight is the
    product of both. A group of zeros may have any byte. ``NotImplementedError`` where the bytes of
    an expert are more than 14 apart, since E4M3 has no more powers of two for E2M1's numbers, and
    for byte 255, which is NaN.
    """
    some, byte = _some(packed), scale.int()
    top = byte.where(some, 0).amax((1, 2))
    below = (top[:, None, None] - byte).where(some, 0)
    if len(below) and (int(below.max()) > SPREAD or int(top.max()) == 255):
        raise NotImplementedError(
            f"scale bytes of an expert that are {int(below.max())} apart, the largest "
            f"{int(top.max())}: E4M3 holds the weights exactly where they are at most {SPREAD} "
            "apart, and byte 255 is NaN"
        )
    factor = _power(LIFT - below)
    codes = (_numbers(packed) * factor.repeat_interleave(GROUP, dim=-1)).to(torch.float8_e4m3fn)
    return codes, _power(top - (127 + LIFT))


def _power(of: torch.Tensor) -> torch.Tensor:
    """``2**of``, float32, of int32 from -149 to 127: exact, which exp2 need not be on a GPU."""
    normal, subnormal = (of + 127) << 23, 1 << (of + 149).clamp(0, 22)
    return torch.where(of > -127, normal, subnormal).to(torch.int32).view(torch.float32)


def _some(packed: torch.Tensor) -> torch.Tensor:
    """``(..., K/2)`` bytes to bool (..., K/32): whether a group has a number that is no zero."""
    return (packed & 0x77).unflatten(-1, (-1, GROUP // 2)).ne(0).any(-1)


def _numbers(packed: torch.Tensor) -> torch.Tensor:
    """E2M1 codes, two a byte (..., K/2), the lower half first, to float32 (..., K)."""
    table = torch.from_numpy(E2M1_TABLE.copy()).float().to(packed.device)
    return table[torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2).int()]


def per_row(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(N, K)`` bfloat16 to E4M3 codes (N, K) and float32 scales (N, 1), as `w4a8-token` has it:
    ``s = max(amax / 448, 1e-30)``, codes of ``row * (1 / s)``, 448 beyond.
    """
    values = rows.float()
    amax = values.abs().amax(1, keepdim=True)
    # A tensor: on CUDA torch divides by a Python number as a product with its reciprocal.
    scale = amax / torch.full_like(amax, E4M3_MAX)
    scale = torch.maximum(scale, torch.full_like(scale, SCALE_FLOOR))
    return (values * (1.0 / scale)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def plain_swiglu_only(p: Problem) -> None:
    """``NotImplementedError`` for a call that asks for more than SwiGLU of routed experts."""
    extra = [name for name in p.features if name not in ("w4a16", "w4a8-token")]
    if extra or p.weight_format not in ("mxfp4", "w4a16", "w4a8-token"):
        raise NotImplementedError(
            f"the adapter computes SwiGLU of routed experts with MXFP4 weights, not "
            f"{', '.join(extra) or p.weight_format}"
        )


__all__ = ["Routes", "decoded", "folded", "forward", "per_row", "plain_swiglu_only", "swiglu"]
