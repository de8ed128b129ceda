"""Staging: hidden states to FP8 with group scale factors, as the fused kernel wants them.

Pure torch, the same code on CPU and CUDA, without a synchronisation. Source: the numerics
contract, stage "staging" (vLLM 0.24, ``deepseek_v4/nvidia/ops/prepare_megamoe.py``).
"""

from __future__ import annotations

import math
from typing import Final

import torch

from megamoe.spec.contract import NEWEST, Contract
from megamoe.spec.features import SIZE_MULTIPLE
from megamoe.spec.formats import E4M3_MAX, E4M3_NAN, GROUP, UE8M0_BIAS
from megamoe.spec.rest import FILLS, MASKED_REST
from megamoe.spec.texts import text

RECIP_448: Final = 1.0 / torch.tensor(448.0, dtype=torch.float32, device="cpu")
"""fl32(1/448), whatever torch's defaults are while this module is imported."""
_ELEMENTS_AT_ONCE: Final = 1 << 20
"""Hidden values that are staged together: few enough for the cache."""
OUTPUTS: Final = ("x_fp8", "x_sf", "topk_idx_out", "topk_weights_out")


def check_staging_inputs(
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    contract: Contract = NEWEST,
) -> None:
    """Raise ``ValueError`` in the contract's words where staging cannot take these inputs."""
    if hidden_states.shape[-1] % SIZE_MULTIPLE:
        raise ValueError(text("staging-hidden", contract))
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(text("staging-shapes", contract))


