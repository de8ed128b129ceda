"""Simulated members of the classes that add in fp32, one addition at a time or a block at a time.

Sums are float64 numbers with fp32's spacing and range (subnormals and saturation included), so that
every rounding direction is available. Products are exact in fp32 unless they are subnormal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megamoe.spec.formats import (
    E2M1_TABLE,
    E4M3_TABLE,
    F64,
    GROUP,
    U8,
    e2m1_unpack,
    ue8m0_decode,
)

Rng = np.random.Generator
Linear = Callable[[U8, U8, U8, U8, Rng], F64]
"""(R, C) codes, (R, C/32) sf, (N, C/2) packed weights, (N, C/32) sf to (R, N) fp32 values."""

_HALF, _BELOW = np.int64(1 << 28), np.int64((1 << 29) - 1)
"""Half a unit of fp32 in the bits of a float64, and all bits below that unit."""
ROUNDINGS = ("nearest", "zero", "away", "up", "down", "mixed")
ORDERS = ("ascending", "random", "by-sign", "tree", "splits")


@dataclass(frozen=True)
class Kernel:
    """One simulated correct kernel."""

    name: str
    accumulator: str
    """The class it is a member of."""
    linear: Linear
    silu: str = "mixed"
    """The error of each instruction of silu, within its documented bound: low, high, none or
    mixed."""


def to_fp32(value: F64, rounding: str, rng: Rng) -> F64:
    """Float64 to fp32's spacing, in any direction: one rounding, either neighbour is correct.

    ``mixed`` draws a direction for each element (stochastic rounding included).
    """
    if rounding == "nearest":
        with np.errstate(over="ignore"):
            return value.astype(np.float32).astype(np.float64)
    bits = np.ascontiguousarray(value).view(np.int64)
    if rounding == "zero":
        offset: Any = np.int64(0)
    elif rounding == "away":
        offset = _BELOW
    elif rounding in ("up", "down"):
        offset = np.where((bits < 0) == (rounding == "up"), np.int64(0), _BELOW)
    else:
        offset = rng.integers(0, 1 << 29, value.shape, dtype=np.int64)
    out = ((bits + offset) & ~_BELOW).view(np.float64)
    small = np.abs(value) < 2.0**-126
    if small.any():
        steps = value[small] * 2.0**149
        floor = {"up": np.ceil, "down": np.floor, "zero": np.trunc}.get(rounding, np.rint)
        out[small] = floor(steps) * 2.0**-149
    return _overflow(value, out, rounding, rng)


LARGEST = 2.0**128 - 2.0**104
"""fp32's largest number."""


def _overflow(value: F64, out: F64, rounding: str, rng: Rng) -> F64:
    """``out`` limited to fp32's range: a sum that leaves it saturates or becomes infinite."""
    over = ~(np.abs(value) <= LARGEST)
    if not over.any():
        return out
    stays = {
        "zero": np.ones_like(over), "away": np.zeros_like(over), "up": value < 0, "down": value > 0,
    }.get(rounding)  # fmt: skip
    if stays is None:
        stays = rng.random(value.shape) < 0.5
    inf = np.copysign(np.where(stays & np.isfinite(value), LARGEST, np.inf), value)
    return np.where(np.isnan(value), np.nan, np.where(over, inf, out))


def products(codes: U8, sf: U8, packed: U8, weight_sf: U8) -> F64:
    """``(C, R, N)`` scaled products."""
    x, w = scaled(codes, sf, packed, weight_sf)
    return x.T[:, :, None] * w.T[:, None, :]


def add_up(terms: F64, order: str, rounding: str, rng: Rng) -> F64:
    """``(n, ...)`` terms to one fp32 sum each, by n - 1 additions."""
    count = len(terms)
    if order == "random":
        terms = terms[rng.permutation(count)]
    elif order == "by-sign":  # positive terms first: the largest partial sums there can be
        terms = np.sort(terms, axis=0)[::-1]
    if order == "tree":
        terms = terms[rng.permutation(count)]
        while len(terms) > 1:
            half = len(terms) // 2
            sums = to_fp32(terms[:half] + terms[half : 2 * half], rounding, rng)
            terms = np.concatenate([sums, terms[2 * half :]])
        return terms[0]
    if order == "splits":  # as split-K or vector lanes: strided partial sums, added at the end
        lanes = int(rng.choice([2, 4, 8, 16]))
        parts = [add_up(terms[lane::lanes], "ascending", rounding, rng) for lane in range(lanes)]
        return add_up(np.stack(parts), "ascending", rounding, rng)
    total = terms[0].copy()
    with np.errstate(invalid="ignore"):  # infinities of both signs
        for term in terms[1:]:
            total = to_fp32(total + term, rounding, rng)
    return total


