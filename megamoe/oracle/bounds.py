"""From block sums to the interval of fp32 results that an accumulator class allows.

Every inequality is derived in ``docs/numerics.md``, section Accumulation; the names here are the
names there. Float64 evaluates the bounds; :data:`SLACK` covers its own rounding.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megamoe.oracle.linear import Blocks
from megamoe.spec.accumulators import Accumulator

F64 = npt.NDArray[np.float64]

SLACK = 2.0**-45
"""Relative to the sum of magnitudes: more than the float64 error of any prefix sum here."""

LOWEST = -126
"""Exponent of the smallest normal fp32 number: below it the spacing no longer shrinks."""
OVERFLOW = 2.0**128 - 2.0**103
"""fp32 sums from here on may round to infinity."""
SUBNORMAL = 2.0 ** (LOWEST - 23)
"""Spacing of subnormal fp32 numbers."""


def result_interval(blocks: Blocks, accumulator: Accumulator) -> tuple[F64, F64]:
    """``(R, N)`` lowest and highest value that a kernel of the class may hold in fp32.

    NaN in, NaN out. Where every partial sum of the class is exact, the two are the exact sum.
    An end whose partial sums may leave fp32 is infinite; where both are, NaN is possible too.
    """
    if accumulator.align_bits is None:
        return exact_interval(blocks)
    with np.errstate(over="ignore"):  # the lattice of a block without terms is infinitely coarse
        low, high = _finite_interval(blocks, accumulator)
    return within_fp32(blocks, low, high, accumulator)


def exact_interval(blocks: Blocks) -> tuple[F64, F64]:
    """The infinitely precise sum: its float64 ends, moved out where float64 may have rounded."""
    low, high = blocks.total()
    magnitude = (blocks.positive + blocks.negative).sum(axis=0)
    # Ends of intervals are halves of multiples of 2**lowbit, and sums of magnitudes come twice.
    with np.errstate(over="ignore"):  # without a term the lattice is infinitely coarse
        rounds = magnitude >= np.exp2(blocks.lowbit.min(axis=0) + 51)
    slack = np.where(rounds, SLACK * magnitude, 0.0)
    return low - slack, high + slack


def within_fp32(blocks: Blocks, low: F64, high: F64, accumulator: Accumulator) -> tuple[F64, F64]:
    """``low`` and ``high`` where partial sums may leave fp32: section The ends of fp32's range.

    A positive sum that leaves it becomes infinite, or the largest number there is; then the
    negative terms that follow bring the result below the exact sum. The other way round likewise.
    """
    assert accumulator.result_bits is not None and accumulator.align_bits is not None
    positive, negative = blocks.positive.sum(axis=0), blocks.negative.sum(axis=0)
    above, below = (part >= OVERFLOW * (1 - 2.0**-9) for part in (positive, negative))
    if not (above | below).any():
        return low, high
    bits = min(accumulator.align_bits, accumulator.result_bits)
    largest = 2.0**128 - 2.0 ** (127 - bits)
    top = np.maximum(blocks.bf16_field.max(axis=0), 1 + floor_log2(np.maximum(positive, negative)))
    terms = blocks.low.shape[0] * 32
    error = 3 * terms * np.exp2(top - bits)
    saturated_low = np.minimum(low, largest - negative) - error
    saturated_high = np.maximum(high, positive - largest) + error
    # Rounding a number to a grain does not change its sign.
    saturated_low = np.where(negative == 0, np.maximum(saturated_low, 0.0), saturated_low)
    saturated_high = np.where(positive == 0, np.minimum(saturated_high, 0.0), saturated_high)
    low = np.where(below, -np.inf, np.where(above, saturated_low, low))
    high = np.where(above, np.inf, np.where(below, saturated_high, high))
    return low, high


def _finite_interval(blocks: Blocks, accumulator: Accumulator) -> tuple[F64, F64]:
    low, high = exact_interval(blocks)
    if accumulator.block is None:
        return _any_order(blocks, low, high, accumulator)
    exact = _always_exact(blocks, accumulator)
    if exact.all():
        return low, high
    step = _any_order_steps if accumulator.any_order_in_block else _aligned_steps
    lower, upper = step(blocks, accumulator)
    return np.where(exact, low, lower), np.where(exact, high, upper)


def floor_log2(value: F64) -> F64:
    """floor(log2(value)), exactly; a very low exponent for zero."""
    _, exponent = np.frexp(value)
    return np.where(value > 0, exponent - 1.0, -1100.0)


def _ulp(magnitude: F64, bits: int) -> F64:
    """Spacing of fp32-ranged numbers with ``bits`` fraction bits at ``magnitude`` (0 for 0)."""
    exponent = np.maximum(floor_log2(magnitude), LOWEST)
    return np.where(magnitude > 0, np.exp2(exponent - bits), 0.0)


def _aligned_exponent(field: F64, magnitude: F64) -> F64:
    """Largest exponent field among products up to ``field`` and a running sum of ``magnitude``."""
    return np.maximum(np.maximum(field, floor_log2(magnitude)), LOWEST)


def _largest_partial(blocks: Blocks) -> F64:
    """No partial sum over any subset of the terms exceeds this, ``(R, N)``."""
    return np.maximum(blocks.positive.sum(axis=0), blocks.negative.sum(axis=0))


def _always_exact(blocks: Blocks, accumulator: Accumulator) -> npt.NDArray[np.bool_]:
    """Whether no step of the class can round, in any order: section Exact sums.

    All terms are multiples of q = 2**lowbit. A sum of multiples of q below 2**(f+1) * q is
    representable with f fraction bits, and an alignment to 2**E loses nothing if E - F <= lowbit.
    """
    assert accumulator.result_bits is not None and accumulator.align_bits is not None
    lowbit = blocks.lowbit.min(axis=0)
    partial = _largest_partial(blocks)
    exact = partial <= np.exp2(lowbit + 24)
    if accumulator.promote is None:
        # A kernel that adds in any order within a block may fold scales into bfloat16 operands.
        field = blocks.bf16_field if accumulator.any_order_in_block else blocks.field
        top = _aligned_exponent(field.max(axis=0), partial)
        representable = lowbit >= LOWEST - accumulator.result_bits
        return exact & representable & (top - accumulator.align_bits <= lowbit)
    span = accumulator.promote // 32
    for start in range(0, blocks.low.shape[0], span):
        part = slice(start, start + span)
        low = blocks.lowbit[part].min(axis=0)
        inner = np.maximum(blocks.positive[part].sum(axis=0), blocks.negative[part].sum(axis=0))
        top = _aligned_exponent(blocks.field[part].max(axis=0), inner)
        exact &= inner <= np.exp2(low + accumulator.result_bits + 1)
        exact &= top - accumulator.align_bits <= low
    return exact


def _any_order(blocks: Blocks, low: F64, high: F64, accumulator: Accumulator) -> tuple[F64, F64]:
    """Additions and aligned sums in any order, any direction: section Any order.

    Let U be the coarsest unit of any step. A step that rounds to a grain g <= U an operand whose
    bits end at L < g errs by at most g - L, and leaves a result that ends at g or above. So the
    sum of U - L over the operands still to be added falls by at least the error: all errors
    together are at most its first value, the sum of U - L over the terms that end below U. The
    computed partial sums exceed M by the errors: as long as n <= 2**13, the factor (1 + n * 2**-22)
    covers them where U follows from M, and elsewhere they stay below the exponent of U. With f bits
    in place of 23 the factor is (1 + n * 2**(1 - f)), as long as n <= 2**(f - 1).
    """
    bits = accumulator.align_bits
    assert bits is not None and bits == accumulator.result_bits
    terms = blocks.low.shape[0] * 32
    partial = _largest_partial(blocks)
    lowbit = blocks.lowbit.min(axis=0)
    bound = partial * (1 + terms * 2.0 ** (1 - bits))
    unit = np.exp2(_aligned_exponent(blocks.bf16_field.max(axis=0), bound) - bits)
    exact = (partial <= np.exp2(lowbit + bits + 1)) & (unit <= np.exp2(lowbit))
    loss = np.zeros_like(partial)
    for j in range(blocks.low.shape[0]):
        loss += blocks.most_terms(j) * np.maximum(unit - np.exp2(blocks.lowbit[j]), 0.0)
    error = np.where(exact | (partial == 0), 0.0, loss + SLACK * partial)
    if terms > min(2.0**13, 2.0 ** (bits - 1)):
        error = np.where(error == 0, 0.0, np.inf)  # nothing is shown of sums this long
    return low - error, high + error


def _any_order_steps(blocks: Blocks, accumulator: Accumulator) -> tuple[F64, F64]:
    """Ascending blocks, any order or one aligned sum within: section Ordered blocks."""
    assert accumulator.align_bits is not None and accumulator.block is not None
    shape = blocks.low.shape[1:]
    low, high = np.zeros(shape), np.zeros(shape)
    lattice = np.full(shape, np.inf)
    clean = np.ones(shape, dtype=bool)
    for j in range(blocks.low.shape[0]):
        top = np.maximum(high, 0.0) + blocks.positive[j]
        bottom = np.maximum(-low, 0.0) + blocks.negative[j]
        partial = np.maximum(top, bottom)
        lattice = np.minimum(lattice, blocks.lowbit[j])
        low, high = low + blocks.low[j], high + blocks.high[j]
        bound = partial * (1 + 64 * 2.0**-23)
        aligned_to = _aligned_exponent(blocks.bf16_field[j], bound)
        unit = np.exp2(aligned_to - accumulator.align_bits)
        clean &= (partial <= np.exp2(lattice + 24)) & (unit <= np.exp2(lattice))
        # The bound of any order, with the running sum as one more term of unknown last bit.
        loss = blocks.most_terms(j) * np.maximum(unit - np.exp2(blocks.lowbit[j]), 0.0) + unit
        error = loss + SLACK * partial
        idle = (blocks.positive[j] == 0) & (blocks.negative[j] == 0)  # adding zeros is exact
        error = np.where(clean | idle, 0.0, error)
        low, high = low - error, high + error
    return low, high


def _aligned_steps(blocks: Blocks, accumulator: Accumulator) -> tuple[F64, F64]:
    """One aligned, truncated sum for each block, with the running sum as an operand: section
    Aligned blocks."""
    assert accumulator.align_bits is not None and accumulator.result_bits is not None
    shape = blocks.low.shape[1:]
    low, high = np.zeros(shape), np.zeros(shape)
    main_low, main_high = np.zeros(shape), np.zeros(shape)
    lattice = np.full(shape, np.inf)
    clean = np.ones(shape, dtype=bool)
    last = blocks.low.shape[0]
    span = last if accumulator.promote is None else accumulator.promote // 32
    for j in range(last):
        lattice = np.minimum(lattice, blocks.lowbit[j])
        running = np.maximum(np.abs(low), np.abs(high))
        aligned_to = _aligned_exponent(blocks.field[j], running)
        unit = np.exp2(aligned_to - accumulator.align_bits)
        # Truncation toward zero: a positive term, a multiple of its last bit, loses up to a unit
        # less that bit; a negative one gains as much.
        loses = aligned_to - accumulator.align_bits > blocks.lowbit[j]
        most = 32 * np.maximum(unit - np.exp2(blocks.lowbit[j]), 0.0)
        down = np.where(loses, np.minimum(most, blocks.positive[j]), 0.0)
        up = np.where(loses, np.minimum(most, blocks.negative[j]), 0.0)
        # The running sum is a multiple of this: of the terms' lattice while nothing was rounded,
        # of its own last bit afterwards (nothing is known where it may be arbitrarily small).
        smallest = np.where((low < 0) & (high > 0), 0.0, np.minimum(np.abs(low), np.abs(high)))
        last_bit = np.maximum(floor_log2(smallest), LOWEST) - accumulator.result_bits
        granule = np.where(clean, lattice, last_bit)
        feeds = (running > 0) & (unit > np.exp2(granule))
        down += np.where(feeds & (high > 0), unit, 0.0)
        up += np.where(feeds & (low < 0), unit, 0.0)
        slack = SLACK * (running + blocks.positive[j] + blocks.negative[j])
        sum_low = low + blocks.low[j] - down
        sum_high = high + blocks.high[j] + up
        magnitude = np.maximum(np.abs(sum_low), np.abs(sum_high))
        clean &= ~loses & ~feeds & (magnitude <= np.exp2(lattice + accumulator.result_bits + 1))
        clean &= lattice >= LOWEST - accumulator.result_bits
        low = np.where(clean, sum_low, _truncated(sum_low - slack, accumulator))
        high = np.where(clean, sum_high, _truncated(sum_high + slack, accumulator))
        if accumulator.promote is not None and ((j + 1) % span == 0 or j + 1 == last):
            main_low, main_high = main_low + low, main_high + high
            reach = np.maximum(np.abs(main_low), np.abs(main_high))
            rounding = _ulp(reach, 23) + SLACK * reach  # one fp32 addition, any direction
            if accumulator.outside:  # the scaled result of a run may be subnormal: cut once more
                rounding += np.where(clean, 0.0, SUBNORMAL)
            main_low, main_high = main_low - rounding, main_high + rounding
            low, high = np.zeros(shape), np.zeros(shape)
            lattice = np.full(shape, np.inf)
            clean = np.ones(shape, dtype=bool)
    return (low, high) if accumulator.promote is None else (main_low, main_high)


def _truncated(value: F64, accumulator: Accumulator) -> F64:
    assert accumulator.result_bits is not None
    # Outside the unit the scale factor comes later, so no result is subnormal in it.
    return toward_zero(value, accumulator.result_bits, -1000 if accumulator.outside else LOWEST)


def toward_zero(value: F64, bits: int, lowest: int = LOWEST) -> F64:
    """Truncate to ``bits`` fraction bits; monotone, so it maps interval ends to interval ends."""
    _, exponent = np.frexp(value)
    last = np.maximum(exponent - 1, lowest) - bits
    return np.ldexp(np.trunc(np.ldexp(value, -last)), last)
