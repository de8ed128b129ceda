"""The ``eager`` backend: the layer in plain PyTorch, as an engine developer would write it.

Accumulator class ``fp32-ordered``: each dot product takes K in ascending blocks of 32, one fp32
addition a block. Three choices make its bits the same for any batch, thread count and BLAS:

- The products within a block are summed *exactly*. An E4M3 operand is split into its part of
  magnitude 1 and above (a multiple of 2^-3 up to 448) and the part below (a multiple of 2^-9);
  times E2M1 values, 32 terms of either kind fit in 21 bits, so fp32 matrix products of each are
  exact in any order.
- The scale factors, powers of two, are applied in float64 and the block sum is rounded to fp32
  once. In fp32 their product alone could leave the range although the block sum does not.
- The exponential is taken in float64 and rounded (:mod:`megamoe.backends.eager_activation`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch

from megamoe.backends.eager_activation import activate
from megamoe.backends.eager_combine import combine
from megamoe.backends.eager_fp8_block import forward_fp8_block
from megamoe.backends.eager_nvfp4 import forward_nvfp4
from megamoe.backends.eager_w4a8_token import forward_w4a8_token
from megamoe.backends.eager_w4a16 import forward_w4a16
from megamoe.layer.eplb import eplb_map_to_physical_and_record
from megamoe.layer.kernel_weights import transform_weights
from megamoe.layer.modes import without_autocast
from megamoe.layer.staging import (
    RECIP_448,
    e4m3_codes,
    group_amax,
    prepare_megamoe_inputs,
    scale_down,
    ue8m0_ceil,
    unpack_sf,
)
from megamoe.spec.contract import NEWEST, Contract
from megamoe.spec.contract import contract as find_contract
from megamoe.spec.features import FEATURES, Activation
from megamoe.spec.formats import E2M1_TABLE, E4M3_TABLE, GROUP
from megamoe.spec.problem import Problem

_WEIGHTS_AT_ONCE = 1 << 19
"""Decoded weight values in memory at a time: 2 MiB of fp32, a second-level cache. Has no
influence on any bit."""

_E4M3_SPLIT = 1.0
_DIALECTS = {
    "fp8-block": forward_fp8_block, "w4a16": forward_w4a16, "w4a8-token": forward_w4a8_token,
}  # fmt: skip


class EagerBackend:
    """Plain PyTorch on CPU or CUDA; reads only the experts that some token is routed to."""

    name = "eager"
    accumulator = "fp32-ordered"
    features = FEATURES

    def __init__(self, contract: Contract = NEWEST) -> None:
        self.contract = contract
        self.contracts = (contract.revision,)

    transform_weights = staticmethod(transform_weights)

    def prepare(self, *tensors: torch.Tensor) -> None:
        """:func:`megamoe.layer.staging.prepare_megamoe_inputs` under this contract."""
        prepare_megamoe_inputs(*tensors, contract=self.contract)

    def eplb_map(self, *arguments: Any) -> torch.Tensor:
        """:func:`megamoe.layer.eplb.eplb_map_to_physical_and_record` under this contract."""
        return eplb_map_to_physical_and_record(*arguments, contract=self.contract)

    def forward(self, problem: Problem) -> dict[str, torch.Tensor]:
        """The whole layer; returns every stage of ``tensors.STAGES``, FP8 codes as uint8.

        Slots whose id is outside ``[0, E)`` take no part and read as zeros in ``l2_acts``. For
        other formats than MXFP4 it returns ``y`` alone: the stages have formats of their own there.
        """
        with without_autocast(problem.hidden_states.device):  # it takes bmm's operands for bfloat16
            if problem.weight_format == "nvfp4":
                return {"y": forward_nvfp4(problem, self.contract)}
            if problem.weight_format in _DIALECTS:
                return {"y": _DIALECTS[problem.weight_format](problem, self.contract)}
            return self._forward(problem)

    def _forward(self, problem: Problem) -> dict[str, torch.Tensor]:
        x, x_sf = self._stage(problem)
        tokens, top_k = problem.topk_ids.shape
        inter = problem.intermediate_size
        device = x.device
        acts = torch.zeros(tokens, top_k, inter, dtype=torch.uint8, device=device)
        acts_sf = torch.zeros(tokens, top_k, inter // GROUP, dtype=torch.uint8, device=device)
        slots = torch.zeros(tokens, top_k, problem.hidden_size, dtype=torch.bfloat16, device=device)
        sf_bytes = unpack_sf(x_sf)
        for expert, token, slot in _routed(problem):
            gate_up = linear(
                x[token],
                sf_bytes[token],
                problem.w13_weight[expert],
                problem.w13_weight_scale[expert],
            )
            routing = problem.topk_weights[token, slot].unsqueeze(-1)
            codes, sf = requantise(
                activate(gate_up, routing, problem.act, self.contract), self.contract
            )
            acts[token, slot] = codes
            acts_sf[token, slot] = sf
            down = linear(codes, sf, problem.w2_weight[expert], problem.w2_weight_scale[expert])
            slots[token, slot] = down.to(torch.bfloat16)
        live = (problem.topk_ids >= 0) & (problem.topk_ids < problem.num_experts)
        y = combine(
            slots, live, problem.topk_weights, self.contract,
            shared=self._shared(problem, x, sf_bytes), dtype=problem.combine_dtype,
            output=problem.shared_output,
        )  # fmt: skip
        return {"y": y, "x": x, "x_sf": x_sf, "l2_acts": acts, "l2_acts_sf": acts_sf}

    def slot_rows(
        self, x: torch.Tensor, x_sf: torch.Tensor, experts: torch.Tensor, routing: torch.Tensor,
        weights: tuple[torch.Tensor, ...], act: Activation,
    ) -> torch.Tensor:  # fmt: skip
        """``(R, H)`` bfloat16: the slot row of each staged row, for expert parallelism.

        ``x`` (R, H) E4M3 bytes, ``x_sf`` (R, H/128) int32, ``experts`` (R,) int64 local or -1,
        which gives zeros, ``routing`` (R,) float32, ``weights`` in the checkpoint's layout.
        """
        w13, w13_scale, w2, w2_scale = weights
        rows, sf = torch.zeros(x.shape, dtype=torch.bfloat16, device=x.device), unpack_sf(x_sf)
        with without_autocast(x.device):
            for e in experts[experts >= 0].unique().tolist():
                at = (experts == e).nonzero().flatten()
                gate_up = linear(x[at], sf[at], w13[e], w13_scale[e])
                values = activate(gate_up, routing[at, None], act, self.contract)
                down = linear(*requantise(values, self.contract), w2[e], w2_scale[e])
                rows[at] = down.to(torch.bfloat16)
        return rows

    def _shared(self, problem: Problem, x: torch.Tensor, sf: torch.Tensor) -> torch.Tensor | None:
        """The row of the fused shared expert, (T, H) bfloat16: one more expert, of weight 1."""
        if not problem.shared_weights:
            return None
        w13, w13_sf, w2, w2_sf = problem.shared_weights
        one = torch.ones(len(x), 1, dtype=torch.float32, device=x.device)
        values = activate(linear(x, sf, w13, w13_sf), one, problem.act, self.contract)
        return linear(*requantise(values, self.contract), w2, w2_sf).to(torch.bfloat16)

    def _stage(self, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, hidden = problem.hidden_states.shape
        device = problem.hidden_states.device
        x = torch.empty(tokens, hidden, dtype=torch.uint8, device=device)
        x_sf = torch.empty(tokens, hidden // 128, dtype=torch.int32, device=device)
        self.prepare(
            problem.hidden_states,
            problem.topk_weights,
            problem.topk_ids,
            x,
            x_sf,
            torch.empty_like(problem.topk_ids, dtype=torch.int64),
            torch.empty_like(problem.topk_weights, dtype=torch.float32),
        )
        return x, x_sf


def create(device: str | torch.device = "cpu", contract: str = NEWEST.revision) -> EagerBackend:
    """The backend; it computes wherever the problem's tensors are, and any revision."""
    del device
    return EagerBackend(find_contract(contract))