_AT_ONCE = 1 << 22
"""Products held in memory at a time."""


def _in_chunks(one: Callable[[F64, Rng], F64]) -> Linear:
    def linear(codes: U8, sf: U8, packed: U8, weight_sf: U8, rng: Rng) -> F64:
        rows, depth = codes.shape
        outputs = packed.shape[0]
        out = np.empty((rows, outputs))
        step = max(1, _AT_ONCE // (rows * depth))
        for start in range(0, outputs, step):
            part = slice(start, start + step)
            out[:, part] = one(products(codes, sf, packed[part], weight_sf[part]), rng)
        return out

    return linear


def plain(order: str, rounding: str) -> Kernel:
    """Class ``fp32``: additions in any order over the whole of K."""

    def one(terms: F64, rng: Rng) -> F64:
        return add_up(to_fp32(terms, rounding, rng), order, rounding, rng)

    return Kernel(f"plain/{order}/{rounding}", "fp32", _in_chunks(one))


def ordered(order: str, rounding: str, block: int, *, fresh: bool) -> Kernel:
    """Class ``fp32-ordered``: any order within ascending blocks of K.

    ``fresh``: a block is summed on its own and then added; otherwise the running sum takes part
    in the block's additions as one more term.
    """

    def one(terms: F64, rng: Rng) -> F64:
        terms = to_fp32(terms, rounding, rng)
        total = np.zeros(terms.shape[1:])
        for start in range(0, len(terms), block):
            part = terms[start : start + block]
            if fresh:
                inner = add_up(part, order, rounding, rng)
                total = to_fp32(total + inner, rounding, rng)
            else:
                total = add_up(np.concatenate([total[None], part]), order, rounding, rng)
        return total

    name = f"ordered{block}/{order}/{rounding}/{'fresh' if fresh else 'running'}"
    return Kernel(name, "fp32-ordered", _in_chunks(one))


def scaled(codes: U8, sf: U8, packed: U8, weight_sf: U8) -> tuple[F64, F64]:
    """Both operands with their scales, ``(R, C)`` and ``(N, C)``."""
    x = E4M3_TABLE[codes] * np.repeat(ue8m0_decode(sf), GROUP, axis=1)
    return x, E2M1_TABLE[e2m1_unpack(packed)] * np.repeat(ue8m0_decode(weight_sf), GROUP, axis=1)


class NotAMemberError(ValueError):
    """The operands are outside the range in which the kernel is a member of its class."""


def exact_cast(scaled: F64, dtype: torch.dtype) -> torch.Tensor:
    """Scaled operands in a format that must hold them."""
    operand = torch.from_numpy(scaled).to(dtype)
    if not np.array_equal(operand.double().numpy(), scaled, equal_nan=True):
        raise NotAMemberError(f"an operand, scaled, is no {dtype} number")
    return operand


def blas() -> Kernel:
    """Class ``fp32``: a library's fp32 matrix product over a random permutation of K.

    :class:`NotAMemberError` where an operand, scaled, is no fp32 number: there it is no member.
    """

    def linear(codes: U8, sf: U8, packed: U8, weight_sf: U8, rng: Rng) -> F64:
        order = torch.from_numpy(rng.permutation(codes.shape[1]))
        x, w = (exact_cast(v, torch.float32) for v in scaled(codes, sf, packed, weight_sf))
        return (x[:, order] @ w[:, order].T).double().numpy()

    return Kernel("blas/permuted", "fp32", linear)


def blockwise(rounding: str) -> Kernel:
    """Class ``fp32-ordered``: blocks of 32 summed exactly, each rounded and added in turn."""

    def linear(codes: U8, sf: U8, packed: U8, weight_sf: U8, rng: Rng) -> F64:
        x, w = scaled(codes, sf, packed, weight_sf)
        total = np.zeros((len(x), len(w)))
        for start in range(0, codes.shape[1], GROUP):
            k = slice(start, start + GROUP)
            block = to_fp32(x[:, k] @ w[:, k].T, rounding, rng)
            total = to_fp32(total + block, rounding, rng)
        return total

    return Kernel(f"blockwise/{rounding}", "fp32-ordered", linear)
