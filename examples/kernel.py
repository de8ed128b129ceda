"""A correct kernel in plain torch, for CPU and CUDA: a start to replace piece by piece.

    megamoe check --backend kernel.py:Kernel                   # on a GPU: --device cuda

T tokens, K slots of a token (top-k), H hidden, I intermediate, E experts. H and I are multiples of
128. A group is 32 values with one UE8M0 scale byte b, whose value is 2^(b - 127).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megamoe import Problem

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
REQUIRES = "MegaMoE input staging requires"  # the words of vLLM, which cases of kind errors ask


def forward(p: Problem) -> dict[str, Tensor]:
    """The layer. The stages beside y may be left out; with them a red names the stage."""
    device, (tokens, slots), inter = p.topk_ids.device, p.topk_ids.shape, p.intermediate_size
    x, x_byte = stage(p.hidden_states)  # (T, H) float8_e4m3fn, (T, H/32) uint8
    acts = torch.zeros((tokens, slots, inter), dtype=torch.float8_e4m3fn, device=device)
    acts_byte = torch.zeros((tokens, slots, inter // 32), dtype=torch.uint8, device=device)
    rows = torch.zeros((tokens, slots, p.hidden_size), dtype=torch.bfloat16, device=device)
    inputs = scaled(x.double(), x_byte)  # (T, H) float64: a sum of products is exact, or nearly
    for expert in sorted({*p.topk_ids.flatten().tolist()} - {-1}):  # -1: an empty slot
        token, slot = torch.where(p.topk_ids == expert)  # (n,) rows of this expert
        both = linear(inputs[token], p.w13_weight[expert], p.w13_weight_scale[expert])  # (n, 2I)
        gate, up = both[:, :inter], both[:, inter:]
        if p.activation_clamp is not None:  # fmin and fmax drop NaN, as the contract says
            bound = torch.full_like(up, p.activation_clamp)  # bfloat16 too
            gate, up = torch.fmin(gate, bound), torch.fmin(torch.fmax(up, -bound), bound)
        gate, up = gate.float(), up.float()
        act = gate / (1 + torch.exp(-gate)) * up * p.topk_weights[token, slot][:, None]
        peak = (
            act.view(len(act), inter // 32, 32).abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(2)
        )
        byte = ((peak.view(torch.int32) + 0x1FFFFF) >> 23) - 8  # up to the next power of two
        acts_byte[token, slot] = byte.clamp(min=105).to(torch.uint8)
        acts[token, slot] = codes(act, acts_byte[token, slot])
        values = scaled(acts[token, slot].double(), acts_byte[token, slot])
        rows[token, slot] = linear(values, p.w2_weight[expert], p.w2_weight_scale[expert])
    total = torch.zeros((tokens, p.hidden_size), dtype=torch.float32, device=device)
    for k in range(slots):  # in ascending order, each sum rounded to float32
        total = torch.where(p.topk_ids[:, k, None] >= 0, total + rows[:, k].float(), total)
    y = total.bfloat16()  # (T, H)
    return {"y": y, "x": x, "x_sf": words(x_byte), "l2_acts": acts, "l2_acts_sf": acts_byte}


def prepare(
    hidden_states: Tensor,  # (T, H) bfloat16
    topk_weights: Tensor,  # (T, K) float32
    topk_ids: Tensor,  # (T, K) int32 or int64
    x_fp8: Tensor,  # out: (at least T, H) float8_e4m3fn; rows from T on must stay as they are
    x_sf: Tensor,  # out: (at least T, H/128) int32, four scale bytes to a word
    topk_idx_out: Tensor,  # out: (at least T, K) int64
    topk_weights_out: Tensor,  # out: (at least T, K) float32
    is_padding: Tensor | None = None,  # (T,) bool: rows that get id -1 and weight 0
) -> None:
    """Staging: writes the first T rows of the buffers in place."""
    if hidden_states.shape[1] % 128:
        raise ValueError(f"{REQUIRES} hidden_size to be a multiple of 128.")
    if topk_weights.shape != topk_ids.shape or len(topk_ids) != len(hidden_states):
        raise ValueError(f"{REQUIRES} topk_weights and topk_ids to have the same shape.")
    tokens, _ = topk_ids.shape
    x, byte = stage(hidden_states)
    x_fp8[:tokens], x_sf[:tokens] = x, words(byte)
    topk_idx_out[:tokens], topk_weights_out[:tokens] = topk_ids, topk_weights
    if is_padding is not None:
        topk_idx_out[:tokens].masked_fill_(is_padding[:, None], -1)
        topk_weights_out[:tokens].masked_fill_(is_padding[:, None], 0.0)


def eplb_map(
    topk_ids: Tensor,  # (T, K) int32 or int64: logical experts; -1 for an empty slot
    expert_load_view: Tensor,  # (P,) int32, in and out: tokens that each physical expert got
    logical_to_physical_map: Tensor,  # (L, R) int64
    logical_replica_count: Tensor,  # (L,) int64
    record_enabled: Tensor,  # () bool: whether to count
    num_unpadded_tokens: Tensor | None = None,  # () int32: rows from there on are not counted
) -> Tensor:
    """Physical ids, of the shape and dtype of ``topk_ids``: a token's row picks the replica."""
    row = torch.arange(len(topk_ids), dtype=torch.int64, device=topk_ids.device)[:, None]
    ids = topk_ids.to(torch.int32)  # an int64 id beyond 32 bits wraps, as in vLLM
    valid = (ids >= 0) & (ids < len(logical_replica_count))
    logical = torch.where(valid, ids, 0).long()
    replica = (row * 2654435769) % 2**32 % logical_replica_count[logical].clamp(min=1)
    physical = torch.where(valid, logical_to_physical_map[logical, replica], -1)
    mask = (physical >= 0) & (physical < len(expert_load_view)) & record_enabled
    if num_unpadded_tokens is not None:
        mask &= row < num_unpadded_tokens
    where = torch.where(mask, physical, 0).flatten()
    expert_load_view.index_add_(0, where, mask.flatten().to(torch.int32))
    return physical.to(topk_ids.dtype)


