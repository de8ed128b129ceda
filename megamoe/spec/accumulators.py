"""Accumulator classes: how a correct kernel may sum the products of one dot product.

A class is a *set* of kernels. Its bound, derived in ``docs/numerics.md``, is computed in
:mod:`megamoe.oracle.bounds` from these numbers alone; nothing here was fitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Accumulator:
    """One class, in the terms in which tensor cores are described.

    A *step* aligns up to ``block`` products and the running sum to the largest exponent field
    among them, keeps ``align_bits`` fraction bits below it and rounds the result to
    ``result_bits`` fraction bits. ``block`` None means a plain sum in any order, one rounding an
    addition.

    A kernel is a member where its operands reach the unit as they are. One that folds each scale
    factor into its operand, as bfloat16, is a member as long as both are multiples of 2**-133.
    """

    name: str
    block: int | None
    """Products per step, in ascending K; None: any order over the whole dot product."""
    align_bits: int | None
    """Fraction bits kept below the largest aligned exponent; None: no alignment, exact."""
    result_bits: int | None
    """Fraction bits of the rounded result of a step (23 is fp32); None: exact."""
    toward_zero: bool
    """Every rounding is toward zero; otherwise any direction is allowed."""
    promote: int | None
    """K values after which the running sum moves to an fp32 register; None: never."""
    any_order_in_block: bool
    """The additions within a block may also be separate fp32 additions in any order."""
    replayed: bool
    """Known operands leave nothing open: the steps are followed (:mod:`megamoe.oracle.stepwise`)
    and not bounded, so a kernel that cuts K, scales or promotes otherwise is of another class."""
    evidence: str
    outside: bool = False
    """The unit does not apply scale factors. Each run of ``promote`` values starts from zero; its
    result is multiplied by both scale factors and added in fp32. A run must have one factor on each
    side. The two count as one power of two: an order in which their product overflows belongs to
    another kernel."""


EXACT: Final = Accumulator(
    "exact", None, None, None, True, None, False, False,
    "definition: the infinitely precise sum, rounded once, to bfloat16 (decision 10)",
)  # fmt: skip
FP32: Final = Accumulator(
    "fp32", None, 23, 23, False, None, True, False,
    "definition: IEEE fp32 or wider additions, any order, any rounding direction",
)  # fmt: skip
FP32_ORDERED: Final = Accumulator(
    "fp32-ordered", 32, 23, 23, False, None, True, False,
    "definition: as fp32, with K in ascending blocks of 16 or 32; Hopper wgmma bf16 is a member "
    "(MMA-Sim 2.1.1: 16 terms, 25 bits, truncated) where its operands are bfloat16 numbers",
)  # fmt: skip
SM90_E4M3: Final = Accumulator(
    "sm90-e4m3", 32, 13, 13, True, 128, False, True,
    "MMA-Sim 2.1.1 and mmaemu 0.1.0, both checked against H100; DeepGEMM promotes every 128",
)  # fmt: skip
SM90_E4M3_K32: Final = Accumulator(
    "sm90-e4m3-k32", 32, 13, 13, True, 32, False, True,
    "the instruction of sm90-e4m3, which has no operand for scale factors, with this contract's "
    "factors for each 32 applied as DeepGEMM's SM90 kernels apply theirs for each 128",
    outside=True,
)  # fmt: skip
SM90_E4M3_K128: Final = Accumulator(
    "sm90-e4m3-k128", 32, 13, 13, True, 128, False, True,
    "read in DeepGEMM's sm90_fp8_gemm_1d2d.cuh and sgl-deep-gemm 0.2.5's sm90_fp8_mega_moe.cuh: "
    "four steps of 32 from zero, then final += scale_a * scale_b * accum",
    outside=True,
)  # fmt: skip
"""It is outside of :data:`ACCUMULATORS`, for its operands need one scale factor for each 128 values
of K: only the format fp8-block has such (:data:`OF_FORMAT`)."""
SM90_E4M3_ANY: Final = Accumulator(
    "sm90-e4m3-any", None, 13, 13, True, None, True, False,
    "read in humming-kernels 0.1.19, mma/wgmma.cuh: the instruction's own sum is fed back over all "
    "of K; epilogue/smem_reducer.cuh: warps that share K add their sums in fp32",
)  # fmt: skip
"""Steps of Hopper's FP8 instruction in any order, from any number of zeros, their results added in
fp32. The class is for rows with one scale, which comes after the sum: MXFP4's form has a scale each
32."""
SM100_MXF8F6F4: Final = Accumulator(
    "sm100-mxf8f6f4", 32, 25, 23, True, None, False, False,
    "MMA-Sim 2.1.1, checked against B200 for one CTA; the two-CTA form that DeepGEMM issues is "
    "likely the same, not shown",
)  # fmt: skip

ACCUMULATORS: Final = {
    a.name: a for a in (EXACT, FP32, FP32_ORDERED, SM90_E4M3, SM90_E4M3_K32, SM100_MXF8F6F4)
}
"""The classes of MXFP4 and NVFP4: a golden of these formats has an envelope of each."""
OF_FORMAT: Final = {
    "fp8-block": {a.name: a for a in (EXACT, FP32_ORDERED, SM90_E4M3_K128)},
    "w4a16": {a.name: a for a in (EXACT, FP32, FP32_ORDERED)},
    "w4a8-token": {a.name: a for a in (EXACT, FP32, FP32_ORDERED, SM90_E4M3_ANY)},
}
"""The classes of each other format. With fp8-block the runs of K, and how a run's sum is scaled,
are the contract's; a class says how a run is summed (``docs/numerics.md``, section 13)."""
CLASSES: Final = {**ACCUMULATORS, **{k: a for of in OF_FORMAT.values() for k, a in of.items()}}
"""All classes that a backend may claim."""


def classes_of(weight_format: str) -> dict[str, Accumulator]:
    """The classes whose envelopes a golden of this format has."""
    return OF_FORMAT.get(weight_format, ACCUMULATORS)


def accumulator(name: str) -> Accumulator:
    """The class called ``name``; ``ValueError`` naming the known ones otherwise."""
    try:
        return CLASSES[name]
    except KeyError:
        names = ", ".join(CLASSES)
        raise ValueError(
            f"unknown accumulator class {name!r}; known: {names}; if you do not know it, write fp32"
        ) from None
