"""Staging on the device; in interpreter mode the same code runs on a CPU.

Two things are spelled out that Triton would otherwise do in its own way: the division by 448 is
IEEE's (the plain one is approximate when compiled), and the cast to E4M3 works on the bits (the
interpreter's cast does not round to nearest even).
"""

from __future__ import annotations

import triton
import triton.language as tl

from megamoe.backends.triton.kernels.chain import next_may_start_tl


@triton.jit
def e4m3_code(value):
    """Fp32 to E4M3 bytes (int32), nearest even, saturating at 448; every NaN is 0x7F."""
    bits = value.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # At 2^14 one fp32 ULP is 2^-9, the step of E4M3's subnormals.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) & 0xFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    code = tl.where(size < 0x3C800000, small, tl.minimum(normal, 0x7E))
    code = code | ((bits >> 24) & 0x80)
    return tl.where(size > 0x7F800000, 0x7F, code)


@triton.jit
def power_of_two(exponent):
    """2^exponent as fp32 for int32 exponents from -128 to 127; below -126 it is subnormal."""
    subnormal = 0x00800000 >> tl.minimum(tl.maximum(-126 - exponent, 0), 23)
    return tl.where(exponent < -126, subnormal, (exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _stage(
    hidden_states, weights, ids, x, x_sf, ids_out, weights_out,
    row_stride, hidden, top_k, x_stride, sf_stride, ids_stride, weights_stride,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """One token and BLOCK hidden values; the first block of a token also copies its routing.

    EARLY: let the next kernel start (:mod:`.chain`).
    """
    if EARLY:
        next_may_start_tl(tl.program_id(0))
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(hidden_states + token * row_stride + at, mask=at < hidden, other=0.0)
    h = h.to(tl.float32).reshape(BLOCK // 32, 32)
    size = tl.abs(h)
    amax = tl.maximum(tl.max(tl.where(size != size, 0.0, size), axis=1), 1e-4)
    bits = tl.div_rn(amax, 448.0).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    exponent = tl.minimum(tl.maximum(exponent, 1), 254)
    code = e4m3_code(h * power_of_two(127 - exponent)[:, None]).reshape(BLOCK)
    tl.store(x + token * x_stride + at, code.to(tl.uint8), mask=at < hidden)
    shift = tl.arange(0, 4) * 8
    word = tl.sum(exponent.reshape(BLOCK // 128, 4) << shift[None, :], axis=1)
    word_at = tl.program_id(1) * (BLOCK // 128) + tl.arange(0, BLOCK // 128)
    tl.store(x_sf + token * sf_stride + word_at, word, mask=word_at < hidden // 128)
    if tl.program_id(1) == 0:
        slot = tl.arange(0, SLOTS)
        live = slot < top_k
        routed = tl.load(ids + token * top_k + slot, mask=live, other=0)
        tl.store(ids_out + token * ids_stride + slot, routed.to(tl.int64), mask=live)
        weight = tl.load(weights + token * top_k + slot, mask=live, other=0.0)
        tl.store(weights_out + token * weights_stride + slot, weight.to(tl.float32), mask=live)