def stage(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """(T, H) bfloat16 to codes (T, H) float8_e4m3fn and scale bytes (T, H/32) uint8."""
    groups = hidden.float().reshape(len(hidden), hidden.shape[1] // 32, 32).abs()
    peak = groups.nan_to_num(nan=0.0, posinf=torch.inf).amax(2).clamp(min=1e-4)
    scale = (peak / 448).view(torch.int32)  # the bits: exponent field and fraction
    byte = ((scale >> 23) + (scale & 0x7FFFFF != 0)).clamp(1, 254).to(torch.uint8)
    return codes(hidden, byte), byte


def codes(values: Tensor, byte: Tensor) -> Tensor:
    """(n, m) values over the scales of (n, m/32) bytes, as float8_e4m3fn; beyond 448 is 448."""
    return scaled(values.double(), 254 - byte).clamp(-448, 448).float().to(torch.float8_e4m3fn)


def scaled(values: Tensor, byte: Tensor) -> Tensor:
    """(n, m) float64 times the scales of (n, m/32) bytes; byte 255 is NaN."""
    power = torch.ldexp(torch.ones_like(byte, dtype=torch.float64), byte.int() - 127)
    power = power.masked_fill(byte == 255, torch.nan)
    return (values.reshape(*byte.shape, 32) * power[..., None]).view(values.shape)


def linear(values: Tensor, weight: Tensor, byte: Tensor) -> Tensor:
    """(n, m) float64 times the transpose of weights (r, m), rounded to (n, r) bfloat16.

    ``weight`` (r, m/2) uint8 holds two E2M1 a byte, the low nibble first; ``byte`` (r, m/32) uint8.
    """
    table = torch.tensor(E2M1, dtype=torch.float64, device=weight.device)
    pair = torch.stack((table.repeat(16), table.repeat_interleave(16)), dim=1)  # (256, 2)
    out = []
    for at in range(0, len(weight), 128):  # a few rows at a time: float64 takes 16 times the bytes
        some = weight[at : at + 128]
        numbers = pair.index_select(0, some.flatten().int()).view(len(some), -1)
        out.append(values @ scaled(numbers, byte[at : at + 128]).T)
    return torch.cat(out, dim=1).bfloat16()


def words(byte: Tensor) -> Tensor:
    """(T, H/32) uint8 to (T, H/128) int32, the first byte of four lowest."""
    return byte.contiguous().view(torch.int32)


class Kernel:
    """What ``megamoe check`` asks for: a name, what is claimed, and the three callables."""

    name = "my-kernel"
    accumulator = "fp32"  # how it adds: in any order, in float32 or better
    contracts = ("2026-11",)  # which revision it computes; `megamoe contract list` has all
    forward = staticmethod(forward)
    prepare = staticmethod(prepare)
    eplb_map = staticmethod(eplb_map)
