"""The form of a numerics contract: clauses with their evidence.

A clause is a choice that decides bits; the oracle reads every clause. Facts that no known kernel
changes, such as groups of 32, are in :mod:`megamoe.spec.formats`. The freedom of the hardware is in
:mod:`megamoe.spec.accumulators`. Nothing in here is a tolerance.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Clause(Generic[T]):
    """One value of the contract with its evidence: the source of the text, or the measurement."""

    value: T
    evidence: str


@dataclass(frozen=True)
class Contract:
    """Everything that decides an output bit, apart from how sums are accumulated."""

    revision: str

    features: Clause[tuple[str, ...]]
    """The features (:data:`megamoe.spec.features.FEATURES`) for which the clauses have rules. A
    case that asks for any other feature is not of this contract."""

    # --- EPLB remap ---
    replica_choice: Clause[str]
    """Replica of a logical expert, of ``max(count, 1)``: 'token-hash' is
    ``(t * replica_hash) mod 2**32`` of the token's row t, 'flat-position' is ``t * K + slot``."""
    replica_hash: Clause[int]
    padding_known: Clause[bool]
    """The remap gets the number of rows that are no padding, and counts only those in the load.
    Staging gets the mask of padding rows, and gives them id -1 and weight 0. Both still write the
    rest of such a row."""

    # --- staging ---
    staging_amax_floor: Clause[float]
    """Lower bound of a group's amax."""
    staging_exponent_min: Clause[int]
    staging_exponent_max: Clause[int]
    """The UE8M0 byte is clamped to this range. Where that leaves 255, for an infinite amax, the
    factor ``2**(127 - e)`` is -inf: its bits are those of ``254 - e`` in the exponent field."""
    staging_clips: Clause[bool]
    """Scaled values are clipped to +-448 before the cast, so that NaN becomes 448."""

    # --- casts of both quantisations ---
    cast_saturates: Clause[bool]
    """E4M3 cast, to nearest even: beyond 448 gives 448, infinities included; else NaN."""
    amax_drops_nan: Clause[bool]
    """A group's amax ignores NaN members."""

    # --- SwiGLU ---
    gate_up_order: Clause[str]
    """Rows of w13: 'gate-up' is [0, I) gate (w1), [I, 2I) up (w3); 'up-gate' the reverse."""
    gate_clamped_below: Clause[bool]
    clamp_drops_nan: Clause[bool]
    """min and max of the clamp return their non-NaN operand, so NaN becomes a bound."""
    precise_silu: Clause[str]
    """fast_math off: 'g/d' or 'g*(1/d)' with d = fl(1 + expf(-g))."""
    situ_tanh: Clause[str]
    """SiTU's tanh: 'tanhf' of a quotient in either mode; 'sigmoid', ``2 * sigmoid(2x) - 1``; or
    'quotient': for the scales (4, 25) gate and sigmoid are one quotient of T = tanh(g/4),
    ``2T(1+T)**2 / (1+T*T)``, and tanhf or, in the fast form, tanh.approx is meant."""
    routing_weight: Clause[str]
    """The place of the multiplication: 'activation', before the amax is taken, or 'combine', by
    ``fma(row, weight, sum)``. The clause speaks of MXFP4: NVFP4 has 'combine' under each contract
    that has a rule for it. A dialect may have 'row', in the combine, by a fused multiply-add or by
    a product and a sum, or 'accumulator', before linear 2 is rounded to bfloat16."""

    # --- requantisation ---
    bf16_before_requant: Clause[bool]
    """Activations are rounded to bfloat16 before the amax is taken."""
    requant_scale: Clause[str]
    """The rule from amax to the UE8M0 byte. 'product': t = fl(amax * fl32(1/448)), field(t) +
    (mantissa(t) != 0). 'bits': (bits(amax) + 0x1FFFFF >> 23) - 8, which is the same for amax above
    448 * 2**-127, and 247 in place of 255 for infinity."""
    requant_exponent_min: Clause[int]
    """Lowest UE8M0 byte; 0 means no floor."""

    # --- combine ---
    combine_order: Clause[str]
    """'ascending-slot': fp32 sum of the bf16 rows from 0, live slots in ascending order;
    'descending-slot': the reverse."""
    shared_expert: Clause[str]
    """The place of the fused shared expert's row in the sum: 'first', before the slots, or
    'last'."""

    @property
    def clauses(self) -> dict[str, Clause[Any]]:
        """Name to clause, in the order of computation."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "revision"}

    def takes(self, features: Collection[str]) -> bool:
        """Whether there is a rule for a call that asks for these features."""
        return set(features) <= set(self.features.value)

    def knows(self, kind: str, features: Collection[str] = ()) -> bool:
        """Whether there is a rule for a case of ``kind`` that asks for these features."""
        return self.takes(features)

    def variant(self, revision: str, evidence: str, **values: Any) -> Self:
        """A contract with other ``values`` of some clauses; ``TypeError`` for an unknown clause."""
        clauses = {name: Clause(value, evidence) for name, value in values.items()}
        return replace(self, revision=revision, **clauses)

    def carried(self, where: str) -> Self:
        """The same; the evidence of every clause says that ``where`` has it too."""
        clauses: dict[str, Any] = {
            name: Clause(clause.value, f"{clause.evidence}; the same in {where}")
            for name, clause in self.clauses.items()
        }
        return replace(self, **clauses)

    def differences(self, other: Contract) -> list[str]:
        """Names of the clauses that both have, and whose values differ."""
        mine, theirs = self.clauses, other.clauses
        return [n for n in mine if n in theirs and mine[n].value != theirs[n].value]