def _routed(problem: Problem) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Each expert that is used, with the tokens and slots routed to it."""
    ids = problem.topk_ids
    for expert in ids.unique().tolist():
        if 0 <= expert < problem.num_experts:
            token, slot = (ids == expert).nonzero(as_tuple=True)
            yield expert, token, slot


def linear(
    codes: torch.Tensor, sf: torch.Tensor, weight: torch.Tensor, weight_sf: torch.Tensor
) -> torch.Tensor:
    """Scaled FP8 x FP4 product: ``out[r, n] = sum_k x[r, k] * w[n, k]`` in fp32.

    ``codes`` (R, K) E4M3 bytes, ``sf`` (R, K/32) UE8M0 bytes, ``weight`` (N, K/2) packed E2M1 or
    (N, K) E4M3 bytes, ``weight_sf`` (N, K/32) UE8M0 bytes; gives (R, N) float32. Blocks of 32 are
    added in ascending order, starting from zero.
    """
    rows, depth = codes.shape
    if weight.shape[1] == depth:
        return _linear_e4m3(codes, sf, weight, weight_sf)
    outputs, groups = weight.shape[0], depth // GROUP
    table = _e4m3_table(codes.device)
    x = table[codes.int()]
    large = x.abs() >= _E4M3_SPLIT
    high = torch.where(large, x, 0.0)
    low = torch.where(large, 0.0, x)  # NaN is here, and reaches the sum of the two
    parts = torch.cat([high, low]).view(2 * rows, groups, GROUP).transpose(0, 1)
    x_scale = _ue8m0_values(sf).t().unsqueeze(-1)  # (G, R, 1)
    w_scale = _ue8m0_values(weight_sf).t().unsqueeze(1)  # (G, 1, N)
    step = max(1, _WEIGHTS_AT_ONCE // (outputs * GROUP))
    acc = torch.zeros(rows, outputs, dtype=torch.float32, device=codes.device)
    for first in range(0, groups, step):
        here = slice(first, min(first + step, groups))
        packed = weight[:, here.start * GROUP // 2 : here.stop * GROUP // 2]
        w = _e2m1_values(packed).view(outputs, -1, GROUP).permute(1, 2, 0)
        exact = torch.bmm(parts[here], w).double()
        block = exact[:, :rows] + exact[:, rows:]
        for term in (block * (x_scale[here] * w_scale[here])).float():
            acc += term
    return acc


def _linear_e4m3(
    codes: torch.Tensor, sf: torch.Tensor, weight: torch.Tensor, weight_sf: torch.Tensor
) -> torch.Tensor:
    """:func:`linear` for E4M3 weights: 32 products of two E4M3 values need 41 bits, so float64 sums
    exactly."""
    table, groups = _e4m3_table(codes.device).double(), sf.shape[1]
    x = table[codes.int()].view(len(codes), groups, GROUP).transpose(0, 1)
    w = table[weight.int()].view(len(weight), groups, GROUP).permute(1, 2, 0)
    x_scale, w_scale = _ue8m0_values(sf).t().unsqueeze(-1), _ue8m0_values(weight_sf).t()
    acc = torch.zeros(len(codes), len(weight), dtype=torch.float32, device=codes.device)
    for group in range(groups):
        acc += ((x[group] @ w[group]) * (x_scale[group] * w_scale[group])).float()
    return acc


def requantise(values: torch.Tensor, contract: Contract) -> tuple[torch.Tensor, torch.Tensor]:
    """``(R, I)`` float32 to E4M3 bytes (R, I) and UE8M0 bytes (R, I/32), both uint8.

    The amax is *multiplied* by fl32(1/448) and has no floor of its own, unlike in staging.
    """
    groups = values.unflatten(-1, (-1, GROUP))
    exponent = requant_exponent(group_amax(groups, contract), contract)
    codes = e4m3_codes(scale_down(groups, exponent), contract).flatten(-2)
    return codes, exponent.to(torch.uint8)


def requant_exponent(amax: torch.Tensor, contract: Contract) -> torch.Tensor:
    """``(...)`` float32 amax to int32 UE8M0 bytes."""
    if contract.requant_scale.value == "bits":  # in int64: infinity runs over the sign
        byte = ((amax.contiguous().view(torch.int32).long() + 0x1FFFFF) >> 23).int() - 8
    else:
        byte = ue8m0_ceil(amax * RECIP_448.to(amax.device))
    return byte.clamp(contract.requant_exponent_min.value, 255)


# --- decoding ---------------------------------------------------------------------------------


def _ue8m0_values(codes: torch.Tensor) -> torch.Tensor:
    """``(...)`` UE8M0 bytes to float64, exact; 0xFF is NaN."""
    value = ((codes.long() + (1023 - 127)) << 52).view(torch.float64)
    return torch.where(codes == 0xFF, torch.nan, value)


def _e2m1_values(packed: torch.Tensor) -> torch.Tensor:
    """``(N, n)`` packed bytes, n even, to (N, 2n) float32.

    One look-up decodes four nibbles: the table maps each pair of bytes to four halves, kept in
    one int64. On one core this decodes about 500 million values a second.
    """
    pairs = packed.contiguous().view(torch.int16).long() & 0xFFFF
    return torch.take(_e2m1_quads(packed.device), pairs).view(torch.float16).float()


@lru_cache(maxsize=8)
def _e2m1_quads(device: torch.device) -> torch.Tensor:
    pairs, shifts = torch.arange(1 << 16, device="cpu"), torch.tensor([0, 4, 8, 12], device="cpu")
    nibbles = pairs.unsqueeze(-1) >> shifts & 0xF
    halves = torch.from_numpy(E2M1_TABLE.copy()).half()[nibbles]
    return halves.view(torch.int64).squeeze(-1).contiguous().to(device)


@lru_cache(maxsize=8)
def _e4m3_table(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(E4M3_TABLE.copy()).float().to(device)


__all__ = ["EagerBackend", "activate", "combine", "create", "linear", "requantise"]
