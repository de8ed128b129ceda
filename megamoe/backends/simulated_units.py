"""Simulated tensor cores: the instructions as the package ``mmasim`` models them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megamoe.backends.simulated_sums import Kernel, Linear, Rng, exact_cast, scaled, to_fp32
from megamoe.spec.formats import E2M1_TABLE, F64, GROUP, U8, e2m1_unpack, ue8m0_decode


def _fp4(packed: U8) -> torch.Tensor:
    """Nibbles as the hardware holds one FP4 value a byte: in bits 5 to 2."""
    return torch.from_numpy(e2m1_unpack(packed) << 2)


def hopper_bf16() -> Kernel:
    """wgmma with bf16 operands: scales multiplied in beforehand, exactly; a member of
    ``fp32-ordered``. 16 terms, 25 bits, truncated. :class:`NotAMemberError` where an operand,
    scaled, is no bfloat16 number."""
    from mmasim.arithmetic.fdpa import MMA_T_FDPA

    unit = MMA_T_FDPA(25, "RZ-FP32", 16, -133, "bf16", "bf16")

    def linear(codes: U8, sf: U8, packed: U8, weight_sf: U8, rng: Rng) -> F64:
        del rng
        x, w = scaled(codes, sf, packed, weight_sf)
        a, b = (exact_cast(operand, torch.bfloat16) for operand in (x, w))
        c = torch.zeros(len(x), len(w))
        for start in range(0, codes.shape[1], 16):
            k = slice(start, start + 16)
            c = unit.dpa(_expand(a[:, None, k], c), _expand(b[None, :, k], c), c)
        return c.double().numpy()

    return Kernel("mmasim/hopper-bf16", "fp32-ordered", linear)


def hopper_e4m3(weights: str = "e2m1") -> Kernel:
    """wgmma with e4m3 operands, promoted to fp32 every 128; class ``sm90-e4m3``.

    The instruction has no block scales; the contract has one for each 32. They are folded in as
    exponents (``MMA_ST_FDPA`` with this instruction's numbers). ``weights`` says in which format
    the FP4 values reach the unit: it decides the exponent field of 0.5.
    """
    from mmasim.arithmetic.fdpa import MMA_ST_FDPA

    unit = MMA_ST_FDPA(13, "RZ-E8M13", 32, -133, "e4m3", weights)
    return Kernel(f"mmasim/hopper-e4m3/{weights}", "sm90-e4m3", block_scaled(unit, weights, 4))


def hopper_e4m3_outside(run: int, rounding: str, accumulator: str) -> Kernel:
    """wgmma with e4m3 operands, each ``run`` of K from zero, scaled and added in fp32.

    The run takes the scale factors of its first group: they must be the same in all of it.
    """
    from mmasim.arithmetic.fdpa import MMA_T_FDPA

    unit = MMA_T_FDPA(13, "RZ-E8M13", 32, -133, "e4m3", "e4m3")

    def linear(codes: U8, sf: U8, packed: U8, weight_sf: U8, rng: Rng) -> F64:
        a = torch.from_numpy(codes).view(torch.float8_e4m3fn)
        b = torch.from_numpy(E2M1_TABLE[e2m1_unpack(packed)]).to(torch.float8_e4m3fn)
        scale, weight_scale = (ue8m0_decode(s[:, :: run // GROUP]) for s in (sf, weight_sf))
        main = np.zeros((len(codes), len(packed)))
        for i in range(scale.shape[1]):
            k = slice(i * run, (i + 1) * run)
            zero = torch.zeros(main.shape)
            part = unit.dpa(_expand(a[:, None, k], zero), _expand(b[None, :, k], zero), zero)
            factor = scale[:, i, None] * weight_scale[None, :, i]
            with np.errstate(invalid="ignore"):
                scaled = to_fp32(part.double().numpy() * factor, rounding, rng)
                main = to_fp32(main + scaled, rounding, rng)
        return main

    return Kernel(f"mmasim/hopper-e4m3-k{run}/{rounding}", accumulator, linear)


def blackwell_mxf8f6f4() -> Kernel:
    """tcgen05 kind::mxf8f6f4, scale block 32, never promoted; class ``sm100-mxf8f6f4``."""
    from mmasim.arithmetic.fdpa import MMA_ST_FDPA

    unit = MMA_ST_FDPA(25, "RZ-FP32", 32, -133, "e4m3", "e2m1")
    return Kernel("mmasim/blackwell-mxf8f6f4", "sm100-mxf8f6f4", block_scaled(unit, "e2m1", 0))


def block_scaled(unit: Any, weights: str, promote: int) -> Linear:
    """A block-scaled unit over all of K, promoted after ``promote`` groups (0: never)."""

    def linear(codes: U8, sf: U8, packed: U8, weight_sf: U8, rng: Rng) -> F64:
        del rng
        a = torch.from_numpy(codes).view(torch.float8_e4m3fn)
        if weights == "e2m1":
            b = _fp4(packed)
        else:
            b = torch.from_numpy(E2M1_TABLE[e2m1_unpack(packed)]).to(torch.float8_e4m3fn)
        alpha = torch.from_numpy(sf).view(torch.float8_e8m0fnu)
        beta = torch.from_numpy(weight_sf).view(torch.float8_e8m0fnu)
        c = main = torch.zeros(len(codes), len(packed))
        for group in range(sf.shape[1]):
            k, g = slice(group * GROUP, (group + 1) * GROUP), slice(group, group + 1)
            c = unit.dpa(
                _expand(a[:, None, k], c), _expand(b[None, :, k], c), c,
                _expand(alpha[:, None, g], c), _expand(beta[None, :, g], c),
            )  # fmt: skip
            if promote and (group + 1) % promote == 0:
                main, c = main + c, torch.zeros_like(c)
        return (main + c if promote else c).double().numpy()

    return linear


def _expand(operand: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return operand.expand(*out.shape, operand.shape[-1])