def check_staging_outputs(tokens: int, hidden: int, top_k: int, *outputs: torch.Tensor) -> None:
    """Raise ``ValueError`` where ``tokens`` rows do not fit the outputs (:data:`OUTPUTS`).

    One of another type would take converted numbers where bits are meant.
    """
    forms = (
        (hidden, (torch.float8_e4m3fn, torch.uint8, torch.int8)),
        (hidden // SIZE_MULTIPLE, (torch.int32,)),
        (top_k, (torch.int64,)),
        (top_k, (torch.float32,)),
    )
    for name, out, (width, dtypes) in zip(OUTPUTS, outputs, forms, strict=True):
        if out.shape[0] < tokens or out.shape[1] != width or out.dtype not in dtypes:
            raise ValueError(
                f"{name} is {tuple(out.shape)} {out.dtype}; {tokens} tokens need at least "
                f"({tokens}, {width}) {dtypes[0]}"
            )


def prepare_megamoe_inputs(
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    x_fp8: torch.Tensor,
    x_sf: torch.Tensor,
    topk_idx_out: torch.Tensor,
    topk_weights_out: torch.Tensor,
    is_padding: torch.Tensor | None = None,
    *,
    contract: Contract = NEWEST,
) -> None:
    """Stage ``T`` tokens into the first ``T`` rows of the outputs, in place.

    Inputs: ``hidden_states`` (T, H) bfloat16, ``topk_weights`` (T, K), ``topk_ids`` (T, K) int32
    or int64. Outputs, each with at least T rows: ``x_fp8`` (., H) float8_e4m3fn or uint8,
    ``x_sf`` (., H/128) int32, ``topk_idx_out`` (., K) int64, ``topk_weights_out`` (., K) float32.
    ``is_padding`` (T,) bool: rows that get id -1 and weight 0.
    No tokens: returns at once, whatever the other shapes are.

    Raises ``ValueError``, in the words of ``contract``, before anything is written when H is not
    a multiple of 128, the two top-k tensors differ in shape, or an output has another type or
    too little room.
    """
    tokens, hidden = hidden_states.shape
    if contract.revision in MASKED_REST and tokens == 0:
        mask_rest(0, topk_idx_out, topk_weights_out)
    if tokens == 0:
        return
    check_staging_inputs(hidden_states, topk_weights, topk_ids, contract)
    outputs = (x_fp8, x_sf, topk_idx_out, topk_weights_out)
    check_staging_outputs(tokens, hidden, topk_ids.shape[1], *outputs)
    step = max(1, _ELEMENTS_AT_ONCE // hidden)
    parts = [_stage(some, contract) for some in hidden_states.split(step)]
    codes, exponent = (torch.cat(part) for part in zip(*parts, strict=True))
    if is_padding is not None and contract.padding_known.value:
        topk_ids = torch.where(is_padding.unsqueeze(-1), -1, topk_ids)
        topk_weights = torch.where(is_padding.unsqueeze(-1), 0.0, topk_weights)
    x_fp8[:tokens].view(torch.uint8).copy_(codes)
    x_sf[:tokens].copy_(pack_sf(exponent))
    topk_idx_out[:tokens].copy_(topk_ids)
    topk_weights_out[:tokens].copy_(topk_weights)
    if contract.revision in MASKED_REST:
        mask_rest(tokens, topk_idx_out, topk_weights_out)


def mask_rest(tokens: int, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> None:
    """Mask the slots of rows beyond ``tokens``, in place (:mod:`megamoe.spec.rest`)."""
    topk_idx[tokens:] = FILLS["topk_idx"]
    topk_weights[tokens:] = FILLS["topk_weights"]


def _stage(hidden_states: torch.Tensor, contract: Contract) -> tuple[torch.Tensor, torch.Tensor]:
    """``(T, H)`` bfloat16 to E4M3 bytes (T, H) uint8 and exponent bytes (T, H/32) int32."""
    groups = hidden_states.float().unflatten(-1, (-1, GROUP))
    amax = group_amax(groups, contract).clamp_min(contract.staging_amax_floor.value)
    # The division is IEEE: an approximate one moves the exponent where amax is near 448 * 2^k.
    exponent = ue8m0_ceil(amax / E4M3_MAX).clamp(
        contract.staging_exponent_min.value, contract.staging_exponent_max.value
    )
    scaled = scale_down(groups, exponent)
    if contract.staging_exponent_max.value > 254:  # the factor's bits run over: it is -inf
        scaled = torch.where((exponent == 255).unsqueeze(-1), groups.double() * -math.inf, scaled)
    if contract.staging_clips.value:
        scaled = torch.where(scaled.isnan(), float(E4M3_MAX), scaled)
    codes = e4m3_codes(scaled, contract).flatten(-2)
    return codes, exponent


def group_amax(groups: torch.Tensor, contract: Contract) -> torch.Tensor:
    """``(..., 32)`` float32 to ``(...)``: the largest magnitude.

    If NaN members do not count, a group of NaN alone gives 0, as ``fmaxf`` from 0 does.
    """
    magnitude = groups.abs()
    if contract.amax_drops_nan.value:
        magnitude = torch.where(magnitude.isnan(), 0.0, magnitude)
    return magnitude.amax(-1)


def ue8m0_ceil(scale: torch.Tensor) -> torch.Tensor:
    """``(...)`` float32 >= 0 to int32 exponent bytes: field(s) + (mantissa(s) != 0), unclamped."""
    bits = scale.contiguous().view(torch.int32)
    return (bits >> 23) + ((bits & 0x7FFFFF) != 0).int()


def scale_down(groups: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """``groups * 2**(127 - exponent)`` as float64, exact: (..., 32) and (...) to (..., 32).

    In float32 the factor itself would leave the normal range at exponent 254 and above. The
    power of two is built from its bits, so no library's ``pow`` has a say.
    """
    field = 1023 + UE8M0_BIAS - exponent.long()
    return groups.double() * (field << 52).view(torch.float64).unsqueeze(-1)


def e4m3_codes(values: torch.Tensor, contract: Contract) -> torch.Tensor:
    """``(...)`` float32 or float64 to E4M3 bytes (uint8), to nearest even, saturating at 448.

    Infinities saturate to 0x7E and 0xFE, every NaN becomes 0x7F; so does all beyond 448 under a
    contract whose cast does not saturate. torch's own cast keeps the sign
    of a NaN, and whether it saturates is up to its version, so both are settled around it.

    Float64 goes through float32 first, which may round twice. So float64 input must hold values
    that float32 holds, or values far below 2**-10 (both give the code of a single rounding).
    Scaled bfloat16 and scaled float32 do.
    """
    single = values.float()
    bounded = single.clamp(-float(E4M3_MAX), float(E4M3_MAX))  # clamp keeps NaN
    codes = bounded.to(torch.float8_e4m3fn).view(torch.uint8)
    nan = single.isnan()
    if not contract.cast_saturates.value:
        nan |= single.abs() > 464.0  # the midpoint of 448 and 480 rounds to the even 448
    return torch.where(nan, E4M3_NAN, codes)


def pack_sf(codes: torch.Tensor) -> torch.Tensor:
    """``(..., 4n)`` exponent bytes (any integer type) to ``(..., n)`` int32, first group lowest."""
    bytes_ = codes.to(torch.uint8).contiguous()
    return bytes_.view(torch.int32)  # torch runs on little-endian machines only


def unpack_sf(packed: torch.Tensor) -> torch.Tensor:
    """``(..., n)`` int32 to ``(..., 4n)`` uint8, the inverse of :func:`pack_sf`."""
    return packed.contiguous().view(torch.uint8)
